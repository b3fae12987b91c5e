"""The timing check fails for a planted leak. No test says how fast anything is, or that a busy machine is quiet."""

import time

import numpy as np
import pytest

from dp_flash_attention.noise import DiscreteGaussianGenerator, TestKey
from dp_flash_attention.noise.wide_discrete_gaussian import WideDiscreteGaussian
from dp_flash_attention.noise.wide_sampler import WideSampler
from dp_flash_attention.noise.wide_skellam import WideSkellam
from dp_flash_attention.quantum.checks import timing
from dp_flash_attention.quantum.exact_noise import noise_for, skellam_noise_for


def test_a_value_dependent_sampler_is_found():
    generator = DiscreteGaussianGenerator(TestKey("time"), stddev=4)
    honest = timing.one_at_a_time(generator)

    def leaking(call):
        value = honest(call)
        until = time.perf_counter_ns() + 100_000 * abs(value)
        while time.perf_counter_ns() < until:
            pass
        return value

    (row,) = timing.no_leak("planted", leaking, 500)
    assert not row.holds


@pytest.mark.parametrize("make", [noise_for, skellam_noise_for])
def test_a_value_dependent_wide_sampler_is_found(make, monkeypatch):
    """As a sampler that walks on for as long as the value is large, inside the draw that is timed."""
    numbers = WideSampler._numbers

    def walking(self, worker, source, index, num):
        drawn = numbers(self, worker, source, index, num)
        until = time.perf_counter_ns() + int(abs(int(drawn[0])) / 2)
        while time.perf_counter_ns() < until:
            pass
        return drawn

    monkeypatch.setattr(WideSampler, "_numbers", walking)
    (row,) = timing.wide_time("planted", make, 400)
    assert not row.holds


def test_a_wide_control_without_its_leak_fails(monkeypatch):
    """With a clock of the test's own, so that the machine has no say."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: (n := next(ticks)) * 1000 + (n * 7919) % 613)
    monkeypatch.setattr(timing, "planted", lambda draw, stddev: draw)
    (row,) = timing.wide_control()
    assert not row.holds


@pytest.mark.parametrize("make", [noise_for, skellam_noise_for])
def test_what_is_timed_is_what_mechanisms_draw_and_wide(make):
    draw = timing.wide_at_a_time(make)
    values = np.array([draw(call) for call in range(300)]) / float(timing._WIDE_VARIANCE) ** 0.5
    assert 0.5 < np.mean(values**2) < 1.7
    assert isinstance(make(timing._WIDE_VARIANCE).sampler, WideDiscreteGaussian | WideSkellam)


def test_the_bound_is_two_hundredths_where_calls_allow_it(monkeypatch):
    monkeypatch.setattr(timing, "correlation", lambda draw, calls: 0.03)
    assert [next(timing.no_leak("x", abs, calls)).holds for calls in (8_000, 60_000)] == [True, False]
    monkeypatch.setattr(timing, "correlation", lambda draw, calls: -0.056)
    assert not next(timing.no_leak("x", abs, 8_000)).holds


def test_a_sampler_whose_time_is_unrelated_holds(monkeypatch):
    """With a clock of the test's own, so that the machine has no say."""
    generator = DiscreteGaussianGenerator(TestKey("time"), stddev=4)
    draw = timing.one_at_a_time(generator)
    ticks = iter(range(10**9))
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: (n := next(ticks)) * 1000 + (n * 7919) % 613)
    (row,) = timing.no_leak("independent", draw, 20_000)
    assert row.holds


def test_a_clock_that_sees_nothing_makes_the_control_fail(monkeypatch):
    ticks = iter(range(10**9))
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(ticks) ** 2)
    monkeypatch.setattr(timing, "_CONTROL_CALLS", 1000)
    (row,) = timing.control()
    assert not row.holds


def test_the_control_walks_the_law():
    draw = timing.walking_sampler()
    values = [draw(call) for call in range(2000)]
    assert 12 < sum(value**2 for value in values) / 2000 < 20


def test_the_subject_lists_what_it_times():
    names = [name for name, _ in timing.timing_checks(deep=True)]
    assert names == [
        "a sampler that leaks is seen",
        "time of exact noise at σ = 4",
        "time of exact noise at σ = 32",
        "a wide sampler that leaks is seen",
        "time of wide Gaussian noise",
        "time of wide Skellam noise",
    ]
