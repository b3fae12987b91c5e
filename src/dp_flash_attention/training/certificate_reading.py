"""Reading a certificate that anyone may have written: known fields only, and every number within bounds.

What passes has the fields of this format, of the right types, with numbers so bounded that everything can be computed
from them in seconds. Whether they are true is for ``recomputation``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from dp_flash_attention.clipping.clip_groups import ClipGroup, Clipping
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyUnit
from dp_flash_attention.training.certificate import ACCOUNTED, FORMAT, EvaluationStatement
from dp_flash_attention.training.evaluation import KINDS
from dp_flash_attention.training.finite_precision import TrainingNoise

COUNT, TRAINING, EVALUATION = "number of training records", "training", "evaluation"
# An ε of 100 promises nothing, and the accountants take time and memory for what is far beyond any real run.
_EPSILON = (1e-9, 100.0)
_DELTA = (1e-200, 0.5)
_SAMPLING_PROB = (1e-9, 1.0)
_MAX_STEPS = 10**6
_NOISE_MULTIPLIER = (1e-2, 1e6)
_MAX_RECORDS = 10**12
_MAX_PARAMETERS = 10**13
_POSITIVE = (1e-100, 1e100)
_MAX_TEXT = 10_000
_MAX_GROUPS = 100_000
_TOP = (
    "format", "claim", "mechanisms", "holdout_prob", "composition", "certified", "estimated", "assumed", "not_covered",
    "secrets", "task", "hyper_parameters", "files", "versions",
)  # fmt: skip
_PLAN = (
    "epsilon", "delta", "sampling_prob", "expected_batch_size", "num_steps", "l2_clip_norm", "noise_multiplier", "noise",
    "accountant", "dataset_size", "clipping",
)  # fmt: skip
_REMEDY = "Take the file as the run wrote it; if this is it, the certificate cannot be relied on."


@dataclass(frozen=True, kw_only=True)
class CountStatement:
    """What a certificate says of the release of the number of records.

    Attributes:
        epsilon: ε of the release.
        scale: Of the discrete Laplace noise.
        released_count: What was released.
    """

    epsilon: float
    scale: float
    released_count: int


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The numbers of a certificate, within bounds, and what of it is free text.

    Attributes:
        holds: Whether it claims privacy at all.
        epsilon: ε of the run.
        delta: δ of the run.
        count: Release of the number of records; None if that number is public.
        plan: Fields of the plan; each within its bounds.
        training_epsilon: ε of training, as listed.
        training_delta: Its δ, as listed.
        evaluation: None without hold-out.
        evaluation_sensitivity: As listed.
        holdout_prob: Probability of a record to be in the hold-out.
        certified: The certified numbers, by name; ``finite_precision`` among them for exact noise.
        assumed: Everything that is taken for granted.
        content: The whole certificate.
    """

    holds: bool
    epsilon: float
    delta: float
    count: CountStatement | None
    plan: Mapping[str, Any]
    training_epsilon: float
    training_delta: float
    evaluation: EvaluationStatement | None
    evaluation_sensitivity: float | None
    holdout_prob: float
    certified: Mapping[str, Any]
    assumed: tuple[str, ...]
    content: Mapping[str, Any]


def read_statement(content: object) -> Statement:
    """Returns a certificate's numbers.

    Args:
        content: JSON values, from a parser that refuses NaN, infinities and repeated keys.

    Raises:
        InvalidInputError: If it is of another format, a field is missing, unknown or of another type, or a number is out
            of bounds. Nothing was computed then.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT or content["format"] is True:
        found = content.get("format") if isinstance(content, dict) else content
        raise InvalidInputError(
            "certificate: format",
            _short(found),
            bound=f"{FORMAT}, the only one that this version checks",
            remedy="Check it with the version of dpfa that its 'versions' name.",
        )
    _fields(content, "", _TOP)
    claim = _fields(
        content["claim"],
        "claim",
        ("holds", "statement", "epsilon", "delta", "neighboring_relation", "privacy_unit", "covers"),
    )
    _one_of(claim, "claim", "holds", (True, False))
    # Across training part and hold-out the larger ε counts for records that come or go, not for records that are replaced.
    _one_of(claim, "claim", "neighboring_relation", (NeighboringRelation.ADD_OR_REMOVE_ONE.value,))
    _one_of(claim, "claim", "privacy_unit", (PrivacyUnit.EXAMPLE.value,))
    parts = _mechanisms(content["mechanisms"])
    training = parts[TRAINING]
    plan = _plan(training["parameters"])
    evaluation, sensitivity = _evaluation(parts.get(EVALUATION), content["estimated"])
    return Statement(
        holds=claim["holds"],
        epsilon=_number(claim, "claim", "epsilon", *_EPSILON),
        delta=_number(claim, "claim", "delta", *_DELTA),
        count=_count(parts.get(COUNT)),
        plan=plan,
        training_epsilon=_number(training, TRAINING, "epsilon", *_EPSILON),
        training_delta=_number(training, TRAINING, "delta", *_DELTA),
        evaluation=evaluation,
        evaluation_sensitivity=sensitivity,
        holdout_prob=_number(content, "", "holdout_prob", 0.0, 0.999999),
        certified=_certified(content["certified"], plan, holds=claim["holds"]),
        assumed=_texts(content["assumed"], "assumed"),
        content=_checked_rest(content),
    )


def _mechanisms(listed: object) -> dict[str, dict[str, Any]]:
    fields = {
        COUNT: ("name", "data", "mechanism", "epsilon", "scale", "released_count"),
        TRAINING: ("name", "data", "epsilon", "delta", "guarantee", "parameters"),
        EVALUATION: (
            "name", "data", "mechanism", "kind", "epsilon", "delta", "noise", "noise_stddev", "num_values",
            "l2_sensitivity", "guarantee",
        ),
    }  # fmt: skip
    entries = listed if isinstance(listed, list) else []
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if names not in (
        [TRAINING],
        [COUNT, TRAINING],
        [TRAINING, EVALUATION],
        [COUNT, TRAINING, EVALUATION],
    ):
        raise _wrong(
            "mechanisms", names, f"{TRAINING!r}, with {COUNT!r} before it or {EVALUATION!r} after it"
        )
    return {name: _fields(entry, str(name), fields[name]) for name, entry in zip(names, entries, strict=True)}


def _plan(value: object) -> dict[str, Any]:
    where = f"{TRAINING} parameters"
    exact = isinstance(value, dict) and value.get("noise") == "exact"
    grouped = isinstance(value, dict) and "clip_groups" in value
    fields = _fields(
        value, where, (*_PLAN, *(["num_parameters"] if exact else []), *(["clip_groups"] if grouped else []))
    )
    _one_of(fields, where, "noise", get_args(TrainingNoise))
    _one_of(fields, where, "clipping", get_args(Clipping) if not grouped else ("per_layer",))
    _one_of(fields, where, "accountant", ("pld", "rdp"))
    size = fields["dataset_size"]
    return fields | {
        "epsilon": _number(fields, where, "epsilon", *_EPSILON),
        "delta": _number(fields, where, "delta", *_DELTA),
        "sampling_prob": _number(fields, where, "sampling_prob", *_SAMPLING_PROB),
        "expected_batch_size": _number(fields, where, "expected_batch_size", 1e-6, _MAX_RECORDS),
        "num_steps": _whole(fields, where, "num_steps", _MAX_STEPS),
        "l2_clip_norm": _number(fields, where, "l2_clip_norm", *_POSITIVE),
        "noise_multiplier": _number(fields, where, "noise_multiplier", *_NOISE_MULTIPLIER),
        "dataset_size": None if size is None else _whole(fields, where, "dataset_size", _MAX_RECORDS),
        "num_parameters": _whole(fields, where, "num_parameters", _MAX_PARAMETERS) if exact else None,
        "clip_groups": _groups(fields["clip_groups"]) if grouped else None,
    }


def _groups(value: object) -> tuple[ClipGroup, ...]:
    where = "clip_groups"
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_GROUPS:
        raise _wrong(where, value, f"a list of 1 to {_MAX_GROUPS:,} groups")
    groups = []
    for entry in value:
        fields = _fields(entry, where, ("name", "parameters", "weight"))
        (name,) = _texts([fields["name"]], f"{where}: name")
        weight = _number(fields, where, "weight", *_POSITIVE)
        groups.append(
            ClipGroup(
                name=name, parameters=_texts(fields["parameters"], f"{where}: parameters"), weight=weight
            )
        )
    return tuple(groups)


def _count(fields: dict[str, Any] | None) -> CountStatement | None:
    if fields is None:
        return None
    _one_of(fields, COUNT, "mechanism", ("discrete Laplace",))
    return CountStatement(
        epsilon=_number(fields, COUNT, "epsilon", 1e-12, _EPSILON[1]),
        scale=_number(fields, COUNT, "scale", 1e-6, 1e12),
        released_count=_whole(fields, COUNT, "released_count", _MAX_RECORDS),
    )


def _evaluation(
    fields: dict[str, Any] | None, estimated: object
) -> tuple[EvaluationStatement | None, float | None]:
    figures = _fields(estimated, "estimated", None)
    for name in figures:
        _number(figures, "estimated", name, -1e300, 1e300)
    if fields is None:
        if figures:
            raise _wrong("estimated", sorted(figures), "empty without an evaluation")
        return None, None
    _one_of(fields, EVALUATION, "mechanism", ("Gaussian",))
    _one_of(fields, EVALUATION, "kind", tuple(KINDS))
    _one_of(fields, EVALUATION, "noise", get_args(TrainingNoise))
    statement = EvaluationStatement(
        kind=fields["kind"],
        epsilon=_number(fields, EVALUATION, "epsilon", *_EPSILON),
        delta=_number(fields, EVALUATION, "delta", *_DELTA),
        noise=fields["noise"],
        noise_stddev=_number(fields, EVALUATION, "noise_stddev", *_NOISE_MULTIPLIER),
        num_values=_whole(fields, EVALUATION, "num_values", _MAX_PARAMETERS),
        estimates=figures,
    )
    return statement, _number(fields, EVALUATION, "l2_sensitivity", *_POSITIVE)


def _certified(value: object, plan: Mapping[str, Any], *, holds: bool) -> dict[str, Any]:
    if not holds:
        return _fields(value, "certified", ())
    names = (*ACCOUNTED, "l2_sensitivity_of_a_step", "clipping", "method")
    exact = plan["noise"] == "exact"
    fields = _fields(value, "certified", (*names, "finite_precision") if exact else names)
    for name in (*ACCOUNTED, "l2_sensitivity_of_a_step"):
        _number(fields, "certified", name, 0.0, 1e100)
    if exact:
        where = "finite_precision"
        precision = _fields(
            fields[where],
            where,
            (
                "noise", "grid", "stddev", "sensitivity_factor", "distance", "advantage", "delta",
                "delta_of_the_accountant", "noise_multiplier_of_the_accountant",
            ),
        )  # fmt: skip
        for name in precision.keys() - {"noise"}:
            _number(precision, where, name, 0.0, 1e300)
    return fields


def _checked_rest(content: dict[str, Any]) -> dict[str, Any]:
    """What is free text or decides nothing: its types alone."""
    for name in ("task", "hyper_parameters"):
        _fields(content[name], name, None)
    for name, entry in _fields(content["files"], "files", None).items():
        fields = _fields(entry, f"files: {_short(name)}", ("sha256", "size"))
        digest = fields["sha256"]
        if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise _wrong(f"files: {_short(name)}: sha256", digest, "64 hexadecimal digits")
        _whole(fields, "files", "size", 10**15, least=0)
    if "model.safetensors" not in content["files"]:
        raise _wrong("files", sorted(content["files"]), "a list that names model.safetensors")
    for name, number in _fields(content["versions"], "versions", None).items():
        if not isinstance(number, str):
            raise _wrong(f"versions: {_short(name)}", number, "a text")
    return content


def _fields(value: object, where: str, names: tuple[str, ...] | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where or "content", value, "a JSON object")
    if names is not None:
        missing, unknown = sorted(set(names) - set(value)), sorted(set(value) - set(names))
        if missing:
            raise _wrong(where or "fields", missing, "all there, but these are missing")
        if unknown:
            raise _wrong(where or "fields", unknown, "none but those of this format, and these are unknown")
    return value


def _number(fields: Mapping[str, Any], where: str, name: str, low: float, high: float) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _wrong(f"{where}: {name}" if where else name, value, f"a number from {low:g} to {high:g}")
    number = float(value)
    assert math.isfinite(number), "NaN compares as false with both bounds"
    return number


def _whole(fields: Mapping[str, Any], where: str, name: str, high: int, *, least: int = 1) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= high:
        raise _wrong(f"{where}: {name}", value, f"a whole number from {least} to {high:,}")
    return value


def _texts(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(
        isinstance(one, str) and len(one) <= _MAX_TEXT for one in value
    ):
        raise _wrong(where, value, "a list of sentences")
    return tuple(value)


def _one_of(fields: Mapping[str, Any], where: str, name: str, known: tuple[object, ...]) -> None:
    value = fields[name]
    # JSON's 1 is no true, and a list is nothing that could be looked up.
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        raise _wrong(f"{where}: {name}", value, " or ".join(repr(one) for one in known))


def _wrong(where: str, value: object, bound: str) -> InvalidInputError:
    return InvalidInputError(f"certificate: {where}", _short(value), bound=bound, remedy=_REMEDY)


def _short(value: object) -> object:
    """What an error shows of a value that anyone may have written."""
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 10**20):
        return value
    text = (
        str(value)
        if not isinstance(value, int)
        else f"{'-' if value < 0 else ''}2^{abs(value).bit_length()} or so"
    )
    return text if len(text) <= 120 else text[:117] + "..."
