"""Private diagnostics: what the owner of the data may look at and must not pass on.

Losses, gradient norms and sampled batch sizes are computed from the records without noise. They go to a
directory of their own, mode 700, in files whose first line says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dp_flash_attention.clipping import MicrobatchNorms

WARNING = (
    "PRIVATE DATA. These numbers are computed from the training records without noise and are NOT covered "
    "by the run's privacy guarantee. Do not share or publish this file."
)
_QUANTILES = (0.1, 0.5, 0.9)


class DiagnosticsSink(Protocol):
    """Takes one mapping of JSON values for each step."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Keeps the record. It is private data."""


class JsonLinesDiagnostics:
    """Writes ``<directory>/<name>.jsonl``; the first line is the warning.

    Args:
        directory: Made with mode 700.
        name: The file's stem.
        from_step: Records of this and later steps that an interrupted run left are dropped, for they are
            repeated.
    """

    def __init__(self, directory: Path, name: str = "steps", *, from_step: int = 0) -> None:
        directory.mkdir(exist_ok=True)
        directory.chmod(0o700)
        self._path = directory / f"{name}.jsonl"
        kept = _lines_before(self._path, from_step)
        self._path.write_text("".join(line + "\n" for line in [json.dumps({"warning": WARNING}), *kept]))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""
        with self._path.open("a") as file:
            file.write(json.dumps(dict(record)) + "\n")


class StepTally:
    """Collects what a step's microbatches showed; padding rows are left out."""

    def __init__(self) -> None:
        self._norms: list[Tensor] = []
        self._clipped: list[Tensor] = []
        self._losses: list[Tensor] = []

    def add(self, weights: Tensor, seen: MicrobatchNorms) -> None:
        """Takes in one microbatch."""
        real = weights > 0
        self._norms.append(seen.norms[real].double().cpu())
        self._losses.append(seen.losses[real].double().cpu())
        self._clipped.append(seen.clipped[real].double().cpu())

    def record(self, step: int) -> dict[str, Any]:
        """Returns the step's record; means and quantiles of an empty batch are None."""
        norms = torch.cat(self._norms) if self._norms else torch.empty(0)
        if len(norms) == 0:
            return {
                "step": step,
                "sampled_batch_size": 0,
                "loss_mean": None,
                "norm_quantiles": None,
                "clipped_fraction": None,
            }
        quantiles = torch.quantile(norms, torch.tensor(_QUANTILES, dtype=norms.dtype)).tolist()
        return {
            "step": step,
            "sampled_batch_size": len(norms),
            "loss_mean": float(torch.cat(self._losses).mean()),
            "norm_quantiles": dict(zip(map(str, _QUANTILES), quantiles, strict=True)),
            "clipped_fraction": float(torch.cat(self._clipped).mean()),
        }


def _lines_before(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines()[1:]:
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # the line that the process died in
            continue
    return kept
