"""The largest microbatch that fits, by formula and by two small steps, and an error before any large one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import ExecutionConfig, PrivacyPlan, PrivateTrainer
from dp_flash_attention.training.losses import language_model_loss
from dp_flash_attention.training.memory_model import StepMemory
from dp_flash_attention.training.memory_plan import fitting_plan, free_bytes, measured_peaks, require_fit
from dp_flash_attention.training.models import TextTransformer, TextTransformerConfig

PLAN = PrivacyPlan(
    epsilon=60.0,
    delta=1e-3,
    sampling_prob=0.2,
    expected_batch_size=10.0,
    num_steps=1,
    l2_clip_norm=0.5,
    noise_multiplier=1.0,
    accountant="rdp",
)
CONFIG = TextTransformerConfig(
    vocab_size=64, seq_len=32, d_model=32, num_heads=2, num_layers=2, tie_head=False
)


@pytest.mark.parametrize(("limit", "size"), [(100, 1), (109, 1), (110, 2), (155, 6), (10**6, 16)])
def test_the_largest_microbatch_that_fits(limit: int, size: int) -> None:
    plan = fitting_plan({"bookkeeping": lambda n: 90 + 10 * n}, limit_bytes=limit, most_examples=16)
    assert (plan.microbatch_size, plan.peak_bytes) == (size, 90 + 10 * size)


def test_the_second_strategy_is_taken_where_the_first_does_not_fit() -> None:
    peaks: Any = {"bookkeeping": lambda n: 100 * n, "two_pass": lambda n: 20 * n}
    assert fitting_plan(peaks, limit_bytes=250).strategy == "bookkeeping"
    plan = fitting_plan(peaks, limit_bytes=90)
    assert (plan.strategy, plan.microbatch_size) == ("two_pass", 4)


def test_one_example_that_does_not_fit_is_an_error_that_says_what_it_needs() -> None:
    peaks: Any = {"bookkeeping": lambda n: n << 30, "two_pass": lambda n: n << 29}
    with pytest.raises(
        InvalidInputError, match=r"1,024.0 MiB with 'bookkeeping' and 512.0 MiB with 'two_pass'"
    ):
        fitting_plan(peaks, limit_bytes=2**20)


def test_two_small_steps_tell_what_a_larger_one_takes() -> None:
    model = TextTransformer(CONFIG)
    rows = torch.randint(0, 64, (1, 32))
    peaks = measured_peaks(model, lambda m, ids: language_model_loss(m(ids), ids), rows)
    assert list(peaks) == ["bookkeeping", "two_pass"]
    for strategy, peak_of in peaks.items():
        formula = StepMemory(config=CONFIG, batch_size=16, num_tokens=32)
        assert peak_of(16) == pytest.approx(formula.peak_bytes(strategy), rel=0.15)
        assert peak_of(2) < peak_of(16)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_value_of_a_record_reaches_the_estimate() -> None:
    seen = []

    def loss_fn(model: Any, ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return language_model_loss(model(ids), ids)

    measured_peaks(TextTransformer(CONFIG), loss_fn, torch.full((1, 32), 63), strategies=("bookkeeping",))
    assert seen
    assert all(bool((ids == 1).all()) for ids in seen)


def test_the_formulas_can_be_used_instead() -> None:
    step = StepMemory(config=CONFIG, batch_size=1, num_tokens=32)

    def peak_of(size: int) -> int:
        return replace(step, batch_size=size).peak_bytes("bookkeeping")

    plan = fitting_plan({"bookkeeping": peak_of}, limit_bytes=8 * 2**20)
    assert peak_of(plan.microbatch_size) <= 8 * 2**20 < peak_of(plan.microbatch_size + 1)


def test_free_memory_is_a_number_of_bytes() -> None:
    assert free_bytes(torch.device("cpu")) > 2**20


def test_a_microbatch_that_does_not_fit_is_refused_with_the_one_that_does() -> None:
    require_fit(lambda size: 10 * size, microbatch_size=8, limit_bytes=80)
    with pytest.raises(InvalidInputError, match=r"microbatch_size is '8, .*at most 7"):
        require_fit(lambda size: 10 * size, microbatch_size=8, limit_bytes=79)
    with pytest.raises(InvalidInputError, match=r"at most 0 .*two_pass"):
        require_fit(lambda size: 10 * size, microbatch_size=8, limit_bytes=9)


@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_a_run_that_would_not_fit_makes_no_directory(tmp_path: Path, strategy: Any) -> None:
    def fit(limit: int) -> None:
        torch.manual_seed(0)
        model = TextTransformer(CONFIG)
        execution = ExecutionConfig(microbatch_size=8, memory_limit_bytes=limit, strategy=strategy)
        PrivateTrainer(
            model,
            plan=PLAN,
            optimizer=torch.optim.AdamW(model.parameters()),
            loss_fn=lambda m, ids: language_model_loss(m(ids), ids),
            out_dir=tmp_path / "run",
            execution=execution,
            test_key=TestKey("memory"),
        ).fit(torch.randint(0, 64, (40, 32)))

    with pytest.raises(InvalidInputError, match="microbatch_size"):
        fit(2**20)
    assert not (tmp_path / "run").exists()
    fit(2**30)
    assert (tmp_path / "run" / "model.safetensors").exists()
