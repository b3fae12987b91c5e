"""Simulated quantum attackers: maximum-likelihood amplitude estimation against a mechanism's oracle.

No quantum computer is needed: the registers are small, so the state vector is computed exactly, and only the
final measurements are drawn. An *oracle* is the unitary an attacker would be given,

    A|0⟩ = Σ_r √p_r |r⟩ (√(1−y_r)|0⟩ + √y_r|1⟩),

where r runs over what the mechanism may answer and y_r ∈ [0, 1] is that answer, scaled. The probability of
measuring 1 is a = Σ p_r·y_r = sin²θ: the mean of the answers. With Q = −A S₀ A⁻¹ S_χ (Grover), Qᵐ A|0⟩ shows 1 with
probability sin²((2m+1)θ), at the price of 2m+1 calls of A. Brassard, Høyer, Mosca & Tapp 2002; Suzuki et al. 2020.

- Against a mechanism that draws fresh noise *inside* the oracle, p_r is the law of the noise, so a is the true value:
  q calls find it to about 1/q, where q separate answers would give 1/√q.
- Against memoised noise the oracle has one r. Amplitude estimation then finds the memoised answer, very well, and
  the true value never better than that one answer shows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int

Amplitudes = npt.NDArray[np.float64]
_MAX_STATES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """The state A|0⟩ of a mechanism, and how to read an amplitude as an answer.

    Attributes:
        state: Amplitudes, float64 [answers, 2]; the last axis is the flag.
        low: The answer that is scaled to 0.
        high: The answer that is scaled to 1.
    """

    state: Amplitudes
    low: float
    high: float

    def answer(self, probability: float) -> float:
        """Returns the answer whose scaled value is ``probability``."""
        return self.low + (self.high - self.low) * probability


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an attacker found, and how many calls of the oracle it took."""

    answer: float
    num_calls: int


def mechanism_oracle(
    answers: Sequence[float] | npt.NDArray[np.float64],
    probabilities: Sequence[float] | npt.NDArray[np.float64],
    *,
    low: float,
    high: float,
) -> Oracle:
    """Returns the oracle of a mechanism that gives ``answers[r]`` with ``probabilities[r]``.

    Args:
        answers: Everything it may answer, each within [low, high].
        probabilities: Their law; summed to 1 here. A single answer is a memoised mechanism.
        low: Public lower end of the scale.
        high: Public upper end.

    Raises:
        InvalidInputError: If an answer lies outside the scale or the law is none.
    """
    values = np.asarray(answers, dtype=np.float64)
    law = np.asarray(probabilities, dtype=np.float64)
    if values.ndim != 1 or values.shape != law.shape or not 0 < values.size <= _MAX_STATES:
        raise InvalidInputError(
            "answers", values.shape, bound="a vector as long as probabilities", remedy="Pair them up."
        )
    if not (low < high and values.min() >= low and values.max() <= high):
        raise InvalidInputError(
            "answers", "outside", bound=f"within [{low}, {high}]", remedy="Widen the scale."
        )
    if law.min() < 0.0 or not 0.0 < law.sum() < math.inf:
        raise InvalidInputError("probabilities", "no law", bound="at least 0", remedy="Pass a law.")
    scaled = (values - low) / (high - low)
    weight = law / law.sum()
    state = np.stack([np.sqrt(weight * (1.0 - scaled)), np.sqrt(weight * scaled)], axis=1)
    return Oracle(state=state, low=low, high=high)


def flag_probabilities(oracle: Oracle, powers: Sequence[int]) -> npt.NDArray[np.float64]:
    """Returns the probability of measuring the flag as 1 after each Grover power, by evolving the state vector.

    Args:
        oracle: What is called.
        powers: Numbers m of Grover iterations, not decreasing.

    Raises:
        InvalidInputError: If ``powers`` decreases or is negative.
    """
    if any(m < 0 for m in powers) or any(a > b for a, b in pairwise(powers)):
        raise InvalidInputError("powers", list(powers), bound="not decreasing, from 0", remedy="Sort them.")
    start = oracle.state
    state, done, found = start.copy(), 0, []
    for m in powers:
        for _ in range(m - done):
            state[:, 1] *= -1.0  # S_χ: the marked half changes its sign
            state = 2.0 * float(np.vdot(start, state)) * start - state  # −A S₀ A⁻¹: reflects about A|0⟩
        done = m
        found.append(float(np.sum(state[:, 1] ** 2)))
    clipped: npt.NDArray[np.float64] = np.clip(np.array(found, dtype=np.float64), 0.0, 1.0)
    return clipped


def doubling_powers(num_rounds: int) -> tuple[int, ...]:
    """Returns 0, 1, 2, 4, …, the exponential schedule of Suzuki et al. 2020, section 3.2."""
    rounds = positive_int("num_rounds", num_rounds, remedy="Use 1 to 12 rounds.")
    return (0, *(1 << k for k in range(rounds - 1)))


def estimate_amplitude(
    oracle: Oracle, *, powers: Sequence[int], shots: int, rng: np.random.Generator
) -> Estimate:
    """Runs maximum-likelihood amplitude estimation once.

    Args:
        oracle: What is called.
        powers: Grover powers, not decreasing.
        shots: Measurements per power.
        rng: Draws the measurements; an attacker's own dice, no noise of the library.

    Returns:
        The answer of greatest likelihood, and Σ shots·(2m+1) calls.

    Raises:
        InvalidInputError: If an argument is out of range.
    """
    count = positive_int("shots", shots, remedy="Measure at least once per power.")
    hits = rng.binomial(count, flag_probabilities(oracle, powers))
    odd = np.array([2 * m + 1 for m in powers], dtype=np.float64)

    def log_likelihood(theta: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        total = np.zeros_like(theta)
        for turns, ones in zip(odd, hits, strict=True):
            sine = np.clip(np.sin(turns * theta) ** 2, 1e-300, 1.0)
            cosine = np.clip(np.cos(turns * theta) ** 2, 1e-300, 1.0)
            total += ones * np.log(sine) + (count - ones) * np.log(cosine)
        return total

    # The likelihood ripples with period π / (2m+1): forty points per ripple cannot miss the highest one.
    points = int(40 * odd.max()) + 400
    low, high = 0.0, math.pi / 2.0
    for _ in range(4):
        theta = np.linspace(low, high, points)
        best = int(np.argmax(log_likelihood(theta)))
        low, high = float(theta[max(0, best - 1)]), float(theta[min(points - 1, best + 1)])
        points = 401
    angle = 0.5 * (low + high)
    return Estimate(answer=oracle.answer(math.sin(angle) ** 2), num_calls=int(count * odd.sum()))


def average_answers(oracle: Oracle, *, num_calls: int, rng: np.random.Generator) -> Estimate:
    """The classical attacker: calls ``num_calls`` times, measures each answer, takes the mean.

    Raises:
        InvalidInputError: If ``num_calls`` is not a whole number above 0.
    """
    count = positive_int("num_calls", num_calls, remedy="Call at least once.")
    law = np.sum(oracle.state**2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.where(law > 0.0, oracle.state[:, 1] ** 2 / law, 0.0)
    drawn = rng.multinomial(count, law / law.sum())
    return Estimate(answer=oracle.answer(float(drawn @ scaled) / count), num_calls=count)
