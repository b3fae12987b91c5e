"""True float32 for what a guarantee rests on: scores, norms, sums and what noise is scaled to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def true_float32() -> Iterator[None]:
    """Products of float32 matrices keep all 24 bits of each factor.

    Under ``torch.set_float32_matmul_precision("high")`` or ``"medium"`` they keep 10 or 7, on GPUs by TF32 and on some
    CPUs by bfloat16, which no bound of rounding here allows for. The caller's settings are put back at the end.
    """
    cuda, mkldnn = torch.backends.cuda, torch.backends.mkldnn
    backends: tuple[Any, ...] = (cuda.matmul, mkldnn.matmul)  # type: ignore[attr-defined]  # not in its stub
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
