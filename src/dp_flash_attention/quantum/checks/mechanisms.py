"""Checks of the mechanisms: their δ by independent code, their noise by its scale, memo and closeness by trying.

Statistical checks draw fresh secret keys, so each has a false-alarm rate: 1e-9 for every row, over all its statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dp_flash_attention.accounting import discrete_gaussian_delta
from dp_flash_attention.core.errors import NoiseReuseError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import SecretKey, TestKey
from dp_flash_attention.quantum.amplitude_estimation_resistant import AmplitudeEstimationResistant
from dp_flash_attention.quantum.attackers import doubling_powers, estimate_amplitude, mechanism_oracle
from dp_flash_attention.quantum.charges import ConcentratedBudget
from dp_flash_attention.quantum.evidence import Evidence, NamedCheck
from dp_flash_attention.quantum.lattice import lattice_from_rows
from dp_flash_attention.quantum.post_quantum_gaussian import PostQuantumGaussian
from dp_flash_attention.quantum.rational_sampler import RationalCoins
from dp_flash_attention.quantum.scale_evidence import FALSE_ALARM, mean_square_bounds, scale_row, sensitivity

_BUDGET: Final = PrivacyBudget(epsilon=1.0, delta=1e-6)
_PRICE: Final = PrivacyBudget(epsilon=0.5, delta=1e-7)
_ONE: Final = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
_NUM_QUERIES: Final = 30
_LATTICE_ROWS: Final = [[2, 0], [1, 2]]
# Both axes and both diagonals: their mean squares are all the second moments, the mixed one included.
_DIRECTIONS: Final = np.array(
    [[1.0, 0.0], [0.0, 1.0], [math.sqrt(0.5), math.sqrt(0.5)], [math.sqrt(0.5), -math.sqrt(0.5)]]
)


def mechanisms_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Whether to draw ten times as many numbers.
    """
    times = 10 if deep else 1
    return [
        ("δ against dp_accounting and brute force", delta_by_independent_code),
        ("rounding is in the sensitivity", rounding_is_accounted),
        ("clipping bounds the sum", clipping_bounds_the_sum),
        ("broken records", broken_records),
        ("scale of the noise", partial(noise_scale, 200_000 * times)),
        ("memoised answers", memo),
        ("Klein's sampler", partial(klein, 12_000 * times)),
        ("amplitude estimation", amplitude_estimation),
    ]


def delta_by_independent_code() -> Iterator[Evidence]:
    """Yields how far δ is from dp_accounting's in one dimension, and from a sum over the plane in two."""
    from dp_accounting.pld.privacy_loss_mechanism import DiscreteGaussianPrivacyLoss

    ratios = []
    for sigma, shift, epsilon in ((1.0, 1, 1.0), (4.0, 1, 1.0), (30.0, 7, 0.5), (2.0, 3, 5.0)):
        theirs = DiscreteGaussianPrivacyLoss(sigma, sensitivity=shift).get_delta_for_epsilon(epsilon)
        ratios.append(
            discrete_gaussian_delta(epsilon=epsilon, sigma=sigma, l2_sensitivity=shift) / theirs - 1.0
        )
    yield Evidence(
        name="PostQuantumGaussian: δ of one coordinate",
        claim="δ equals that of Google's dp_accounting and is not below it.",
        measured=f"relative excess {min(ratios):.1e} to {max(ratios):.1e}",
        bound="-1e-12 to 1e-6",
        holds=min(ratios) >= -1e-12 and max(ratios) <= 1e-6,
        basis="computed",
    )
    excess = []
    for sigma, vector, epsilon in (
        (1.5, (1, 1), 1.0),
        (2.0, (2, 1), 0.1),
        (3.0, (3, 4), 1.0),
        (2.5, (2, 2), 3.0),
    ):
        true = _delta_on_the_plane(epsilon, sigma, vector)
        bound = discrete_gaussian_delta(
            epsilon=epsilon, sigma=sigma, l2_sensitivity=math.hypot(*vector), dimension=2
        )
        excess.append(bound / true)
    yield Evidence(
        name="PostQuantumGaussian: δ of vectors",
        claim="The certified δ is never below the true one, summed over the plane.",
        measured=f"bound over truth {min(excess):.3f} to {max(excess):.3f}",
        bound="at least 1",
        holds=min(excess) >= 1.0,
        basis="computed",
    )


def rounding_is_accounted() -> Iterator[Evidence]:
    """Yields how far the worst pair for rounding is moved, with the same noise, over what is accounted."""
    dimension, grid = 1024, 2.0**-8
    step = 2 * grid + 2e-12
    apart = Sensitivity(
        l2=step * math.sqrt(dimension) * (1 + 1e-9), neighboring_relation=_ONE.neighboring_relation
    )
    base = np.full(dimension, 0.5 * grid - 1e-12)

    def release(value: npt.NDArray[np.float64]) -> Any:
        return PostQuantumGaussian(key=TestKey("rounding"), grid=grid).release(value, apart, _BUDGET).value

    moved = float(np.linalg.norm(release(base + step) - release(base)))
    plan = PostQuantumGaussian(grid=grid).plan(dimension=dimension, sensitivity=apart, budget=_BUDGET)
    accounted = plan.grid_sensitivity * plan.grid
    yield Evidence(
        name="PostQuantumGaussian: rounding",
        claim="The worst two values for rounding end no further apart than the sensitivity that is charged.",
        measured=f"{moved:.6g}, for a pair that was {apart.l2:.6g} apart",
        bound=f"at most {accounted:.6g}",
        holds=moved <= accounted,
        basis="computed",
    )


def clipping_bounds_the_sum() -> Iterator[Evidence]:
    """Yields how far one huge row moves a sum, with the same noise, over what is accounted."""
    rows = np.zeros((4, 300))
    rows[3] = 1e6

    def release(value: npt.NDArray[np.float64]) -> Any:
        return (
            PostQuantumGaussian(key=TestKey("clipping"), grid=2.0**-12).release_sum(value, 1.0, _BUDGET).value
        )

    moved = float(np.linalg.norm(release(rows) - release(rows[:3])))
    accounted = 1.0 + 2.0**-12 * math.sqrt(300)
    yield Evidence(
        name="PostQuantumGaussian: clipping",
        claim="Adding one row of norm 1.7e7 moves the clipped sum by no more than the sensitivity that is charged.",
        measured=f"{moved:.6g}",
        bound=f"at most {accounted:.6g}",
        holds=moved <= accounted * (1 + 1e-9),
        basis="computed",
    )


def broken_records() -> Iterator[Evidence]:
    """Yields whether records of NaN and infinities raise, and how far the worst of them moves a sum."""
    rows = np.zeros((4, 300))
    rows[:3] = np.linspace(-1.0, 1.0, 300)

    def release(value: npt.NDArray[np.float64]) -> Any:
        return (
            PostQuantumGaussian(key=TestKey("broken"), grid=2.0**-12).release_sum(value, 1.0, _BUDGET).value
        )

    without, moved = release(rows[:3]), []
    for content in (np.nan, np.inf, -np.inf, 1e300):
        rows[3, ::2], rows[3, 1::2] = content, -content
        moved.append(float(np.linalg.norm(release(rows) - without)))
    accounted = 1.0 + 2.0**-12 * math.sqrt(300)
    yield Evidence(
        name="PostQuantumGaussian: broken records",
        claim="A record of NaN, infinities or huge numbers raises no error, which would show that it is there, and moves the "
        "sum by no more than the sensitivity that is charged.",
        measured=f"{len(moved)} released; the sum moves by {max(moved):.6g} at most",
        bound=f"4, at most {accounted:.6g}",
        holds=len(moved) == 4 and max(moved) <= accounted * (1 + 1e-9),
        basis="computed",
    )


def noise_scale(num: int) -> Iterator[Evidence]:
    """Yields the variance of released zeros, for whole numbers and for a fine grid."""
    for label, value in (("whole numbers", np.zeros(num, dtype=np.int64)), ("fine grid", np.zeros(num))):
        found = PostQuantumGaussian().release(value, sensitivity(64.0), _BUDGET)
        yield scale_row(f"PostQuantumGaussian: noise, {label}", np.asarray(found.value), found.noise_stddev)


def memo() -> Iterator[Evidence]:
    """Yields whether repeats repeat, versions and epochs do not, and changed data are refused."""
    key = SecretKey.from_os()

    def mechanism(version: str = "v1", epoch: int = 0) -> AmplitudeEstimationResistant:
        charges = ConcentratedBudget(PrivacyBudget(epsilon=20.0, delta=1e-6))
        return AmplitudeEstimationResistant(key=key, charges=charges, data_version=version, epoch=epoch)

    def ask(asked: AmplitudeEstimationResistant, query: object, value: float) -> float:
        return float(asked.answer(query, lambda: value, sensitivity=_ONE, budget=_PRICE).value)

    book = ConcentratedBudget(PrivacyBudget(epsilon=20.0, delta=1e-6))
    one = AmplitudeEstimationResistant(key=key, charges=book, data_version="v1")
    first = ask(one, "q", 40.0)
    price = book.spent_rho
    repeats = {ask(one, "q", 40.0) for _ in range(20)} | {ask(mechanism(), "q", 40.0)}
    yield Evidence(
        name="AmplitudeEstimationResistant: repeats",
        claim="A repeat, also after a restart with the same key, has the same bytes and costs nothing.",
        measured=f"{len(repeats | {first})} answer(s) to 22 calls, repeats cost rho = {book.spent_rho - price:g}",
        bound="1 answer, 0",
        holds=repeats == {first} and book.spent_rho == price > 0,
        basis="computed",
    )
    # Two independent answers differ by exactly 3, or are equal, with probability below 2e-3; 6 of 30: below 1e-10.
    changes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("data versions", {"version": "v2"}),
        ("epochs", {"epoch": 1}),
    )
    for what, changed in changes:
        same = sum(
            ask(mechanism(**changed), i, 43.0) - ask(mechanism(), i, 40.0) == 3.0
            or ask(mechanism(**changed), i, 40.0) == ask(mechanism(), i, 40.0)
            for i in range(_NUM_QUERIES)
        )
        yield Evidence(
            name=f"AmplitudeEstimationResistant: {what}",
            claim=f"Answers of two {what} share no noise: they show neither the values' difference nor their equality.",
            measured=f"{same} of {_NUM_QUERIES} queries show it",
            bound=f"fewer than 6 (false alarm below {FALSE_ALARM:g})",
            holds=same < 6,
        )
    try:
        ask(one, "q", 41.0)
        refused = False
    except NoiseReuseError:
        refused = True
    yield Evidence(
        name="AmplitudeEstimationResistant: changed data",
        claim="A query whose true answer changed under one data version is refused.",
        measured="refused" if refused else "answered",
        bound="refused",
        holds=refused,
        basis="computed",
    )


def klein(num: int) -> Iterator[Evidence]:
    """Yields the mean squares of Klein's sampler on a skewed basis, along four directions and together, against χ².

    On a round law of variance v the sum of squares along a unit vector is v times χ² with one degree of freedom a point,
    and that of both coordinates v times χ² with two. At 12,000 points a variance that is 10 % too small is missed once in
    10^7 runs and one that is 10 % too large twice in 10^5, by the χ² of both coordinates alone.
    """
    lattice, variance = lattice_from_rows(_LATTICE_ROWS), Fraction(64)
    coins = RationalCoins(SecretKey.from_os())
    zero = (Fraction(0),) * lattice.dimension
    points = np.array(
        [[float(x) for x in lattice.point(lattice.klein(zero, variance, coins))] for _ in range(num)]
    ) / math.sqrt(variance)
    squares = (points @ _DIRECTIONS.T) ** 2
    means = [*squares.mean(axis=0), squares[:, :2].sum() / (2 * num)]
    degrees = [num] * len(_DIRECTIONS) + [2 * num]
    bounds = [mean_square_bounds(each, FALSE_ALARM / len(degrees)) for each in degrees]
    yield Evidence(
        name="LatticeGaussian: Klein's sampler",
        claim="Noise on a skewed lattice is round and has the stated scale.",
        measured=f"variance {min(means):.4f} to {max(means):.4f} of the stated one along {len(_DIRECTIONS)} directions, "
        f"{means[-1]:.4f} in all ({num} points)",
        bound=f"{bounds[0][0]:.4f} to {bounds[0][1]:.4f}; in all {bounds[-1][0]:.4f} to {bounds[-1][1]:.4f} "
        f"(false alarm {FALSE_ALARM:g})",
        holds=all(low <= mean <= high for mean, (low, high) in zip(means, bounds, strict=True)),
    )


def amplitude_estimation() -> Iterator[Evidence]:
    """Yields what a simulated quantum attacker learns from fresh and from memoised noise."""
    rng = np.random.default_rng()
    noise, value = np.arange(-64, 65), 100.0
    law: npt.NDArray[np.float64] = np.exp(-0.5 * (noise / 8.0) ** 2).astype(np.float64)
    fresh = mechanism_oracle((value + noise).tolist(), law.tolist(), low=20.0, high=200.0)
    charges = ConcentratedBudget(PrivacyBudget(epsilon=20.0, delta=1e-6))
    memoised = AmplitudeEstimationResistant(key=SecretKey.from_os(), charges=charges, data_version="v1")

    def answer() -> float:
        return float(memoised.answer("q", lambda: value, sensitivity=_ONE, budget=_PRICE).value)

    once = answer()
    kept = mechanism_oracle([answer() for _ in range(16)], [1.0] * 16, low=20.0, high=200.0)
    powers = doubling_powers(10)

    def error(oracle: Any, target: float) -> float:
        found = [estimate_amplitude(oracle, powers=powers, shots=50, rng=rng).answer for _ in range(9)]
        return float(np.median(np.abs(np.array(found) - target)))

    against_fresh, against_memo = error(fresh, value), error(kept, once)
    # At 51,650 calls the error's deviation is about 0.02 of the scale; the median of nine never reaches 0.2.
    yield Evidence(
        name="amplitude estimation: fresh noise",
        claim="Coherent calls of a mechanism that draws fresh noise find the true value: the threat is real.",
        measured=f"median error {against_fresh:.3f}, where one answer's noise is 8",
        bound="at most 0.2 (false alarm below 1e-9)",
        holds=against_fresh <= 0.2,
    )
    yield Evidence(
        name="amplitude estimation: memoised noise",
        claim="Coherent calls of the memoised mechanism find its one answer, and so nothing that was not paid for.",
        measured=f"median distance {against_memo:.3f} from the answer, which is {abs(once - value):.3f} off the value",
        bound="at most 0.2 from the answer (false alarm below 1e-9)",
        holds=against_memo <= 0.2,
    )


def _delta_on_the_plane(epsilon: float, sigma: float, vector: tuple[int, int]) -> float:
    reach = math.ceil(12 * sigma)
    line = np.arange(-reach, reach + 1)
    mass = np.exp(-0.5 * (line / sigma) ** 2)
    mass /= mass.sum()
    loss = [(v * v + 2.0 * v * line) / (2.0 * sigma**2) for v in vector]
    joint = loss[0][:, None] + loss[1][None, :]
    return float(np.sum(mass[:, None] * mass[None, :] * np.maximum(0.0, -np.expm1(epsilon - joint))))
