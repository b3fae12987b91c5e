from __future__ import annotations

import time

import pytest

from dp_flash_attention.training import PrivacyPlan
from dp_flash_attention.training.progress import Stopwatch


def test_figures_follow_from_public_numbers_and_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PrivacyPlan(
        epsilon=60.0,
        delta=1e-3,
        sampling_prob=0.2,
        expected_batch_size=10.0,
        num_steps=20,
        l2_clip_norm=0.5,
        noise_multiplier=2.0,
        accountant="rdp",
    )
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stopwatch = Stopwatch(plan, first_step=5)
    now[0] = 104.0
    report = stopwatch.report(7)
    assert (report.step, report.num_steps, report.elapsed_s) == (7, 20, 4.0)
    assert report.examples_per_s == pytest.approx(10.0 * 2 / 4.0)  # two steps by this process, in expectation
    assert report.eta_s == pytest.approx(13 / (2 / 4.0))
    assert report.epsilon_spent == plan.epsilon_after(7)
    assert stopwatch.report(20).eta_s == 0.0
