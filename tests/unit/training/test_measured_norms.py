"""A run keeps the forms that it was started with, whatever the clock says when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dp_flash_attention.clipping import norm_timing
from dp_flash_attention.clipping.norm_forms import NormForms, NormShape
from dp_flash_attention.core.errors import RunStateError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import ExecutionConfig, PrivacyPlan, PrivateTrainer, RunDirectory
from dp_flash_attention.training.measured_norms import forms_of_run

PLAN = PrivacyPlan(
    epsilon=60.0,
    delta=1e-3,
    sampling_prob=0.2,
    expected_batch_size=10.0,
    num_steps=4,
    l2_clip_norm=0.5,
    noise_multiplier=1.0,
    accountant="rdp",
)
MEASURED = ExecutionConfig(microbatch_size=4, checkpoint_every=2, norm_forms="measured")


class Stopped(BaseException):
    """Stands for the end of the process."""


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean((1, 2))


def clock(preferred: int) -> Callable[[Callable[[], object]], float]:
    """Makes the candidate of this number the fastest of each shape."""
    count = 0

    def timer(call: Callable[[], object]) -> float:
        nonlocal count
        call()
        count += 1
        return 1.0 if (count - 1) % 3 == preferred else 2.0

    return timer


def fit(out: Path, *, resume: bool = False, stop_at: int | None = None, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def on_step(report: Any) -> None:
        if report.step == stop_at:
            raise Stopped

    values: dict[str, Any] = {
        "plan": PLAN,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.05),
        "loss_fn": loss_fn,
        "execution": MEASURED,
        "test_key": TestKey("norm forms"),
        "on_step": on_step,
    }
    records = torch.randn(40, 12, 4, generator=torch.Generator().manual_seed(3))
    result = PrivateTrainer(model, out_dir=out, **(values | changes)).fit(records, resume=resume)
    return load_file(result.model_path)


def record_of(out: Path) -> Any:
    return json.loads((out / "run.json").read_text())["settings"].get("norm_forms")


@pytest.mark.parametrize(("preferred", "form"), [(0, "gram"), (1, "outer"), (2, "formed")])
def test_a_resumed_run_uses_the_forms_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preferred: int, form: str
) -> None:
    monkeypatch.setattr(norm_timing, "least_seconds", clock(preferred))
    unbroken = fit(tmp_path / "unbroken")
    assert {entry["form"] for entry in record_of(tmp_path / "unbroken")} == {form}
    assert len(record_of(tmp_path / "unbroken")) == 2
    with pytest.raises(Stopped):
        fit(tmp_path / "run", stop_at=3)

    def measured_again(call: object) -> float:
        pytest.fail("a resumed run asked the clock")

    monkeypatch.setattr(norm_timing, "least_seconds", measured_again)
    resumed = fit(tmp_path / "run", resume=True)
    assert record_of(tmp_path / "run") == record_of(tmp_path / "unbroken")
    for name, value in unbroken.items():
        assert torch.equal(resumed[name], value)
    assert not (tmp_path / "run" / "diagnostics" / "norm_form_fallbacks.jsonl").exists()


def test_another_form_would_show_in_the_last_bits_or_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the choice is a part of the run's identity, and why it is none of its privacy."""
    results = []
    for preferred in range(3):
        monkeypatch.setattr(norm_timing, "least_seconds", clock(preferred))
        results.append(fit(tmp_path / str(preferred)))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("before", "after"), [("measured", "formula"), ("formula", "measured")])
def test_a_run_is_not_resumed_with_another_way_of_choosing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Any, after: Any
) -> None:
    monkeypatch.setattr(norm_timing, "least_seconds", clock(0))
    with pytest.raises(Stopped):
        fit(
            tmp_path / "run",
            stop_at=2,
            execution=ExecutionConfig(microbatch_size=4, checkpoint_every=2, norm_forms=before),
        )
    with pytest.raises(RunStateError, match="norm_forms"):
        fit(
            tmp_path / "run",
            resume=True,
            execution=ExecutionConfig(microbatch_size=4, checkpoint_every=2, norm_forms=after),
        )


def test_a_shape_that_was_not_measured_is_the_formula_s_and_listed_as_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_timing, "least_seconds", clock(0))

    def longer_after_the_check(model: nn.Module, x: Tensor) -> Tensor:
        # Four rows and more are a microbatch, fewer the start-up check.
        return loss_fn(model, torch.cat([x, x], 1) if len(x) == 4 else x)

    fit(tmp_path / "run", loss_fn=longer_after_the_check)
    assert {entry["num_rows"] for entry in record_of(tmp_path / "run")} == {12}
    lines = (tmp_path / "run" / "diagnostics" / "norm_form_fallbacks.jsonl").read_text().splitlines()
    assert "PRIVATE" in lines[0]
    assert {json.loads(line)["num_rows"] for line in lines[1:]} == {24}


def test_the_formula_measures_nothing(tmp_path: Path) -> None:
    def clock_is_asked(call: object) -> float:
        pytest.fail("the clock was asked")

    shape = NormShape(num_rows=9, num_inputs=6, num_outputs=5)
    with RunDirectory.open(tmp_path / "run", test_key=TestKey("norm forms")) as run:
        forms = forms_of_run(
            run, ExecutionConfig(), [shape], device=torch.device("cpu"), timer=clock_is_asked
        )
        assert forms.chosen == NormForms().chosen
