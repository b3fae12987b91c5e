import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_flash_attention.accounting import (
    PoissonSampledGaussian,
    calibrate_noise_multiplier,
    epsilon,
    max_sampling_prob,
    max_steps,
)
from dp_flash_attention.accounting.calibration import _feasible_boundary
from dp_flash_attention.core.errors import InvalidInputError


def spent(sampling_prob, noise_multiplier, num_steps, delta, accountant="pld"):
    event = PoissonSampledGaussian(
        sampling_prob=sampling_prob, noise_multiplier=noise_multiplier, num_steps=num_steps
    )
    return epsilon(event, delta=delta, accountant=accountant)


@pytest.mark.parametrize(
    ("target", "delta", "q", "steps"),
    [
        (1.0, 1e-6, 0.0123, 150),
        (8.0, 1e-5, 0.01, 3000),
        (0.1, 1e-8, 0.02, 1000),
        (3.0, 1e-6, 1.0, 1),
        (1e-3, 1e-9, 1.0, 1000),
        (100.0, 1e-6, 0.01, 100),
    ],
)
def test_the_result_satisfies_the_budget_and_hardly_wastes_any(target, delta, q, steps):
    sigma = calibrate_noise_multiplier(epsilon=target, delta=delta, sampling_prob=q, num_steps=steps)
    assert 0.999 * target <= spent(q, sigma, steps, delta) <= target
    # a little less noise is too little: the answer is the edge, not merely somewhere inside
    assert spent(q, sigma * 0.995, steps, delta) > target


@settings(max_examples=5)
@given(
    target=st.floats(0.05, 20.0),
    log_delta=st.floats(-9, -4),
    q=st.floats(1e-3, 1.0),
    steps=st.integers(1, 500),
)
def test_the_round_trip_never_exceeds_the_target(target, log_delta, q, steps):
    sigma = calibrate_noise_multiplier(epsilon=target, delta=10**log_delta, sampling_prob=q, num_steps=steps)
    assert spent(q, sigma, steps, 10**log_delta) <= target


def test_renyi_calibration_satisfies_renyis_bound_and_needs_more_noise():
    fields = {"epsilon": 1.0, "delta": 1e-6, "sampling_prob": 0.0123, "num_steps": 150}
    sigma = calibrate_noise_multiplier(**fields, accountant="rdp")
    assert spent(0.0123, sigma, 150, 1e-6, "rdp") <= 1.0
    assert sigma > calibrate_noise_multiplier(**fields)


def test_a_huge_budget_returns_the_smallest_noise_considered():
    sigma = calibrate_noise_multiplier(epsilon=1e5, delta=1e-6, sampling_prob=0.5, num_steps=1)
    assert sigma == pytest.approx(0.05)


def test_opposite_mistakes_are_caught():
    # Half the calibrated noise, or noise over √2: the accountant has to notice by a wide margin.
    sigma = calibrate_noise_multiplier(epsilon=1.0, delta=1e-6, sampling_prob=0.0123, num_steps=150)
    assert spent(0.0123, sigma / 2**0.5, 150, 1e-6) > 1.3
    assert spent(0.0123, sigma / 2, 150, 1e-6) > 2.0


def test_max_steps_is_the_last_that_fits():
    steps = max_steps(epsilon=1.0, delta=1e-6, sampling_prob=0.01, noise_multiplier=1.0)
    assert spent(0.01, 1.0, steps, 1e-6) <= 1.0 < spent(0.01, 1.0, steps + 1, 1e-6)


def test_max_steps_is_zero_where_nothing_fits_and_stops_at_a_million():
    assert max_steps(epsilon=0.1, delta=1e-6, sampling_prob=1.0, noise_multiplier=1.0) == 0
    assert max_steps(epsilon=8.0, delta=1e-6, sampling_prob=1.0, noise_multiplier=1e6) == 1_000_000


def test_max_sampling_prob_is_at_the_edge():
    q = max_sampling_prob(epsilon=1.0, delta=1e-6, num_steps=100, noise_multiplier=1.0)
    assert 0.999 <= spent(q, 1.0, 100, 1e-6) <= 1.0
    assert spent(q * 1.01, 1.0, 100, 1e-6) > 1.0


def test_max_sampling_prob_is_one_where_no_sampling_is_needed():
    assert max_sampling_prob(epsilon=8.0, delta=1e-6, num_steps=1, noise_multiplier=10.0) == 1.0


def test_a_budget_that_no_sampling_probability_fits_is_refused():
    with pytest.raises(InvalidInputError, match="noise multiplier"):
        max_sampling_prob(epsilon=1e-6, delta=1e-30, num_steps=1, noise_multiplier=0.3)


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"delta": 0.0},
        {"delta": 1.0},
        {"sampling_prob": 0.0},
        {"num_steps": 0},
    ],
)
def test_values_outside_their_range_are_named(bad):
    fields = {"epsilon": 1.0, "delta": 1e-6, "sampling_prob": 0.01, "num_steps": 10} | bad
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        calibrate_noise_multiplier(**fields)


@pytest.mark.parametrize("safe_side", [1, -1])
@pytest.mark.parametrize("power", [0.5, 2.0, 9.0])
@pytest.mark.parametrize("guess", [1e-3, 1.0, 1e3])
def test_the_search_returns_a_point_that_was_evaluated_and_is_safe(safe_side, power, guess):
    seen = {}

    def f(x):
        seen[x] = x ** (-safe_side * power)
        return seen[x]

    result = _feasible_boundary(f, 2.0, guess=guess, bounds=(1e-6, 1e6), safe_side=safe_side, tolerance=1e-3)
    assert 2.0 * (1 - 1e-3) <= seen[result] <= 2.0
    assert len(seen) <= 25


def test_the_search_survives_jumps_infinities_and_zeros():
    def step(x):
        return float("inf") if x < 1.0 else 3.0 if x < 7.0 else 0.0

    result = _feasible_boundary(step, 1.0, guess=0.1, bounds=(1e-3, 1e3), safe_side=1, tolerance=1e-3)
    assert result == pytest.approx(7.0, rel=1e-6)
    assert step(result) <= 1.0


def test_the_search_says_when_nothing_is_safe():
    assert (
        _feasible_boundary(lambda _: 2.0, 1.0, guess=1.0, bounds=(0.1, 10.0), safe_side=1, tolerance=1e-3)
        is None
    )
