import math

import numpy as np
import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum.attackers import (
    average_answers,
    doubling_powers,
    estimate_amplitude,
    flag_probabilities,
    mechanism_oracle,
)

NOISE = np.arange(-64, 65)
LAW = np.exp(-0.5 * (NOISE / 8.0) ** 2)
TRUE = 100.0


def naive():
    return mechanism_oracle(TRUE + NOISE, LAW, low=20.0, high=200.0)


def memoised(noise):
    return mechanism_oracle([TRUE + noise], [1.0], low=20.0, high=200.0)


def test_the_state_vector_turns_as_grover_says():
    oracle = naive()
    assert np.sum(oracle.state**2) == pytest.approx(1.0)
    a = float(np.sum(oracle.state[:, 1] ** 2))
    theta, powers = math.asin(math.sqrt(a)), [0, 1, 2, 3, 10, 100]
    expected = [math.sin((2 * m + 1) * theta) ** 2 for m in powers]
    assert flag_probabilities(oracle, powers) == pytest.approx(expected, abs=1e-12)
    assert oracle.answer(a) == pytest.approx(TRUE)


def root_mean_square(oracle, rounds, rng, repeats=40):
    found = [
        estimate_amplitude(oracle, powers=doubling_powers(rounds), shots=30, rng=rng) for _ in range(repeats)
    ]
    errors = [estimate.answer - TRUE for estimate in found]
    return math.sqrt(np.mean(np.square(errors))), found[0].num_calls


def test_against_fresh_noise_the_error_falls_as_one_over_the_calls(rng):
    errors, calls = zip(*(root_mean_square(naive(), rounds, rng) for rounds in (4, 6, 8, 10)), strict=True)
    slope = np.polyfit(np.log(calls), np.log(errors), 1)[0]
    assert -1.2 < slope < -0.85
    assert errors[-1] < 0.05


def test_classical_averaging_has_half_that_slope_and_the_test_tells_them_apart(rng):
    calls = [500, 2000, 8000, 32000]
    errors = [
        math.sqrt(
            np.mean([(average_answers(naive(), num_calls=q, rng=rng).answer - TRUE) ** 2 for _ in range(200)])
        )
        for q in calls
    ]
    slope = np.polyfit(np.log(calls), np.log(errors), 1)[0]
    assert -0.65 < slope < -0.35


def test_against_memoised_noise_repeats_find_the_answer_and_never_the_value(rng):
    for noise in (-11.0, 3.0, 9.0):
        estimates = [
            estimate_amplitude(memoised(noise), powers=doubling_powers(10), shots=30, rng=rng).answer
            for _ in range(5)
        ]
        assert np.abs(np.array(estimates) - (TRUE + noise)).max() < 0.5
        assert np.abs(np.array(estimates) - TRUE).min() > abs(noise) - 0.5
        # Classical repeats show the very same number.
        assert average_answers(memoised(noise), num_calls=1000, rng=rng).answer == pytest.approx(TRUE + noise)


def test_superposing_distinct_queries_finds_their_mean_which_is_what_was_paid_for(rng):
    noises = rng.normal(0, 8, 64)
    oracle = mechanism_oracle(TRUE + noises, np.ones(64), low=20.0, high=200.0)
    found = estimate_amplitude(oracle, powers=doubling_powers(10), shots=30, rng=rng).answer
    assert found == pytest.approx(TRUE + noises.mean(), abs=0.3)


def test_calls_are_counted_as_two_powers_and_one_each():
    assert doubling_powers(5) == (0, 1, 2, 4, 8)
    found = estimate_amplitude(naive(), powers=(0, 1, 2), shots=10, rng=np.random.default_rng(0))
    assert found.num_calls == 10 * (1 + 3 + 5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mechanism_oracle([1.0], [1.0, 2.0], low=0, high=2),
        lambda: mechanism_oracle([3.0], [1.0], low=0, high=2),
        lambda: mechanism_oracle([1.0], [0.0], low=0, high=2),
        lambda: mechanism_oracle([1.0], [-1.0], low=0, high=2),
        lambda: flag_probabilities(naive(), [2, 1]),
        lambda: estimate_amplitude(naive(), powers=[0], shots=0, rng=np.random.default_rng(0)),
        lambda: average_answers(naive(), num_calls=0, rng=np.random.default_rng(0)),
        lambda: doubling_powers(0),
    ],
)
def test_arguments_out_of_range_are_refused(call):
    with pytest.raises(InvalidInputError):
        call()
