"""Checkpoints: one safetensors file each, written whole or not at all, read without pickle.

A file holds tensors, and in its header a JSON tree whose tensor leaves name them. Everything in it follows
from released steps, so a checkpoint has the run's (ε, δ); secrets are never in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dp_flash_attention.core.durable import is_disk_error, remove_temporaries, replaced_atomically
from dp_flash_attention.core.errors import RunStateError

_FORMAT = "1"
_KEPT = 2
_FILE_NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        run_id: Which run it belongs to.
        step_index: Number of finished steps.
        state: A tree of dicts, lists, tuples, numbers, strings, None and tensors.
    """

    run_id: str
    step_index: int
    state: Mapping[str, Any]


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint durably, then removes all but the newest two.

    Raises:
        RunStateError: If it cannot be written; those before it stay as they are.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tree = _encode(checkpoint.state, tensors, {})
    header = {
        "format": _FORMAT,
        "run_id": checkpoint.run_id,
        "step_index": str(checkpoint.step_index),
        "tree": json.dumps(tree),
    }
    path = directory / f"step-{checkpoint.step_index:08d}.safetensors"
    try:
        directory.mkdir(exist_ok=True)
        with replaced_atomically(path) as temporary:
            save_file(tensors, temporary, metadata=header)
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise RunStateError(
            f"checkpoint {path} cannot be written ({error}), but a run must not go on without. Free disk "
            "space or repair permissions, then resume: the checkpoints before it are whole."
        ) from error
    for old in _files(directory)[:-_KEPT]:
        old.unlink(missing_ok=True)
    return path


def load_latest_checkpoint(directory: Path, *, run_id: str) -> Checkpoint | None:
    """Returns the newest readable checkpoint of a run, or None if there is no file at all.

    An unreadable newest file gives way to the one before: the steps between are repeated bit by bit.

    Raises:
        RunStateError: If there are files and none is readable, or one belongs to another run.
    """
    remove_temporaries(directory)
    files = _files(directory)
    for path in reversed(files):
        try:
            checkpoint = _read(path)
        except (OSError, ValueError, KeyError):
            continue
        if checkpoint.run_id != run_id:
            raise RunStateError(
                f"{path} belongs to run {checkpoint.run_id}, but this is run {run_id}. Remove what was "
                "copied in from another run."
            )
        return checkpoint
    if files:
        raise RunStateError(
            f"no checkpoint in {directory} can be read, but the run needs one to go on. Restore one, or "
            "start a new run in another directory: its budget adds to what this one has spent."
        )
    return None


def _read(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if header["format"] != _FORMAT:
        raise ValueError(f"checkpoint format {header['format']}")
    state = _decode(json.loads(header["tree"]), tensors)
    return Checkpoint(run_id=header["run_id"], step_index=int(header["step_index"]), state=state)


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _FILE_NAME.fullmatch(path.name))


def _encode(value: object, tensors: dict[str, Tensor], seen: dict[object, str]) -> object:
    """Replaces tensors by names; dicts become pairs, for their keys may be numbers."""
    if isinstance(value, Tensor):
        return {"t": _stored(value, tensors, seen)}
    if isinstance(value, Mapping):
        return {"d": [[_encode(k, tensors, seen), _encode(v, tensors, seen)] for k, v in value.items()]}
    if isinstance(value, list):
        return {"l": [_encode(item, tensors, seen) for item in value]}
    if isinstance(value, tuple):
        return {"u": [_encode(item, tensors, seen) for item in value]}
    if isinstance(value, float):
        return {"f": value.hex()}
    if value is None or isinstance(value, bool | int | str):
        return {"v": value}
    raise RunStateError(
        f"the run's state holds a {type(value).__name__}, but checkpoints hold tensors, numbers, strings, "
        "lists and dicts. Use an optimizer whose state_dict() is made of those."
    )


def _stored(tensor: Tensor, tensors: dict[str, Tensor], seen: dict[object, str]) -> str:
    # Tied weights are one tensor under two names; safetensors wants it once.
    place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    if tensor.numel() == 0 or place not in seen:
        name = str(len(tensors))
        dense = tensor.detach().cpu().contiguous()
        whole = dense.untyped_storage().nbytes() == dense.numel() * dense.element_size()
        tensors[name] = dense if whole else dense.clone()
        seen[place] = name
    return seen[place]


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "t":
        return tensors[content]
    if kind == "d":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    if kind == "l":
        return [_decode(item, tensors) for item in content]
    if kind == "u":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "f":
        return float.fromhex(content)
    return content
