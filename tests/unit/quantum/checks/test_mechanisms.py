"""The checks hold, and each one fails when what it looks at is broken on purpose."""

from fractions import Fraction

import numpy as np
import pytest

from dp_flash_attention.quantum import (
    amplitude_estimation_resistant,
    exact_noise,
    gaussian_plan,
    post_quantum_gaussian,
)
from dp_flash_attention.quantum.amplitude_estimation_resistant import AmplitudeEstimationResistant
from dp_flash_attention.quantum.checks import mechanisms
from dp_flash_attention.quantum.evidence import run_checks


def rows(check, *arguments):
    return {row.name: row for row in check(*arguments)}


def failing(check, *arguments):
    return [name for name, row in rows(check, *arguments).items() if not row.holds]


def test_every_check_holds_and_shows_something():
    results = list(run_checks(mechanisms.mechanisms_checks()))
    assert len(results) == 8
    assert [row for result in results for row in result.rows if not row.holds] == []
    assert sum(len(result.rows) for result in results) == 14


def test_an_accountant_that_undercharges_fails(monkeypatch):
    true = mechanisms.discrete_gaussian_delta
    monkeypatch.setattr(mechanisms, "discrete_gaussian_delta", lambda **k: 0.99 * true(**k))
    assert "PostQuantumGaussian: δ of one coordinate" in failing(mechanisms.delta_by_independent_code)
    monkeypatch.setattr(
        mechanisms, "discrete_gaussian_delta", lambda **k: true(**{**k, "sigma": 1.5 * k["sigma"]})
    )
    assert len(failing(mechanisms.delta_by_independent_code)) == 2


def test_rounding_left_out_fails(monkeypatch):
    monkeypatch.setattr(
        gaussian_plan,
        "sensitivity_on_grid",
        lambda sensitivity, grid, dimension, *, whole: sensitivity / grid,
    )
    gaussian_plan.plan_gaussian.cache_clear()
    assert failing(mechanisms.rounding_is_accounted) == ["PostQuantumGaussian: rounding"]
    gaussian_plan.plan_gaussian.cache_clear()


def test_no_clip_fails(monkeypatch):
    monkeypatch.setattr(post_quantum_gaussian, "_projected", lambda vector, clip: vector)
    assert failing(mechanisms.clipping_bounds_the_sum) == ["PostQuantumGaussian: clipping"]


@pytest.mark.parametrize("broken", ["NaN passes", "an error"])
def test_broken_records_that_pass_or_raise_fail(monkeypatch, broken):
    def careless(vector, clip):
        if broken == "an error" and not (abs(vector) < 1e100).all():
            raise ValueError("the value is not finite")
        return vector

    monkeypatch.setattr(post_quantum_gaussian, "_projected", careless)
    (result,) = run_checks([("broken records", mechanisms.broken_records)])
    assert not result.holds


@pytest.mark.parametrize("wrong", [0, 0.5, 0.9, 1.1])
def test_noise_of_another_scale_fails(monkeypatch, wrong):
    stream = exact_noise.ExactNoise.stream

    def scaled(self, key, num, consume, **settings):
        def careless(start, noise):
            consume(start, np.rint(wrong * noise).astype(np.int64))

        stream(self, key, num, careless, **settings)

    monkeypatch.setattr(exact_noise.ExactNoise, "stream", scaled)
    assert len(failing(mechanisms.noise_scale, 20_000)) == 2


def without(label_index, monkeypatch):
    original = amplitude_estimation_resistant.keyed_shake256

    def careless(key, *fields, domain, num_bytes):
        if domain == b"dpfa.memo.label.v1":
            fields = fields[:label_index] + fields[label_index + 1 :]
        return original(key, *fields, domain=domain, num_bytes=num_bytes)

    monkeypatch.setattr(amplitude_estimation_resistant, "keyed_shake256", careless)


@pytest.fixture(autouse=True)
def _few_queries(monkeypatch):
    monkeypatch.setattr(mechanisms, "_NUM_QUERIES", 10)


def test_a_memo_key_reused_across_data_versions_fails(monkeypatch):
    without(1, monkeypatch)
    assert failing(mechanisms.memo) == ["AmplitudeEstimationResistant: data versions"]


def test_a_memo_that_ignores_the_epoch_fails(monkeypatch):
    without(0, monkeypatch)
    assert failing(mechanisms.memo) == ["AmplitudeEstimationResistant: epochs"]


def test_noise_that_is_not_memoised_fails(monkeypatch):
    noise_key = AmplitudeEstimationResistant._noise_key

    def fresh(self, label, commitment):
        return noise_key(self, mechanisms.SecretKey.from_os().export(), commitment)

    monkeypatch.setattr(AmplitudeEstimationResistant, "_noise_key", fresh)
    # The charge book would refuse the second answer; without it, the check sees two.
    monkeypatch.setattr(AmplitudeEstimationResistant, "_bind", lambda *a: None)
    assert "AmplitudeEstimationResistant: repeats" in failing(mechanisms.memo)
    assert failing(mechanisms.amplitude_estimation) == ["amplitude estimation: memoised noise"]


def test_changed_data_that_are_answered_fail(monkeypatch):
    monkeypatch.setattr(AmplitudeEstimationResistant, "_bind", lambda *a: None)
    assert failing(mechanisms.memo) == ["AmplitudeEstimationResistant: changed data"]


def test_an_attacker_that_learns_nothing_fails(monkeypatch):
    # A check that could not see the threat would not see the protection either.
    monkeypatch.setattr(mechanisms, "doubling_powers", lambda rounds: (0,))
    assert "amplitude estimation: fresh noise" in failing(mechanisms.amplitude_estimation)


def test_kleins_sampler_with_one_sigma_for_all_coordinates_fails(monkeypatch):
    lattice_type = type(mechanisms.lattice_from_rows([[1]]))
    klein = lattice_type.klein

    def careless(self, centre, variance, coins):
        return klein(self, centre, variance * self.squared_norms[0] / 2, coins)

    monkeypatch.setattr(lattice_type, "klein", careless)
    assert failing(mechanisms.klein, 1500) == ["LatticeGaussian: Klein's sampler"]


@pytest.mark.parametrize("scale", [Fraction(9, 10), Fraction(11, 10)])
def test_kleins_sampler_whose_variance_is_a_tenth_off_fails(monkeypatch, scale):
    """As many points as the command draws; missed at most twice in 10^5 runs."""
    lattice_type = type(mechanisms.lattice_from_rows([[1]]))
    klein = lattice_type.klein

    def off(self, centre, variance, coins):
        return klein(self, centre, variance * scale, coins)

    monkeypatch.setattr(lattice_type, "klein", off)
    (check,) = [check for name, check in mechanisms.mechanisms_checks() if name == "Klein's sampler"]
    assert failing(check) == ["LatticeGaussian: Klein's sampler"]


def test_kleins_sampler_that_correlates_its_coordinates_fails(monkeypatch):
    """Both coordinates have the right variance; only the diagonals see it."""
    lattice_type = type(mechanisms.lattice_from_rows([[1]]))
    drawn = np.random.default_rng(1).normal(size=(12_000, 2)) * 8.0
    drawn[:, 1] = 0.1 * drawn[:, 0] + np.sqrt(0.99) * drawn[:, 1]
    rows_left = iter(drawn.tolist())
    monkeypatch.setattr(lattice_type, "klein", lambda *arguments: next(rows_left))
    monkeypatch.setattr(lattice_type, "point", lambda self, coefficients: coefficients)
    assert failing(mechanisms.klein, 12_000) == ["LatticeGaussian: Klein's sampler"]
