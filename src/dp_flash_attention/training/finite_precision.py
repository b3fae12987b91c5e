"""The grid of ``exact`` training noise, and what finite precision costs: sensitivity and δ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.noise.rounded_gaussian import rounded_gaussian_distance
from dp_flash_attention.quantum.generator_strength import generator_advantage

TrainingNoise = Literal["secure", "fast", "exact"]
"""``secure`` and ``fast`` are float32 normals; ``exact`` is whole numbers on a public grid."""

# Rounding P coordinates adds γ√P to the sensitivity: at most a thousandth, and 6e-5 at a million parameters.
_ROUNDING_SHARE = 2.0**-10
# With C/γ at least 2^24, σ = 1/16 still makes noise of 2^20 steps, whose law is within 3e-27 of the one accounted for.
_STEPS_PER_CLIP_NORM = 2.0**24
MIN_STDDEV = 2.0**20
"""Least standard deviation of the noise, in steps of the grid."""
MAX_SAMPLER_DISTANCE = 2.0**-100
"""Certified distance of one sample of the sampler from its law, at most; ``step_noise`` checks it."""
_DELTA_SHARE = 0.01
_KEY_BITS = 256


@dataclass(frozen=True, kw_only=True)
class FinitePrecision:
    """What differs between exact noise and the Gaussian mechanism of the accountant. All of it is public.

    Attributes:
        grid: γ, a power of two: what sums are rounded to multiples of.
        stddev: s = σC/γ, the noise's standard deviation in steps of the grid.
        sensitivity_factor: (C + γ√P)/C, rounded up.
        distance: Bound of the total variation, over all steps and coordinates, between the noise's law and rounded
            Gaussians.
        advantage: What an observer gains over all steps from the noise's bits being a cipher's, under the assumptions of
            ``generator_advantage``.
        delta: (1 + e^ε)·(distance + advantage), taken from the plan's δ before the rest is accounted.
    """

    grid: float
    stddev: float
    sensitivity_factor: float
    distance: float
    advantage: float
    delta: float

    @property
    def statement(self) -> str:
        """What a guarantee says about it, after the sensitivity of the sum."""
        return (
            f"; {self.sensitivity_factor:.9g} times that after rounding to multiples of {self.grid:g}. Finite precision "
            f"takes {self.delta:.2g} of delta"
        )


def finite_precision(
    noise: TrainingNoise,
    *,
    epsilon: float,
    delta: float,
    l2_clip_norm: float,
    num_parameters: object,
    num_steps: int,
    noise_multiplier: float | None = None,
) -> FinitePrecision | None:
    """Returns the grid of a plan and its cost, which do not depend on the amount of noise; None unless it is exact.

    Args:
        noise: The plan's noise. The analysis of ``secure`` and ``fast`` is one of real numbers.
        epsilon: The plan's ε.
        delta: The plan's δ.
        l2_clip_norm: C.
        num_parameters: P, the number of trainable coordinates; public. None unless noise is exact.
        num_steps: T.
        noise_multiplier: σ; None while it is being searched for.

    Raises:
        InvalidInputError: If P is missing, or given and of no use, the cost is not far below δ, or the noise is too
            narrow for the grid.

    Guarantees:
        neighbouring relation: add or remove one record.
        privacy unit: one record.
        sensitivity: C + γ√P of the rounded sum: rounding moves each of P coordinates by at most γ/2, in each of the two sums.
        public: all arguments and results.
        theorem: rounded Gaussian noise on rounded sums is post-processing of Gaussian noise on them
            (``noise.rounded_gaussian``), so that the Poisson-subsampled Gaussian mechanism of multiplier
            σC/(C + γ√P) is what runs. Replacing real by ideal noise on both neighbours costs (1 + e^ε) times the distance.
    """
    if noise != "exact":
        if num_parameters is not None:
            raise InvalidInputError(
                "num_parameters",
                num_parameters,
                bound=f"None for noise {noise!r}, which does not depend on it",
                remedy="Leave it out.",
            )
        return None
    dimension = positive_int(
        "num_parameters",
        num_parameters,
        remedy="Count the trainable coordinates: noise 'exact' is planned for a number of them.",
    )
    root = math.sqrt(dimension)
    steps_per_norm = max(root / _ROUNDING_SHARE, _STEPS_PER_CLIP_NORM)
    grid = math.ldexp(1.0, math.frexp(l2_clip_norm / steps_per_norm)[1] - 1)
    if not 2.0**-500 < grid < 2.0**500:
        raise InvalidInputError(
            "l2_clip_norm",
            l2_clip_norm,
            bound="between 2^-450 and 2^450 for noise 'exact'",
            remedy="Use 0.1 to 10.",
        )
    distance = (
        num_steps * dimension * (rounded_gaussian_distance(MIN_STDDEV) + MAX_SAMPLER_DISTANCE) * (1.0 + 1e-12)
    )
    # For 114,688 numbers the sampler reads at most 16·(1,216 + 8,192) + 98,304 + 131,072 blocks, a seventeenth of what is
    # charged; for a group of fewer, less than is charged for one tile.
    advantage = num_steps * generator_advantage(dimension, _KEY_BITS, "aes-256-ctr") * (1.0 + 1e-12)
    cost = (1.0 + math.exp(min(epsilon, 700.0))) * (distance + advantage) * (1.0 + 1e-12)
    if cost > _DELTA_SHARE * delta:
        raise InvalidInputError(
            "delta",
            delta,
            bound=f"at least {cost / _DELTA_SHARE:.3g}, a hundred times what finite precision of {dimension} "
            f"coordinates and {num_steps} steps costs at epsilon {epsilon:g}",
            remedy="Raise delta, lower epsilon, or use noise 'secure'.",
        )
    stddev = math.inf if noise_multiplier is None else noise_multiplier * l2_clip_norm / grid
    if stddev < MIN_STDDEV:
        raise InvalidInputError(
            "noise_multiplier",
            noise_multiplier,
            bound=f"at least {MIN_STDDEV * grid / l2_clip_norm:.3g} for noise 'exact', or its grid is too coarse",
            remedy="Use more noise, or noise 'secure'.",
        )
    return FinitePrecision(
        grid=grid,
        stddev=stddev,
        # 1e-14 also covers the rounding of ``stddev`` and of the quotients that the accountant is given.
        sensitivity_factor=(1.0 + grid * root / l2_clip_norm) * (1.0 + 1e-14),
        distance=distance,
        advantage=advantage,
        delta=cost,
    )


def multiplier_on_grid(sought: float, precision: FinitePrecision | None) -> float:
    """Returns the σ, over C, that leaves ``sought`` over C + γ√P, rounded up; ``sought`` itself without a grid."""
    return sought if precision is None else sought * precision.sensitivity_factor * (1.0 + 1e-14)
