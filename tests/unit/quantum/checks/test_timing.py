"""The timing check fails for a planted leak. No test says how fast anything is, or that a busy machine is quiet."""

import time

from dp_flash_attention.noise import DiscreteGaussianGenerator, TestKey
from dp_flash_attention.quantum.checks import timing


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
    ]
