"""Checks that the noise that is planned meets its budget, by sums over the law itself: no theorem of ``accounting``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import TestKey
from dp_flash_attention.quantum.evidence import Evidence, NamedCheck
from dp_flash_attention.quantum.layered_noise import LayeredNoise
from dp_flash_attention.quantum.layered_plan import NoiseLaw
from dp_flash_attention.quantum.post_quantum_gaussian import PostQuantumGaussian

_BUDGETS: Final = (PrivacyBudget(epsilon=1.0, delta=1e-6), PrivacyBudget(epsilon=0.25, delta=1e-9))
_RELATION: Final = NeighboringRelation.ADD_OR_REMOVE_ONE
_HONEST: Final = 3
# Sums of doubles over at most 10^5 numbers.
_ROUNDING: Final = 1e-9

Law = npt.NDArray[Any]


def plans_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Without effect: the sums are exact.
    """
    return [
        ("planned noise of one mechanism", gaussian_plans),
        ("planned noise of several parties", layered_plans),
    ]


def gaussian_plans() -> Iterator[Evidence]:
    """Yields δ of planned releases, by dp_accounting: whole numbers, and a float on a fine grid."""
    from dp_accounting.pld.privacy_loss_mechanism import DiscreteGaussianPrivacyLoss

    for budget in _BUDGETS:
        for what, whole, l2 in (("a count", True, 1.0), ("seven counts", True, 7.0), ("a float", False, 0.3)):
            plan = PostQuantumGaussian(key=TestKey("plans")).plan(
                dimension=1,
                sensitivity=Sensitivity(l2=l2, neighboring_relation=_RELATION),
                budget=budget,
                whole=whole,
            )
            # Two values l2 apart are rounded to whole numbers at most this far apart.
            shift = math.floor(l2 / plan.grid) + (0 if whole else 1)
            law = DiscreteGaussianPrivacyLoss(math.sqrt(plan.variance), sensitivity=shift)
            yield _kept(
                f"PostQuantumGaussian: plan for {what}", law.get_delta_for_epsilon(budget.epsilon), budget
            )


def layered_plans() -> Iterator[Evidence]:
    """Yields δ of the fewest honest shares, for one coordinate, from the law of their sum."""
    laws: tuple[NoiseLaw, ...] = ("skellam", "discrete_gaussian")
    for budget in _BUDGETS:
        for law in laws:
            plan = LayeredNoise(num_parties=5, num_honest=_HONEST, law=law).plan(
                dimension=1, sensitivity=Sensitivity(l2=1.0, neighboring_relation=_RELATION), budget=budget
            )
            share = float(plan.share_variance)
            summed = _skellam(_HONEST * share) if law == "skellam" else _summed_gaussian(share)
            shift = math.floor(1.0 / plan.grid) + 1
            found = _hockey_stick(summed, shift, budget.epsilon)
            yield _kept(f"LayeredNoise: plan, {law.replace('_', ' ')}", found, budget)


def _skellam(variance: float) -> Law:
    from scipy.special import ive

    reach = math.ceil(12 * math.sqrt(variance)) + 20
    law: Law = ive(np.abs(np.arange(-reach, reach + 1)), variance)
    return law


def _summed_gaussian(share: float) -> Law:
    reach = math.ceil(12 * math.sqrt(share)) + 20
    one = np.exp(-0.5 * np.arange(-reach, reach + 1) ** 2 / share)
    one /= one.sum()
    total: Law = one
    for _ in range(_HONEST - 1):
        total = np.convolve(total, one)
    return total


def _hockey_stick(law: Law, shift: int, epsilon: float) -> float:
    """Σ max(0, P(x - shift) - e^ε·P(x)); both laws are symmetric, so the other direction is the same."""
    moved, kept = np.concatenate([np.zeros(shift), law]), np.concatenate([law, np.zeros(shift)])
    return float(np.maximum(0.0, moved - math.exp(epsilon) * kept).sum())


def _kept(name: str, delta: float, budget: PrivacyBudget) -> Evidence:
    return Evidence(
        name=f"{name}, ε = {budget.epsilon:g}",
        claim="Noise as planned keeps to the budget that was asked for, summed over its law.",
        measured=f"δ = {delta:.6g}",
        bound=f"above 0, at most {budget.delta:g}",
        holds=0.0 < delta <= budget.delta * (1.0 + _ROUNDING),
        basis="computed",
    )
