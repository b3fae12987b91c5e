"""The grid of ``exact`` attention noise, and what finite precision costs: sensitivity and δ.

Every output row has a grid of its own, γ = σ/k with one whole k for all rows of a call, so that on the rows' grids all noise has
one law: the rounded Gaussian of standard deviation k. docs/attention.md, Theorem 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from dp_flash_attention.attention.interface import AttentionNoise
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.noise.rounded_gaussian import RoundedGaussian, rounded_gaussian_distance

# What rounding may add to the sensitivity of a row, at most: a thousandth.
_ROUNDING_SHARE: Final = 2.0**-10
_MIN_LOG_STEPS, _MAX_LOG_STEPS = 20, 44
# Of one number, whatever k: ``grid_noise`` checks the sampler in use against it.
_LARGEST_DISTANCE: Final = rounded_gaussian_distance(2.0**_MIN_LOG_STEPS) + 2.0**-100
MAX_STEPS: Final = 2.0**46
"""Outputs beyond this many steps of their grid are cut off, which moves no two further apart. Quotients up to it are computed to
2^-7 of a step, and with the noise, below 2^50, all whole numbers stay exact in float64."""
_LARGEST_ANSWER: Final = MAX_STEPS / 2.0
_PAIR_ROUNDING: Final = 1.0 + 2.0**-6
_DELTA_SHARE: Final = 0.01
_KEY_BITS: Final = 256
_UPWARD: Final = 1.0 + 1e-12


@dataclass(frozen=True, kw_only=True)
class FinitePrecision:
    """What differs between a call with exact noise and the Gaussian mechanism of its μ. All of it is public.

    Attributes:
        steps: k, a power of two: σ of every row in steps of that row's grid γ = σ/k.
        rounding: What rounding adds to each row's sensitivity, over its σ: ``(1 + 2^-6)·√E/k``.
        distance: Bound of the total variation between the noise of all numbers of the call and rounded Gaussians.
        advantage: What an observer gains from the noise's bits being a cipher's, under the assumptions of
            ``quantum.generator_strength.generator_advantage``.
    """

    steps: int
    rounding: float
    distance: float
    advantage: float

    @property
    def total_distance(self) -> float:
        """η = distance + advantage; δ at ε rises by (1 + e^ε)·η."""
        return (self.distance + self.advantage) * _UPWARD


def plan_grid(*, num_numbers: int, value_width: int, smallest_row_mu: float) -> FinitePrecision:
    """Returns the grid of a call, from its shape and the least share that a row has of μ.

    Args:
        num_numbers: B·H·Q·E.
        value_width: E.
        smallest_row_mu: Least μ of a row.

    Raises:
        InvalidInputError: If the shares are so small that noise would leave the range of exact arithmetic.

    Guarantees:
        neighbouring relation, privacy unit: the call's.
        sensitivity: Δ + γ·√E·(1 + 2^-6) of each rounded row, if Δ is the row's.
        public: all arguments and results.
        theorem: Theorem 6. The grid depends on the plan alone, never on rows.
    """
    root = math.sqrt(value_width) * _PAIR_ROUNDING * _UPWARD
    log_steps = max(_MIN_LOG_STEPS, math.ceil(math.log2(root / (_ROUNDING_SHARE * smallest_row_mu))))
    if log_steps > _MAX_LOG_STEPS:
        raise InvalidInputError(
            "mu of an output row",
            smallest_row_mu,
            bound=f"at least {root / (_ROUNDING_SHARE * 2.0**_MAX_LOG_STEPS):.3g} for noise 'exact'",
            remedy="Ask fewer queries in one call, raise the budget, or use noise 'secure'.",
        )
    steps = 1 << log_steps
    return FinitePrecision(steps=steps, rounding=root / steps, **_distances(num_numbers))


def ideal_budget(budget: PrivacyBudget, *, num_numbers: int) -> PrivacyBudget:
    """Returns what is left of a call's budget for the Gaussian mechanism.

    Raises:
        InvalidInputError: If finite precision would take more than a hundredth of δ.
    """
    from dp_flash_attention.accounting.near_gdp import less_distance

    distance = sum(_distances(num_numbers).values()) * _UPWARD
    return less_distance(budget, distance=distance, largest_share=_DELTA_SHARE)


def check_range(precision: FinitePrecision, *, value_norm: float, smallest_stddev: float) -> None:
    """Checks that answers stay well inside the range of the grid.

    Raises:
        InvalidInputError: If not.
    """
    reach = value_norm / smallest_stddev * precision.steps if smallest_stddev > 0.0 else math.inf
    if not reach <= _LARGEST_ANSWER:
        raise InvalidInputError(
            "value_norm over the noise",
            reach / precision.steps,
            bound=f"at most {_LARGEST_ANSWER / precision.steps:.3g} for noise 'exact'",
            remedy="Use a smaller budget, or noise 'secure'.",
        )


def checked_steps(precision: FinitePrecision | None, noise: AttentionNoise) -> int | None:
    """Returns k of a plan for noise ``"exact"``, else None.

    Raises:
        InvalidInputError: If the plan was made for noise of another kind: its δ would not be that of the call.
    """
    if (noise == "exact") != (precision is not None):
        planned = "'secure' or 'fast'" if precision is None else "'exact'"
        raise InvalidInputError(
            "noise", noise, bound=f"{planned}, as planned", remedy="Plan with noise=noise.name."
        )
    return None if precision is None else precision.steps


@lru_cache(maxsize=16)
def grid_noise(steps: int) -> RoundedGaussian:
    """Returns the sampler of k, made once: it is public and holds no state but scratch."""
    noise = RoundedGaussian(float(steps))
    assert noise.total_variation <= _LARGEST_DISTANCE, "128-bit tables are within 2^-100"
    assert noise.largest < 2**50, "k is at most 2^44, and 2^6 deviations are more than the table holds"
    return noise


def _distances(num_numbers: int) -> dict[str, float]:
    from dp_flash_attention.quantum.generator_strength import generator_advantage

    return {
        "distance": num_numbers * _LARGEST_DISTANCE * _UPWARD,
        # It charges for more blocks than a chunk of 114,688 numbers reads.
        "advantage": generator_advantage(num_numbers, _KEY_BITS, "aes-256-ctr") * _UPWARD,
    }
