"""Computing a certificate's numbers again, from its own public numbers alone, for one who trusts nobody's word.

What comes out says whether the *claim follows* from the mechanisms that the certificate lists. That these mechanisms ran,
and nothing else, is the word of whoever ran them: no arithmetic can show it. What a certificate assumes is listed, not
checked, and what it estimates is compared with the released figures that lie beside it (``run_check``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from dp_flash_attention.accounting import (
    basic_composition,
    discrete_laplace_epsilon,
    gdp_delta,
)
from dp_flash_attention.core.errors import DPFlashAttentionError
from dp_flash_attention.noise.rounded_gaussian import RoundedGaussian
from dp_flash_attention.training.cached_accountant import cached_epsilon
from dp_flash_attention.training.certificate import build_certificate, fixed_assumptions
from dp_flash_attention.training.certificate_reading import Statement, read_statement
from dp_flash_attention.training.certificate_rows import SAME, Row, Standing, differences
from dp_flash_attention.training.evaluation import KINDS
from dp_flash_attention.training.finite_precision import FinitePrecision, finite_precision
from dp_flash_attention.training.plan import PrivacyPlan

# Other processors and mathematical libraries round the last digits otherwise; a claim may lie that much below.
_ROUNDING = 1e-9
# The tight bound may exceed the Rényi one by the width of its grid, and by what tiny figures are rounded up to.
_GRID, _GRID_ABSOLUTE = 1e-2, 1e-3
# Rényi bounds are loose, but not that loose: a claim so far below is wrong, and the tight bound could take all memory.
_HOPELESS = 10.0
_SHOWN = 5


def recompute(content: object) -> tuple[Row, ...]:
    """Computes again everything that follows from a certificate's numbers.

    It takes seconds for usual runs, and a minute or two at most, for numbers are bounded before anything is computed.

    Args:
        content: The certificate as JSON values, from a parser that refuses NaN, infinities and repeated keys.

    Returns:
        A row for each statement. The claim follows if all of them hold.

    Raises:
        InvalidInputError: If it is no certificate of this format, or a number is out of bounds; nothing was computed.

    Guarantees:
        neighbouring relation, privacy unit: add or remove one record; a certificate of another is refused.
        sensitivity, public: those that the certificate lists; nothing but the certificate is read.
        theorem: if all rows hold and the listed mechanisms are what ran, under the listed assumptions, then the covered files
            are (ε, δ)-DP with the claim's numbers. Sources are those of the certificate's own mechanisms; ε of training is
            bounded twice, by privacy loss distributions and by Rényi divergences, which share no code but the event.
    """
    statement = read_statement(content)
    if not statement.holds:
        return (
            _row(
                "claim", "NOT PRIVATE", "nothing is certified", False, "The run's key is a public test key."
            ),
        )
    return tuple(_rows(statement))


def _rows(statement: Statement) -> Iterator[Row]:
    try:
        precision = _precision(statement)
    except DPFlashAttentionError as error:
        yield _row("exact noise", "possible", "impossible", False, str(error))
        return
    yield from _records(statement)
    bounds = _accounted(statement, precision)
    yield from _training(statement, bounds)
    if "pld" not in bounds:
        return
    if precision is not None:
        yield from _exact_noise(statement, precision)
    yield from _evaluation(statement)
    yield from _total(statement)
    yield _assumptions(statement)
    yield _everything_else(statement)


def _precision(statement: Statement) -> FinitePrecision | None:
    plan = statement.plan
    return finite_precision(
        plan["noise"],
        **{
            name: plan[name]
            for name in (
                "epsilon", "delta", "l2_clip_norm", "num_parameters", "num_steps", "noise_multiplier",
            )
        },
    )  # fmt: skip


def _records(statement: Statement) -> Iterator[Row]:
    plan, count = statement.plan, statement.count
    drawn_from = plan["expected_batch_size"] / plan["sampling_prob"]
    if count is not None:
        found = discrete_laplace_epsilon(scale=count.scale)
        yield _bound(
            "number of records: ε", count.epsilon, found, f"discrete Laplace noise of scale {count.scale:g}"
        )
        yield _row(
            "number of records",
            f"{count.released_count:,}",
            f"{drawn_from:,.6g}",
            math.isclose(count.released_count, drawn_from, rel_tol=_ROUNDING),
            "expected batch size / sampling probability",
        )
    records = plan["dataset_size"] or drawn_from
    yield _row(
        "δ",
        f"{statement.delta:g}",
        f"below {1.0 / records:.3g}",
        statement.delta * records < 1.0,
        "1 / number of records: publishing one record in full would satisfy a larger δ",
    )


def _accounted(statement: Statement, precision: FinitePrecision | None) -> dict[str, float]:
    plan = statement.plan
    multiplier = plan["noise_multiplier"] / (1.0 if precision is None else precision.sensitivity_factor)
    delta = plan["delta"] if precision is None else plan["delta"] - precision.delta
    numbers = (plan["sampling_prob"], multiplier, plan["num_steps"], delta)
    # What overflows is rounded up to infinity, and no claim is as large.
    with np.errstate(all="ignore"):
        renyi = cached_epsilon(*numbers, "rdp")
        if renyi > _HOPELESS * (plan["epsilon"] + 1.0):
            return {"rdp": renyi}
        return {"rdp": renyi, "pld": cached_epsilon(*numbers, "pld")}


def _training(statement: Statement, bounds: Mapping[str, float]) -> Iterator[Row]:
    plan, certified = statement.plan, statement.certified
    tight, renyi = bounds.get("pld", math.inf), bounds["rdp"]
    claim, how = plan["epsilon"], f"σ = {plan['noise_multiplier']:.6g}, q = {plan['sampling_prob']:.6g}, "
    how += f"{plan['num_steps']:,} steps, δ = {plan['delta']:g}"
    if "pld" not in bounds:
        yield _row("training: ε", f"{claim:.9g}", f"about {renyi:.4g}", False, f"{how}; by Rényi divergences")
        return
    yield _bound("training: ε", claim, tight, f"{how}; by privacy loss distributions")
    yield _same(
        "training: ε by PLD", certified["training_epsilon_by_pld"], tight, "privacy loss distributions"
    )
    stated = certified["training_epsilon_by_rdp_as_cross_check"]
    yield _same("training: ε by RDP", stated, renyi, "Rényi divergences, an upper bound of its own")
    yield _row(
        "training: PLD within RDP",
        f"{certified['training_epsilon_by_pld']:.9g}",
        f"at most {renyi * (1 + _GRID) + _GRID_ABSOLUTE:.9g}",
        max(tight, certified["training_epsilon_by_pld"]) <= renyi * (1 + _GRID) + _GRID_ABSOLUTE,
        "the tight bound exceeds the other by no more than its grid's width",
    )
    yield _same(
        "training: sensitivity", certified["l2_sensitivity_of_a_step"], plan["l2_clip_norm"], "the clip norm"
    )


def _exact_noise(statement: Statement, precision: FinitePrecision) -> Iterator[Row]:
    plan, stated = statement.plan, statement.certified["finite_precision"]
    for name, how in (
        ("grid", "a power of two, from the clip norm and the number of parameters"),
        ("stddev", "noise in steps of the grid"),
        ("sensitivity_factor", "rounding every coordinate moves the sum by at most grid · √P"),
        ("distance", "of all samples from rounded Gaussians"),
        ("advantage", "of all samples, if nothing beats key search on AES-256 (assumed)"),
        ("delta", "(1 + e^ε) · (distance + advantage)"),
    ):
        yield _same(
            f"exact noise: {name.replace('_', ' ')}", stated[name], getattr(precision, name), how, _ROUNDING
        )
    samples = plan["num_steps"] * plan["num_parameters"]
    found = samples * RoundedGaussian(precision.stddev).total_variation
    yield _row(
        "exact noise: sampler",
        f"distance {stated['distance']:.6g}",
        f"{found:.6g}",
        found <= stated["distance"],
        f"table built and certified anew, {samples:,} samples",
    )


def _evaluation(statement: Statement) -> Iterator[Row]:
    stated, listed = statement.evaluation, statement.evaluation_sensitivity
    if (stated is None) != (statement.holdout_prob == 0.0):
        yield _row(
            "evaluation",
            "none" if stated is None else "listed",
            f"hold-out {statement.holdout_prob:g}",
            False,
            "there is one if and only if there is a hold-out",
        )
    if stated is None or listed is None:
        return
    yield _same(
        "evaluation: sensitivity", listed, KINDS[stated.kind].l2_sensitivity, f"of kind {stated.kind!r}"
    )
    plan_noise = statement.plan["noise"]
    yield _row("evaluation: noise", stated.noise, plan_noise, stated.noise == plan_noise, "that of training")
    sensitivity = KINDS[stated.kind].l2_sensitivity
    try:
        precision = finite_precision(
            stated.noise,
            epsilon=stated.epsilon,
            delta=stated.delta,
            l2_clip_norm=sensitivity,
            num_parameters=stated.num_values if stated.noise == "exact" else None,
            num_steps=1,
            noise_multiplier=stated.noise_stddev / sensitivity,
        )
    except DPFlashAttentionError as error:
        yield _row("evaluation: δ", f"{stated.delta:g}", "impossible", False, str(error))
        return
    factor, lost = (1.0, 0.0) if precision is None else (precision.sensitivity_factor, precision.delta)
    found = lost + gdp_delta(mu=factor * sensitivity / stated.noise_stddev, epsilon=stated.epsilon)
    grid = "" if precision is None else f" on a grid of {precision.grid:g}, whose cost is in δ"
    yield _row(
        "evaluation: δ",
        f"{stated.delta:g} at ε = {stated.epsilon:.6g}",
        f"{found:.9g}",
        found <= stated.delta * (1.0 + _ROUNDING),
        f"one Gaussian release with σ = {stated.noise_stddev:.6g}{grid}, in closed form",
    )


def _total(statement: Statement) -> Iterator[Row]:
    count, evaluation = statement.count, statement.evaluation
    parts = [(statement.training_epsilon, statement.training_delta)]
    if count is not None:
        parts.append((count.epsilon, 0.0))
    on_training, delta = basic_composition(parts)
    total = on_training if evaluation is None else max(on_training, evaluation.epsilon)
    how = "ε of the training part added up"
    if evaluation is not None:
        how, delta = f"{how}; the larger of it and the hold-out's", max(delta, evaluation.delta)
    yield _same("total: ε", statement.epsilon, total, how, _ROUNDING)
    yield _same("total: δ", statement.delta, delta, "the larger of both parts", _ROUNDING)


def _assumptions(statement: Statement) -> Row:
    before, after = fixed_assumptions(statement.plan["noise"], count_is_public=statement.count is None)
    missing = [line for line in (*before, *after) if line not in statement.assumed]
    own = _public_statements(statement)
    remark = "each is for you to judge"
    if missing:
        remark = f"missing: {missing[0]}"
    elif not own:
        remark = "missing: what is public about the data"
    return Row(
        name="assumptions",
        stated=f"{len(statement.assumed)}",
        recomputed=f"{len(before) + len(after)} of such a run, and at least 1 of its data",
        holds=not missing and len(own) > 0,
        standing=Standing.ASSUMED,
        remark=remark,
    )


def _public_statements(statement: Statement) -> list[str]:
    before, after = fixed_assumptions(statement.plan["noise"], count_is_public=statement.count is None)
    return [line for line in statement.assumed if line not in (*before, *after)]


def _everything_else(statement: Statement) -> Row:
    """Puts the certificate together again; every sentence in it follows from its numbers."""
    name, content = "every other field", statement.content
    try:
        plan = PrivacyPlan(**statement.plan)
    except DPFlashAttentionError as error:
        return _row(name, "as a run writes it", "no such run", False, str(error))
    count = None
    if statement.count is not None:
        entry = content["mechanisms"][0]
        count = {key: entry[key] for key in entry if key not in ("name", "data")}
    again = build_certificate(
        plan=plan,
        count_release=count,
        holdout_prob=content["holdout_prob"],
        evaluation=statement.evaluation,
        total_epsilon=statement.epsilon,
        task=content["task"],
        public_statements=_public_statements(statement),
        hyper_parameters=content["hyper_parameters"],
        uses_test_key=False,
        files=content["files"],
        versions=content["versions"],
    ).to_dict()
    different = list(differences(content, again, ""))
    shown = ", ".join(different[:_SHOWN]) + (
        f" and {len(different) - _SHOWN} more" if different[_SHOWN:] else ""
    )
    return _row(
        name,
        "as a run writes it",
        "the same" if not different else f"{len(different)} differ",
        not different,
        shown or "every sentence follows from the numbers",
    )


def _bound(name: str, stated: float, found: float, how: str) -> Row:
    """A row of a bound: what is stated may be larger, never smaller."""
    holds = found <= stated * (1.0 + _ROUNDING)
    return _row(name, f"{stated:.9g}", f"at least {found:.9g}", holds, how)


def _same(name: str, stated: float, found: float, how: str, tolerance: float = SAME) -> Row:
    return _row(name, f"{stated:.9g}", f"{found:.9g}", math.isclose(stated, found, rel_tol=tolerance), how)


def _row(name: str, stated: str, recomputed: str, holds: bool, remark: str) -> Row:
    return Row(
        name=name,
        stated=stated,
        recomputed=recomputed,
        holds=holds,
        standing=Standing.CERTIFIED,
        remark=remark,
    )
