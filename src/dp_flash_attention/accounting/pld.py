"""Certified ε and δ from privacy loss distributions, through Google's dp_accounting.

Every approximation errs upward: the loss is discretised pessimistically ("connect the dots", Doroshenko et
al. 2022), truncated tails count as infinite loss, and the floating-point error of the Fourier transforms is
charged to δ. The grid depends on a single step alone, never on the number of steps, so one base distribution
serves a whole schedule and ε cannot fall as steps are added.
"""

from __future__ import annotations

import math
from functools import lru_cache

from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from dp_accounting.privacy_accountant import NeighboringRelation as LibraryRelation

from dp_flash_attention.accounting.events import PoissonSampledGaussian, PrivacyEvent
from dp_flash_attention.accounting.rdp import gaussian_mu, rdp_epsilon, unsampled_epsilon
from dp_flash_attention.core.privacy import NeighboringRelation

# Grid points over the range of one step's loss. 20,000 keep ε within 0.1 % of a grid ten times finer for
# (q, σ, steps) = (0.01, 1.1, 1k), (0.012, 0.8, 3k), (0.001, 0.6, 10k), at 0.1 s for the base distribution.
GRID_POINTS = 20_000
# Five times faster and at most 1 % looser there; for searches and progress, where a larger ε will do.
COARSE_GRID_POINTS = 4_000
# Where q is so small that a cell would be wider than a third of one step's standard deviation, ε would be
# visibly overstated ((1e-5, 1, 1M): 0.10 for 0.045). Up to five times as many points then cost up to 1 s.
_MAX_REFINEMENT = 5
# The library clips probabilities that rounding made negative, which adds about 2.5e-17 · range / width² of
# mass to every step. It is pessimistic, but a million steps would compound it; this keeps it below 1e-8.
_WIDTH_PER_ROOT_RANGE = 5e-5
# The Fourier error in any tail sum, measured against 80-bit arithmetic for 500 to 1,000,000 steps, stays
# below 1.3e-16 per step; eight times that is charged, and 1e-13 for everything else.
_FOURIER_ERROR_PER_STEP = 1e-15
_ROUNDING_ERROR = 1e-13
# Noise can only be cut off where the loss is that improbable (e^-50 per step); the library's own bound.
_TAIL_DEVIATIONS = 10.0

_LIBRARY_RELATION = {
    NeighboringRelation.ADD_OR_REMOVE_ONE: LibraryRelation.ADD_OR_REMOVE_ONE,
    NeighboringRelation.REPLACE_ONE: LibraryRelation.REPLACE_ONE,
}


def pld_epsilon(events: tuple[PrivacyEvent, ...], delta: float, *, grid_points: int = GRID_POINTS) -> float:
    """Returns a certified upper bound of ε at ``delta``; infinite if none can be given.

    Fewer ``grid_points`` are faster and looser, never lower than the true ε.
    """
    # A δ this small drowns in the transforms' rounding. Rényi DP has no such floor.
    if delta <= 2.0 * _rounding_error(events):
        return _analytic_epsilon(events, delta)
    composed, slack = _compose(events, grid_points)
    if delta <= 2.0 * slack:
        return _analytic_epsilon(events, delta)
    return max(0.0, float(composed.get_epsilon_for_delta(delta - slack)))


def pld_delta(events: tuple[PrivacyEvent, ...], epsilon: float) -> float:
    """Returns a certified upper bound of δ at ``epsilon``."""
    composed, slack = _compose(events, GRID_POINTS)
    return min(1.0, max(0.0, float(composed.get_delta_for_epsilon(epsilon))) + slack)


def _analytic_epsilon(events: tuple[PrivacyEvent, ...], delta: float) -> float:
    if any(
        isinstance(event, PoissonSampledGaussian)
        and event.neighboring_relation is NeighboringRelation.REPLACE_ONE
        for event in events
    ):
        return unsampled_epsilon(events, delta)
    return rdp_epsilon(events, delta)


def _compose(events: tuple[PrivacyEvent, ...], grid_points: int) -> tuple[PrivacyLossDistribution, float]:
    """Returns the composed distribution and the δ to charge for floating-point error."""
    sampled = [e for e in events if isinstance(e, PoissonSampledGaussian) and e.sampling_prob < 1.0]
    unsampled = [e for e in events if not (isinstance(e, PoissonSampledGaussian) and e.sampling_prob < 1.0)]
    # (kind of step, how often): all releases without sampling are together one Gaussian, exactly.
    parts = [((e.sampling_prob, e.noise_multiplier, e.neighboring_relation), e.num_steps) for e in sampled]
    if unsampled:
        mu = math.hypot(*(gaussian_mu(event) for event in unsampled))
        parts.append(((1.0, 1.0 / mu, NeighboringRelation.ADD_OR_REMOVE_ONE), 1))

    interval = _common_interval([step for step, _ in parts], grid_points)
    composed: PrivacyLossDistribution | None = None
    for step, count in parts:
        one = _base(*step, interval)
        part = one if count == 1 else one.self_compose(count)
        composed = part if composed is None else composed.compose(part)
    assert composed is not None, "as_events() refuses an empty sequence"
    # At ε = −∞ the hockey-stick divergence is the total mass; what rounding lost of it could be loss.
    lost_mass = max(0.0, 1.0 - float(composed.get_delta_for_epsilon(-1e300)))
    return composed, _rounding_error(events) + lost_mass


def _rounding_error(events: tuple[PrivacyEvent, ...]) -> float:
    num_steps = sum(event.num_steps for event in events if isinstance(event, PoissonSampledGaussian))
    return _ROUNDING_ERROR + _FOURIER_ERROR_PER_STEP * (num_steps + len(events))


def _common_interval(steps: list[tuple[float, float, NeighboringRelation]], grid_points: int) -> float:
    finest = min(_interval(*step, grid_points) for step in steps)
    widest_range = max(_loss_range(*step) for step in steps)
    return max(finest, widest_range / (_MAX_REFINEMENT * grid_points))


def _interval(
    sampling_prob: float, noise_multiplier: float, relation: NeighboringRelation, grid_points: int
) -> float:
    loss_range = _loss_range(sampling_prob, noise_multiplier, relation)
    deviation = _loss_deviation(sampling_prob, noise_multiplier, relation)
    interval = loss_range / grid_points
    if interval > deviation / 3.0:
        interval = max(deviation / 3.0, interval / _MAX_REFINEMENT)
    if sampling_prob < 1.0:
        interval = max(interval, _WIDTH_PER_ROOT_RANGE * math.sqrt(loss_range))
    # A step whose loss is nearly Gaussian needs no finer cells than a fiftieth of its deviation, and
    # composing many such steps gets cheap.
    return max(interval, min(deviation / 50.0, loss_range / 2_000.0))


def _loss_range(sampling_prob: float, noise_multiplier: float, relation: NeighboringRelation) -> float:
    shift = 2.0 if relation is NeighboringRelation.REPLACE_ONE else 1.0
    unsampled = shift * (shift / (2.0 * noise_multiplier**2) + _TAIL_DEVIATIONS / noise_multiplier)
    if sampling_prob == 1.0:
        return 2.0 * unsampled
    if unsampled > 700.0:  # exp would overflow; the mixture only subtracts log(1 / q) here
        return unsampled
    return math.log1p(sampling_prob * math.expm1(unsampled))


def _loss_deviation(sampling_prob: float, noise_multiplier: float, relation: NeighboringRelation) -> float:
    shift = 2.0 if relation is NeighboringRelation.REPLACE_ONE else 1.0
    if sampling_prob == 1.0:
        return shift / noise_multiplier
    # The square root of the χ² divergence between one step's outputs; the loss's deviation where it is small.
    exponent = min(600.0, 1.0 / noise_multiplier**2)
    return shift * sampling_prob * math.sqrt(math.expm1(exponent))


@lru_cache(maxsize=16)
def _base(
    sampling_prob: float, noise_multiplier: float, relation: NeighboringRelation, interval: float
) -> PrivacyLossDistribution:
    return from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=sampling_prob,
        value_discretization_interval=interval,
        neighboring_relation=_LIBRARY_RELATION[relation],
    )
