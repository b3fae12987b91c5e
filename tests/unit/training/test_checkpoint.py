from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dp_flash_attention.core.errors import RunStateError
from dp_flash_attention.training import checkpoint as checkpoint_module
from dp_flash_attention.training.checkpoint import Checkpoint, load_latest_checkpoint, save_checkpoint


def saved(directory: Path, step: int, state: Any = None, run_id: str = "run") -> Path:
    return save_checkpoint(
        directory, Checkpoint(run_id=run_id, step_index=step, state={"model": {}} if state is None else state)
    )


def back(directory: Path) -> Any:
    found = load_latest_checkpoint(directory, run_id="run")
    assert found is not None
    return found.state


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and all(map(same, first, second))
    return type(first) is type(second) and (first == second or first != first)


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "tensors": [torch.randn(3, 4), torch.randn(3, 4).T, torch.zeros(0, 2), torch.tensor(1.5)],
        "dtypes": (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64), torch.arange(3)),
        0: {"step": 7, 1: None, "amsgrad": False, "name": "ä"},
        "floats": [0.1, 5e-324, math.inf, -0.0, math.nan],
    }
    saved(tmp_path, 0, state)
    assert same(back(tmp_path), state)


def test_tied_tensors_are_stored_once_and_slices_without_what_surrounds_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    model[1].weight = model[0].weight
    tied = saved(tmp_path / "tied", 0, {"model": model.state_dict()})
    assert tied.stat().st_size < 1.1 * 4 * 300 * 300
    piece = saved(tmp_path / "piece", 0, {"x": torch.arange(100_000)[5:7]})
    assert piece.stat().st_size < 1000
    assert back(tmp_path / "piece")["x"].tolist() == [5, 6]


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    for step in (0, 3, 6, 12):
        saved(tmp_path, step, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000006.safetensors",
        "step-00000012.safetensors",
    ]
    assert back(tmp_path) == {"step": 12}


@pytest.mark.parametrize("damage", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"garbage" * 10])
def test_a_damaged_newest_one_gives_way_to_the_one_before(tmp_path: Path, damage: bytes) -> None:
    saved(tmp_path, 3, {"step": 3})
    saved(tmp_path, 6).write_bytes(damage)
    assert back(tmp_path) == {"step": 3}
    (tmp_path / "step-00000003.safetensors").write_bytes(damage)
    with pytest.raises(RunStateError, match=r"no checkpoint .* can be read"):
        load_latest_checkpoint(tmp_path, run_id="run")


def test_half_written_and_foreign_files_are_not_checkpoints(tmp_path: Path) -> None:
    assert load_latest_checkpoint(tmp_path / "none", run_id="run") is None
    (tmp_path / ".tmp-step-00000009.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert load_latest_checkpoint(tmp_path, run_id="run") is None
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 3, run_id="other")
    with pytest.raises(RunStateError, match="belongs to run other"):
        load_latest_checkpoint(tmp_path, run_id="run")


def test_a_state_that_needs_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunStateError, match="holds a set"):
        saved(tmp_path, 0, {"x": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_keeps_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    import safetensors.torch

    saved(tmp_path, 3, {"step": 3})
    kind = type("SafetensorError", (Exception,), {})
    for error in (OSError(28, "No space left on device"), kind("I/O error: No space left on device")):

        def full(tensors: Any, path: Path, metadata: Any, error: Exception = error) -> None:
            Path(path).write_bytes(b"half")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", full)
            with pytest.raises(RunStateError, match="No space left"):
                saved(tmp_path, 6)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000003.safetensors"]


def test_a_file_of_another_format_is_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint_module, "_FORMAT", "2")
    saved(tmp_path, 3)
    monkeypatch.undo()
    with pytest.raises(RunStateError, match="can be read"):
        load_latest_checkpoint(tmp_path, run_id="run")
