"""True float32 for everything that decides how an example is clipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dp_flash_attention.noise.precision import true_float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Norms and sums: true float32, outside the caller's autocast, and off the forward pass's graph."""
    with true_float32(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@dataclass(frozen=True, kw_only=True)
class Autocast:
    """The caller's autocast on one kind of device, to be set again around a forward pass alone."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def of(device: torch.device) -> Autocast:
        """Returns what is set now."""
        kind = device.type
        return Autocast(
            device_type=kind,
            enabled=torch.is_autocast_enabled(kind),
            dtype=torch.get_autocast_dtype(kind),
        )

    def call(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Calls a function under it. Casts of weights are not kept: in a trace they would be of tensors without values."""
        with torch.autocast(self.device_type, self.dtype, enabled=self.enabled, cache_enabled=False):
            return function(*arguments)
