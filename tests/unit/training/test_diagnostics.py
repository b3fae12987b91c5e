from __future__ import annotations

import json
import stat
from pathlib import Path

import torch

from dp_flash_attention.clipping import MicrobatchNorms
from dp_flash_attention.training.diagnostics import WARNING, JsonLinesDiagnostics, StepTally


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_first_line_warns_and_the_directory_is_closed(tmp_path: Path) -> None:
    JsonLinesDiagnostics(tmp_path / "diagnostics").write({"step": 0})
    path = tmp_path / "diagnostics" / "steps.jsonl"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert lines(path) == [{"warning": WARNING}, {"step": 0}]


def test_resuming_drops_steps_that_are_repeated_and_the_line_that_broke_off(tmp_path: Path) -> None:
    sink = JsonLinesDiagnostics(tmp_path / "d")
    for step in range(5):
        sink.write({"step": step})
    path = tmp_path / "d" / "steps.jsonl"
    path.write_text(path.read_text() + '{"step": 1, "lo')
    JsonLinesDiagnostics(tmp_path / "d", from_step=3).write({"step": 3})
    assert [line.get("step") for line in lines(path)] == [None, 0, 1, 2, 3]


def test_a_tally_leaves_padding_out() -> None:
    tally = StepTally()
    for norms, losses, weights in (
        ([0.5, 2.0], [1.0, 3.0], [1.0, 1.0]),
        ([1.5, 99.0], [5.0, 99.0], [1.0, 0.0]),
    ):
        norms_B = torch.tensor(norms)
        seen = MicrobatchNorms(norms=norms_B, losses=torch.tensor(losses), clipped=norms_B > 1.0)
        tally.add(torch.tensor(weights), seen)
    record = tally.record(7)
    assert (record["step"], record["sampled_batch_size"], record["loss_mean"]) == (7, 3, 3.0)
    assert record["norm_quantiles"]["0.5"] == 1.5
    assert record["clipped_fraction"] == 2 / 3


def test_an_empty_batch_has_a_line_and_no_mean() -> None:
    record = StepTally().record(4)
    assert record["sampled_batch_size"] == 0
    assert record["loss_mean"] is None
    json.dumps(record)
