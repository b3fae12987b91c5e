"""True float32 for everything that decides how an example is clipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Norms and sums: true float32, outside the caller's autocast, and off the forward pass's graph."""
    # Under "high" or "medium" precision products of float32 matrices keep 10 or 7 bits of each factor.
    cuda, mkldnn = torch.backends.cuda, torch.backends.mkldnn
    backends: tuple[Any, ...] = (cuda.matmul, mkldnn.matmul)  # type: ignore[attr-defined]  # not in its stub
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
