"""The accountant's answers, kept for the plans that ask again."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from dp_flash_attention.accounting import Accountant, PoissonSampledGaussian, epsilon_schedule
from dp_flash_attention.accounting import epsilon as accounted_epsilon_of
from dp_flash_attention.core.privacy import NeighboringRelation


# A distribution of many steps takes up to a second; plans are copied, reloaded and asked again.
@lru_cache(maxsize=256)
def cached_epsilon(
    sampling_prob: float, noise_multiplier: float, num_steps: int, delta: float, accountant: Accountant
) -> float:
    """Returns ε of Poisson-sampled Gaussian releases under add-or-remove; see ``accounting.epsilon``."""
    event = PoissonSampledGaussian(
        sampling_prob=sampling_prob,
        noise_multiplier=noise_multiplier,
        num_steps=num_steps,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
    return accounted_epsilon_of(event, delta=delta, accountant=accountant)


@lru_cache(maxsize=16)
def cached_schedule(
    sampling_prob: float, noise_multiplier: float, num_steps: int, delta: float
) -> Callable[[int], float]:
    """Returns a cheap upper bound of ε after k steps."""
    return epsilon_schedule(
        sampling_prob=sampling_prob, noise_multiplier=noise_multiplier, num_steps=num_steps, delta=delta
    )
