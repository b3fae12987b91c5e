"""True float32 for what a guarantee rests on: scores, norms, sums and what noise is scaled to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


class _Switch:
    """The process's settings, which all threads share: the first one inside takes them, the last one puts them back.

    If each did so for itself, one that leaves would switch the others back in the middle of their products.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, ["none", "none"]

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = [backend.fp32_precision for backend in _backends()]
            for backend in _backends():
                backend.fp32_precision = "ieee"
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for backend, precision in zip(_backends(), self._before, strict=True):
                    backend.fp32_precision = precision


def _backends() -> tuple[Any, ...]:
    cuda, mkldnn = torch.backends.cuda, torch.backends.mkldnn
    return cuda.matmul, mkldnn.matmul  # type: ignore[attr-defined]  # not in its stub


_switch = _Switch()


@contextmanager
def true_float32() -> Iterator[None]:
    """Products of float32 matrices keep all 24 bits of each factor, in all threads of the process.

    Under ``torch.set_float32_matmul_precision("high")`` or ``"medium"`` they keep 10 or 7, on GPUs by TF32 and on some
    CPUs by bfloat16, which no bound of rounding here allows for. The caller's settings are put back when the last thread
    that is inside leaves.
    """
    _switch.enter()
    try:
        yield
    finally:
        _switch.leave()
