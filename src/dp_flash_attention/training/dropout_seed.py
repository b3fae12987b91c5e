"""Dropout masks that a repeated step draws again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dp_flash_attention.noise import SecureBits


@contextmanager
def seeded(bits: SecureBits, *, step: int, position: int, device: torch.device) -> Iterator[None]:
    """Seeds PyTorch's generators, which dropout uses, for one microbatch, and puts back their states.

    Args:
        bits: From the run's secrets.
        step: The logical step.
        position: The microbatch's number in it.
        device: The model's.
    """
    seed = int(bits.uint64(1, step=step, stream=position)[0] >> 1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
