"""The reverse questions: which noise, how many steps, which sampling probability fit a budget.

Each answer is the side of a search that satisfies the budget, checked with the same accountant that will
certify the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dp_flash_attention.accounting.accountant import Accountant
from dp_flash_attention.accounting.accountant import epsilon as accounting_epsilon
from dp_flash_attention.accounting.events import PoissonSampledGaussian
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget

# ε of the answer lies within this share of the target. Smaller costs evaluations and buys no accuracy that a
# model could notice.
_RELATIVE_TOLERANCE = 5e-4
_MAX_EVALUATIONS = 60
_MIN_NOISE_MULTIPLIER = 0.05
_MAX_NOISE_MULTIPLIER = 1e9
_MAX_STEPS = 1_000_000
_MIN_SAMPLING_PROB = 1e-9

_EpsilonOf = Callable[[float], float]


def calibrate_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sampling_prob: float,
    num_steps: int,
    accountant: Accountant = "pld",
) -> float:
    """Returns the smallest noise multiplier (to 0.05 % of ε) that keeps a run within (ε, δ).

    Args:
        epsilon: Target ε.
        delta: Target δ.
        sampling_prob: Probability with which each unit enters a step.
        num_steps: Number of steps.
        accountant: ``"pld"`` (tight) or ``"rdp"``.

    Returns:
        Noise standard deviation over clip norm, unitless; at least 0.05.

    Raises:
        InvalidInputError: If a value lies outside its range, or no noise multiplier up to 1e9 suffices.

    Guarantees:
        The ε that ``accounting.epsilon`` computes for the result, with add/remove neighbours and the same
        accountant, is at most ``epsilon``. Not only approximately: that value was computed and compared.

    Example:
        >>> round(calibrate_noise_multiplier(epsilon=1.0, delta=1e-5, sampling_prob=0.01, num_steps=1), 3)
        0.674
    """
    budget = PrivacyBudget(epsilon=epsilon, delta=delta)

    def search(epsilon_of: _EpsilonOf, *, guess: float, tolerance: float) -> float | None:
        bounds = (_MIN_NOISE_MULTIPLIER, _MAX_NOISE_MULTIPLIER)
        return _feasible_boundary(
            epsilon_of, budget.epsilon, guess=guess, bounds=bounds, safe_side=1, tolerance=tolerance
        )

    def event(noise_multiplier: float) -> PoissonSampledGaussian:
        return PoissonSampledGaussian(
            sampling_prob=sampling_prob, noise_multiplier=noise_multiplier, num_steps=num_steps
        )

    def rdp(sigma: float) -> float:
        return accounting_epsilon(event(sigma), delta=budget.delta, accountant="rdp")

    def coarse(sigma: float) -> float:
        return pld_epsilon((event(sigma),), budget.delta, grid_points=COARSE_GRID_POINTS)

    def certified(sigma: float) -> float:
        return accounting_epsilon(event(sigma), delta=budget.delta)

    if accountant == "rdp":
        result = search(rdp, guess=1.0, tolerance=_RELATIVE_TOLERANCE)
    else:
        # Each search starts where the cheaper one before it ended; only the last one certifies.
        from dp_flash_attention.accounting.pld import COARSE_GRID_POINTS, pld_epsilon

        guess = search(rdp, guess=1.0, tolerance=0.05) or 1.0
        guess = search(coarse, guess=0.95 * guess, tolerance=0.005) or guess
        result = search(certified, guess=guess, tolerance=_RELATIVE_TOLERANCE)
    if result is None:
        raise InvalidInputError(
            "epsilon",
            epsilon,
            bound=f"reachable at delta={delta} with {num_steps} steps and sampling_prob={sampling_prob}",
            remedy="Raise epsilon or delta, or take fewer steps.",
        )
    return result


def max_steps(*, epsilon: float, delta: float, sampling_prob: float, noise_multiplier: float) -> int:
    """Returns the largest number of steps that stays within (ε, δ).

    Returns:
        A count from 0 (not even one step fits) to 1,000,000 (where the search stops); exact below 10,000, and
        above it at most 0.01 % too small.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        ``accounting.epsilon`` of the returned number of steps, with add/remove neighbours, is at most
        ``epsilon``.
    """
    budget = PrivacyBudget(epsilon=epsilon, delta=delta)

    def log_gap(num_steps: int) -> float:
        event = PoissonSampledGaussian(
            sampling_prob=sampling_prob, noise_multiplier=noise_multiplier, num_steps=num_steps
        )
        return _log_gap(accounting_epsilon(event, delta=budget.delta), budget.epsilon)

    good, good_gap = 1, log_gap(1)
    if good_gap > 0.0:
        return 0
    bad, bad_gap = 4, log_gap(4)
    while bad_gap <= 0.0:
        good, good_gap = bad, bad_gap
        if good >= _MAX_STEPS:
            return _MAX_STEPS
        bad = min(4 * good, _MAX_STEPS)
        bad_gap = log_gap(bad)
    turn = 0
    while bad - good > max(1, good // 10_000):
        turn += 1
        # ε grows nearly as a power of the count: interpolate on logarithms, and bisect every third time.
        share = (
            good_gap / (good_gap - bad_gap)
            if turn % 3 and math.isfinite(bad_gap) and good_gap > -20.0
            else 0.5
        )
        probe = min(max(round(good * (bad / good) ** share), good + 1), bad - 1)
        gap = log_gap(probe)
        if gap <= 0.0:
            good, good_gap = probe, gap
        else:
            bad, bad_gap = probe, gap
    return good


def max_sampling_prob(*, epsilon: float, delta: float, noise_multiplier: float, num_steps: int) -> float:
    """Returns the largest sampling probability (to 0.05 % of ε) that keeps a run within (ε, δ).

    Returns:
        A probability in (0, 1]; times the number of records it is the expected batch size.

    Raises:
        InvalidInputError: If a value lies outside its range, or no probability down to 1e-9 suffices.

    Guarantees:
        ``accounting.epsilon`` at the result, with add/remove neighbours, is at most ``epsilon``.
    """
    budget = PrivacyBudget(epsilon=epsilon, delta=delta)

    def epsilon_of(sampling_prob: float) -> float:
        event = PoissonSampledGaussian(
            sampling_prob=sampling_prob, noise_multiplier=noise_multiplier, num_steps=num_steps
        )
        return accounting_epsilon(event, delta=budget.delta)

    if epsilon_of(1.0) <= budget.epsilon:
        return 1.0
    result = _feasible_boundary(
        epsilon_of,
        budget.epsilon,
        guess=0.01,
        bounds=(_MIN_SAMPLING_PROB, 1.0),
        safe_side=-1,
        tolerance=_RELATIVE_TOLERANCE,
    )
    if result is None:
        raise InvalidInputError(
            "epsilon",
            epsilon,
            bound=f"reachable at delta={delta} with {num_steps} steps of noise multiplier {noise_multiplier}",
            remedy="Raise the noise multiplier, epsilon or delta, or take fewer steps.",
        )
    return result


def _log_gap(value: float, target: float) -> float:
    return math.log(max(value, 1e-300) / target) if math.isfinite(value) else math.inf


def _feasible_boundary(
    epsilon_of: _EpsilonOf,
    target: float,
    *,
    guess: float,
    bounds: tuple[float, float],
    safe_side: int,
    tolerance: float,
) -> float | None:
    """Finds x at the edge of {x : epsilon_of(x) <= target}, always from inside it.

    ε falls with x if ``safe_side`` is 1 and rises if it is -1. Works on (log x, log ε), where both relations
    are nearly straight lines: brackets the edge, then takes false-position steps, with a bisection whenever
    the same end has moved twice.

    Returns:
        A point whose ε was computed and found to be at most ``target``, or None if there is none in bounds.
    """
    low, high = (math.log(bound) for bound in bounds)
    safe: tuple[float, float] | None = None
    unsafe: tuple[float, float] | None = None
    x, stride, same_end = math.log(guess), 0.0, 0
    for _ in range(_MAX_EVALUATIONS):
        gap = _log_gap(epsilon_of(min(max(math.exp(x), bounds[0]), bounds[1])), target)
        moved = 1 if gap <= 0.0 else -1
        same_end = same_end + moved if same_end * moved >= 0 else moved
        if gap <= 0.0:
            safe = (x, gap)
        else:
            unsafe = (x, gap)
        if safe is not None and safe[1] > -tolerance:
            break
        if safe is None or unsafe is None:
            direction = safe_side if safe is None else -safe_side
            if x == (high if direction > 0 else low):
                break
            # ε goes with a power of x that is rarely below 2: half the gap usually crosses the edge.
            stride = max(2.0 * stride, min(0.5 * abs(gap), 1.0), tolerance)
            x = min(max(x + direction * stride, low), high)
            same_end = 0
        elif abs(safe[0] - unsafe[0]) < 1e-9:  # the discretised ε jumps here; the safe side is the answer
            break
        else:
            x = _next_probe(safe, unsafe, tolerance, bisect=abs(same_end) >= 2)
            same_end = 0 if abs(same_end) >= 2 else same_end
    return None if safe is None else min(max(math.exp(safe[0]), bounds[0]), bounds[1])


def _next_probe(
    safe: tuple[float, float], unsafe: tuple[float, float], tolerance: float, *, bisect: bool
) -> float:
    (x_safe, gap_safe), (x_unsafe, gap_unsafe) = safe, unsafe
    if bisect or not math.isfinite(gap_unsafe) or gap_safe < -20.0:
        return 0.5 * (x_safe + x_unsafe)
    # Aim inside the tolerance band on the safe side, so that the step that lands also ends the search.
    share = (-0.5 * tolerance - gap_safe) / (gap_unsafe - gap_safe)
    return x_safe + min(max(share, 0.001), 0.999) * (x_unsafe - x_safe)
