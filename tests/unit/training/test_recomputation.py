"""A certificate that does not follow from its own numbers is refused, whoever signed it."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_flash_attention.accounting import PoissonSampledGaussian, epsilon
from dp_flash_attention.clipping.clip_groups import ClipGroup
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import PrivacyPlan
from dp_flash_attention.training.cached_accountant import cached_epsilon
from dp_flash_attention.training.certificate import EvaluationStatement, build_certificate
from dp_flash_attention.training.certificate_rows import Standing
from dp_flash_attention.training.evaluation.terms import ReleaseTerms, release
from dp_flash_attention.training.recomputation import recompute

Content = dict[str, Any]
Mutation = Callable[[Content], None]
EPSILON_COUNT, DELTA = 0.02, 1e-5


def plan_of(noise: str = "secure") -> PrivacyPlan:
    exact = noise == "exact"
    found = epsilon(
        PoissonSampledGaussian(sampling_prob=0.05, noise_multiplier=1.0, num_steps=40), delta=DELTA
    )
    return PrivacyPlan(
        epsilon=found * (1.001 if exact else 1.00001),  # rounding to the grid costs a little
        delta=DELTA,
        sampling_prob=0.05,
        expected_batch_size=100.0,
        num_steps=40,
        l2_clip_norm=2.0,
        noise_multiplier=1.0,
        noise=noise,
        num_parameters=5000 if exact else None,
    )  # type: ignore[arg-type]


def built(plan: PrivacyPlan, *, evaluation: EvaluationStatement | None = None, **changes: Any) -> Content:
    total = EPSILON_COUNT + plan.epsilon
    if evaluation is None:
        # σ of the smallest ε below the total at this δ, as computed once by calibrate_noise_multiplier, rounded up.
        evaluation = EvaluationStatement(
            kind="binary",
            epsilon=total,
            delta=DELTA,
            noise=plan.noise,
            noise_stddev=2.2,
            num_values=128,
            estimates={"auc": 0.75},
        )
    values: dict[str, Any] = {
        "plan": plan,
        "count_release": {
            "mechanism": "discrete Laplace",
            "epsilon": EPSILON_COUNT,
            "scale": 1.0 / EPSILON_COUNT,
            "released_count": 2000,
        },
        "holdout_prob": 0.1,
        "evaluation": evaluation,
        "total_epsilon": total,
        "task": {"name": "a task", "classes": ["no", "yes"]},
        "public_statements": ["The columns are public."],
        "hyper_parameters": {"learning_rate": 0.1, "reasons": {}},
        "uses_test_key": False,
        "files": {"model.safetensors": {"sha256": "0" * 64, "size": 1}},
    }
    return build_certificate(**(values | changes)).to_dict()


@cache
def _original(noise: str) -> str:
    return json.dumps(built(plan_of(noise)))


def original(noise: str = "secure") -> Content:
    content: Content = json.loads(_original(noise))
    return content


def wrong_rows(content: object) -> list[str]:
    return [row.name for row in recompute(content) if not row.holds]


def part(content: Content, name: str) -> Content:
    found: Content = next(entry for entry in content["mechanisms"] if entry["name"] == name)
    return found


def at(*path: Any) -> Callable[[Callable[[Any], Any]], Mutation]:
    """Makes a mutation of one value; "training" and the like stand for an entry of the mechanisms."""

    def with_change(change: Callable[[Any], Any]) -> Mutation:
        def mutate(content: Content) -> None:
            target: Any = content
            for step in path[:-1]:
                target = (
                    part(content, step[1:]) if isinstance(step, str) and step[:1] == "*" else target[step]
                )
            target[path[-1]] = change(target[path[-1]])

        return mutate

    return with_change


def times(factor: float) -> Callable[[Any], Any]:
    return lambda value: value * factor


def to(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def drop(*path: Any) -> Mutation:
    def mutate(content: Content) -> None:
        target: Any = content
        for step in path[:-1]:
            target = part(content, step[1:]) if isinstance(step, str) and step[:1] == "*" else target[step]
        del target[path[-1]]

    return mutate


PLAN = ("*training", "parameters")
CLAIM_EPSILON, TRAINING_EPSILON = ("claim", "epsilon"), ("*training", "epsilon")
MUTATIONS: dict[str, Mutation] = {
    # Numbers that are a little wrong: found by computing.
    "claimed ε understated by 1 %": at("claim", "epsilon")(times(0.99)),
    "claimed ε overstated": at("claim", "epsilon")(times(1.01)),
    "listed ε of training understated by 1 %": at("*training", "epsilon")(times(0.99)),
    "planned ε of training understated by 1 %": at(*PLAN, "epsilon")(times(0.99)),
    "one step fewer": at(*PLAN, "num_steps")(to(39)),
    "one step more": at(*PLAN, "num_steps")(to(41)),
    "more noise than there was": at(*PLAN, "noise_multiplier")(times(1.001)),
    "less noise than there was": at(*PLAN, "noise_multiplier")(times(0.999)),
    "rarer sampling": at(*PLAN, "sampling_prob")(times(0.999)),
    "more frequent sampling": at(*PLAN, "sampling_prob")(times(1.001)),
    "other batch size": at(*PLAN, "expected_batch_size")(times(1.1)),
    "other clip norm": at(*PLAN, "l2_clip_norm")(times(0.5)),
    "other accountant": at(*PLAN, "accountant")(to("rdp")),
    "claimed δ smaller": at("claim", "delta")(times(0.1)),
    "claimed δ larger": at("claim", "delta")(times(10)),
    "planned δ smaller": at(*PLAN, "delta")(times(0.1)),
    "planned δ larger": at(*PLAN, "delta")(times(10)),
    "listed δ of training smaller": at("*training", "delta")(times(0.1)),
    "δ above 1 / records": at("claim", "delta")(to(0.01)),
    "certified ε by PLD understated by 1 %": at("certified", "training_epsilon_by_pld")(times(0.99)),
    "certified ε by RDP understated by 1 %": at("certified", "training_epsilon_by_rdp_as_cross_check")(times(0.99)),
    "certified sensitivity halved": at("certified", "l2_sensitivity_of_a_step")(times(0.5)),
    "ε of the count understated": at("*number of training records", "epsilon")(times(0.5)),
    "scale of the count's noise halved": at("*number of training records", "scale")(times(0.5)),
    "another count": at("*number of training records", "released_count")(to(2001)),
    "ε of the evaluation understated by 1 %": at("*evaluation", "epsilon")(times(0.99)),
    "ε of the evaluation overstated": at("*evaluation", "epsilon")(times(1.1)),
    "δ of the evaluation smaller": at("*evaluation", "delta")(times(0.1)),
    "noise of the evaluation halved": at("*evaluation", "noise_stddev")(times(0.5)),
    "sensitivity of the evaluation halved": at("*evaluation", "l2_sensitivity")(times(0.5)),
    "another noise of the evaluation": at("*evaluation", "noise")(to("fast")),
    "another kind of evaluation": at("*evaluation", "kind")(to("next token")),
    "no hold-out, and an evaluation": at("holdout_prob")(to(0.0)),
    "another share of the hold-out": at("holdout_prob")(to(0.2)),
    # Sentences and lists.
    "another statement": at("claim", "statement")(to("The covered files together are private.")),
    "more is covered": at("claim", "covers")(lambda names: [*names, "diagnostics/"]),
    "another theorem": at("*training", "guarantee", "theorem")(lambda text: text.replace("40", "4")),
    "another relation in the guarantee": at("*training", "guarantee", "neighboring_relation")(to("replace_one")),
    "an unknown statement in the guarantee": at("*training", "guarantee")(lambda g: {**g, "note": "trust me"}),
    "another composition": at("composition")(to("It adds up.")),
    "less is not covered": at("not_covered")(lambda lines: lines[:-1]),
    "no secrets": at("secrets")(to("")),
    "a missing assumption": at("assumed")(lambda lines: lines[1:]),
    "the last assumption is missing": at("assumed")(lambda lines: lines[:-1]),
    "nothing is said to be public of the data": at("assumed")(
        lambda lines: [line for line in lines if line != "The columns are public."]
    ),
    "an assumption reworded": at("assumed")(lambda lines: [lines[0].replace("unread", "safe"), *lines[1:]]),
    "assumptions in another order": at("assumed")(lambda lines: lines[::-1]),
    "an assumption twice": at("assumed")(lambda lines: [*lines, lines[0]]),
    "another kind of noise": at(*PLAN, "noise")(to("fast")),
    # Structure: refused before anything is computed.
    "claim of a run with a public key": at("claim", "holds")(to(False)),
    "claim that is a number": at("claim", "holds")(to(1)),
    "another relation": at("claim", "neighboring_relation")(to("replace_one")),
    "another unit": at("claim", "privacy_unit")(to("user")),
    "an older format": at("format")(to(1)),
    "a newer format": at("format")(to(3)),
    "a format that is no number": at("format")(to("2")),
    "no format": drop("format"),
    "no claim": drop("claim"),
    "no assumptions": drop("assumed"),
    "no parameters": drop("*training", "parameters"),
    "no noise multiplier": drop(*PLAN, "noise_multiplier"),
    "no RDP figure": drop("certified", "training_epsilon_by_rdp_as_cross_check"),
    "no model file": at("files")(to({})),
    "an extra field": lambda content: content.update(note="trust me"),
    "an extra field in the claim": at("claim")(lambda claim: {**claim, "note": "trust me"}),
    "an extra field in the plan": at(*PLAN)(lambda plan: {**plan, "note": 1}),
    "an extra field in what is certified": at("certified")(lambda fields: {**fields, "proof": "by authority"}),
    "finite precision without exact noise": at("certified")(lambda fields: {**fields, "finite_precision": {}}),
    "a mechanism twice": at("mechanisms")(lambda entries: [*entries, entries[1]]),
    "an unlisted mechanism": at("mechanisms")(lambda entries: [*entries, {**entries[1], "name": "more training"}]),
    "no training": at("mechanisms")(lambda entries: [entries[0], entries[2]]),
    "mechanisms that are none": at("mechanisms")(to("training")),
    "an evaluation that is left out": at("mechanisms")(lambda entries: entries[:2]),
    "estimates that are no numbers": at("estimated", "auc")(to("high")),
    "a digest that is none": at("files", "model.safetensors", "sha256")(to("abc")),
    "a certificate that is a list": lambda content: content.clear(),
}  # fmt: skip
ABSURD = {
    "NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf, "negative": -1.0, "zero": 0, "1e308": 1e308,
    "tiny": 1e-308, "huge whole": 10**308, "text": "1", "list": [1], "true": True, "null": None,
}  # fmt: skip
NUMBERS = {
    "ε": CLAIM_EPSILON, "δ": ("claim", "delta"), "ε of training": TRAINING_EPSILON, "steps": (*PLAN, "num_steps"),
    "σ": (*PLAN, "noise_multiplier"), "q": (*PLAN, "sampling_prob"), "planned ε": (*PLAN, "epsilon"),
    "planned δ": (*PLAN, "delta"), "B": (*PLAN, "expected_batch_size"), "C": (*PLAN, "l2_clip_norm"),
    "scale": ("*number of training records", "scale"), "count": ("*number of training records", "released_count"),
    "evaluation's σ": ("*evaluation", "noise_stddev"), "PLD": ("certified", "training_epsilon_by_pld"),
    "RDP": ("certified", "training_epsilon_by_rdp_as_cross_check"),
}  # fmt: skip
MUTATIONS |= {
    f"{what} is {how}": at(*path)(to(value)) for what, path in NUMBERS.items() for how, value in ABSURD.items()
}  # fmt: skip
EXACT_MUTATIONS: dict[str, Mutation] = {
    f"{name} {how}": at("certified", "finite_precision", name)(times(factor))
    for name in (
        "grid", "stddev", "sensitivity_factor", "distance", "advantage", "delta", "delta_of_the_accountant",
        "noise_multiplier_of_the_accountant",
    )
    for how, factor in (("halved", 0.5), ("doubled", 2.0))
}  # fmt: skip
EXACT_MUTATIONS |= {
    "other number of parameters": at(*PLAN, "num_parameters")(to(6000)),
    "number of parameters 10^12, too many for δ": at(*PLAN, "num_parameters")(to(10**12)),
    "no number of parameters": drop(*PLAN, "num_parameters"),
    "no grid": drop("certified", "finite_precision", "grid"),
    "noise that would be floats": at(*PLAN, "noise")(to("secure")),
    "the assumption of the cipher is missing": at("assumed")(
        lambda lines: [line for line in lines if "advantage" not in line]
    ),
    "noise too narrow for its grid": at(*PLAN, "noise_multiplier")(to(0.01)),
}


def refusal(content: object) -> str:
    """Returns why a certificate is refused; empty if it is not."""
    try:
        return ", ".join(wrong_rows(content))
    except InvalidInputError as error:
        return str(error)


@pytest.mark.parametrize("noise", ["secure", "exact", "fast"])
def test_an_unaltered_certificate_follows_from_its_numbers(noise: str) -> None:
    rows = recompute(original(noise))
    assert [row.name for row in rows if not row.holds] == []
    names = {row.name for row in rows}
    assert {
        "training: ε",
        "training: ε by RDP",
        "evaluation: δ",
        "total: ε",
        "total: δ",
        "assumptions",
    } <= names
    assert ("exact noise: sampler" in names) is (noise == "exact")
    assert {row.standing for row in rows} == {Standing.CERTIFIED, Standing.ASSUMED}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_an_altered_certificate_is_refused(mutation: str) -> None:
    content = original()
    MUTATIONS[mutation](content)
    assert json.dumps(content) != _original("secure")
    began = time.monotonic()
    said = refusal(content)
    assert said
    assert "\n" not in said
    assert len(said) < 1000
    # Not a judgement of speed: minutes or hours are what absurd numbers could cost.
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("mutation", EXACT_MUTATIONS)
def test_an_altered_certificate_of_exact_noise_is_refused(mutation: str) -> None:
    content = original("exact")
    EXACT_MUTATIONS[mutation](content)
    assert refusal(content)


def understated(plan: PrivacyPlan, **claims: float) -> PrivacyPlan:
    """A plan that claims what it should not; building one is what PrivacyPlan refuses."""
    lie = copy.copy(plan)
    for name, value in claims.items():
        object.__setattr__(lie, name, value)
    return lie


def test_a_liar_who_makes_all_sentences_agree_is_found_by_the_number_alone() -> None:
    """ε understated by 1 % in every field and sentence: nothing contradicts it but the accountant."""
    plan = plan_of()
    lie = built(understated(plan, epsilon=0.99 * plan.epsilon))
    assert "training: ε" in wrong_rows(lie)
    certified = lie["certified"]
    certified["training_epsilon_by_pld"] *= 0.99
    assert "training: ε" in wrong_rows(lie)


def test_a_liar_who_claims_less_than_the_parts_add_up_to_is_found() -> None:
    plan = plan_of()
    assert wrong_rows(built(plan, total_epsilon=0.99 * (plan.epsilon + EPSILON_COUNT))) == ["total: ε"]


def test_a_liar_about_the_evaluation_alone_is_found() -> None:
    plan = plan_of()
    entry = EvaluationStatement(
        kind="confusion",
        epsilon=EPSILON_COUNT + plan.epsilon,
        delta=DELTA,
        noise="secure",
        noise_stddev=2.2,
        num_values=9,
        estimates={},
    )
    assert wrong_rows(built(plan, evaluation=entry)) == []
    assert wrong_rows(built(plan, evaluation=replace(entry, noise_stddev=1.2))) == ["evaluation: δ"]
    # The sums of a language model move by √2, so the same noise protects less.
    assert wrong_rows(built(plan, evaluation=replace(entry, kind="next token", noise_stddev=1.8))) == [
        "evaluation: δ"
    ]


def test_the_larger_part_decides_the_total() -> None:
    plan = plan_of()
    entry = EvaluationStatement(
        kind="binary",
        epsilon=9.0,
        delta=DELTA,
        noise="secure",
        noise_stddev=5.0,
        num_values=128,
        estimates={},
    )
    assert wrong_rows(built(plan, evaluation=entry, total_epsilon=9.0)) == []
    assert wrong_rows(built(plan, evaluation=entry)) == ["total: ε"]


def test_a_public_number_of_records_needs_its_assumption() -> None:
    plan = plan_of()
    content = built(plan, count_release=None, total_epsilon=plan.epsilon, holdout_prob=0.0, evaluation=None)
    part(content, "evaluation")
    content["mechanisms"].pop()
    content["estimated"] = {}
    assert wrong_rows(content) == []
    content["assumed"] = [line for line in content["assumed"] if "number of records is public" not in line]
    assert wrong_rows(content) == ["assumptions", "every other field"]


def test_a_run_with_a_test_key_certifies_nothing() -> None:
    assert wrong_rows(built(plan_of(), uses_test_key=True)) == ["claim"]


def test_a_claim_far_below_the_truth_is_refused_before_the_tight_bound_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With σ = 0.02 the tight bound's distribution could take all memory."""
    asked: list[str] = []

    def watched(*arguments: Any) -> float:
        asked.append(arguments[-1])
        return cached_epsilon(*arguments)

    monkeypatch.setattr("dp_flash_attention.training.recomputation.cached_epsilon", watched)
    content = original()
    part(content, "training")["parameters"] |= {"noise_multiplier": 0.02, "num_steps": 1_000_000}
    assert wrong_rows(content) == ["training: ε"]
    assert asked == ["rdp"]


@pytest.mark.parametrize("name", ["certificate_format_2.json", "certificate_format_2_exact.json"])
def test_certificates_of_this_format_stay_valid(name: str) -> None:
    """Written by `dpfa train`. If this fails, the format has changed and needs another number."""
    content = json.loads((Path(__file__).with_name(name)).read_text(encoding="utf-8"))
    assert wrong_rows(content) == []


GROUPS = (
    ClipGroup(name="first", parameters=("a", "b"), weight=3.0),
    ClipGroup(name="last", parameters=("c",)),
)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_clipping_in_groups_is_recomputed_and_cannot_be_restated(
    groups: tuple[ClipGroup, ...] | None,
) -> None:
    plan = replace(plan_of(), clipping="per_layer", clip_groups=groups)
    content = json.loads(json.dumps(built(plan)))
    assert wrong_rows(content) == []
    restated = copy.deepcopy(content)
    restated["certified"]["clipping"] = "flat"
    assert wrong_rows(restated) == ["every other field"]
    part(restated, "training")["parameters"]["clipping"] = "flat"
    if groups is None:
        assert wrong_rows(restated) == ["every other field"]
        return
    with pytest.raises(InvalidInputError, match="clipping"):
        recompute(restated)
    for wrong in ([], {}, [{"name": "first"}], [{"name": "a", "parameters": ["a"], "weight": -1.0}]):
        part(content, "training")["parameters"]["clip_groups"] = wrong
        with pytest.raises(InvalidInputError, match="clip_groups"):
            recompute(content)


def test_exact_noise_of_the_evaluation_pays_for_its_grid() -> None:
    plan = plan_of("exact")
    total = EPSILON_COUNT + plan.epsilon
    terms = ReleaseTerms(epsilon=total, delta=DELTA, key=TestKey("evaluation"), noise="exact")
    noise_stddev = release(torch.zeros(128, dtype=torch.float64), l2_sensitivity=1.0, terms=terms)
    entry = EvaluationStatement(
        kind="binary",
        epsilon=total,
        delta=DELTA,
        noise="exact",
        noise_stddev=noise_stddev,
        num_values=128,
        estimates={},
    )
    assert wrong_rows(built(plan, evaluation=entry)) == []
    assert wrong_rows(built(plan, evaluation=replace(entry, noise_stddev=0.99 * noise_stddev))) == [
        "evaluation: δ"
    ]
    assert wrong_rows(built(plan, evaluation=replace(entry, noise="secure"))) == ["evaluation: noise"]
    assert wrong_rows(built(plan, evaluation=replace(entry, num_values=10**13))) == ["evaluation: δ"]
