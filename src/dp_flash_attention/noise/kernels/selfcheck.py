"""Compares the noise kernels with the CPU generators on a device, before their first use there."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

import torch

from dp_flash_attention.noise.device import KernelCipher, KernelKey
from dp_flash_attention.noise.entropy import TestKey
from dp_flash_attention.noise.fast import FastNormalGenerator
from dp_flash_attention.noise.keystream import TILE_NUMBERS
from dp_flash_attention.noise.secure import SecureNormalGenerator
from dp_flash_attention.noise.writer import CounterNormalGenerator

_LABEL = "noise kernel self-check"
# Steps whose first two tiles hold a radius word below 64, so that a wrong refining word shows. Found by search.
STEPS: Final[dict[KernelCipher, int]] = {"chacha20": 16757, "philox4x64": 17721}
_NUMBERS = 2 * TILE_NUMBERS + 5
# Both sides are within half of this of the exact map (docs/kernels.md).
_RELATIVE, _ABSOLUTE = 16 * 2.0**-24, 2.0**-25

Write = Callable[[torch.Tensor, KernelKey], None]


def check_generator(cipher: KernelCipher) -> CounterNormalGenerator:
    """Returns the CPU generator that a cipher's kernel is compared with, on a public key."""
    key = TestKey(_LABEL)
    if cipher == "chacha20":
        return SecureNormalGenerator(key, cipher="chacha20")
    return FastNormalGenerator(key)


@lru_cache(maxsize=64)
def disagreement(write: Write, device: str, cipher: KernelCipher) -> str | None:
    """Returns by how much ``write`` misses the CPU's numbers on a device, as a clause, or None if it agrees.

    Args:
        write: Fills a float32 tensor with the unit normals of a step's stream 0.
        device: Where.
        cipher: Which kernel.
    """
    generator = check_generator(cipher)
    out = torch.full((_NUMBERS,), float("nan"), device=device)
    write(out, generator.kernel_key(STEPS[cipher]))
    want = generator.fill_normal_(torch.empty(_NUMBERS), step=STEPS[cipher], stream=0)
    wrong = ~torch.isclose(out.cpu(), want, rtol=_RELATIVE, atol=_ABSOLUTE)  # a NaN is not close
    count = int(wrong.sum())
    return (
        f"{count} of {_NUMBERS} numbers of {cipher!r} differ from the CPU's on {device!r}" if count else None
    )
