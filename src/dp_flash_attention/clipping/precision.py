"""True float32 for everything that decides how an example is clipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dp_flash_attention.noise.precision import true_float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Norms and sums: true float32, outside the caller's autocast, and off the forward pass's graph."""
    with true_float32(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
