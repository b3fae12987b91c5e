"""Writes exact discrete Gaussian noise into an int64 tensor on the device that Triton compiles for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final

import torch
import triton
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise.device import KernelKey
from dp_flash_attention.noise.discrete_gaussian import DiscreteGaussianGenerator
from dp_flash_attention.noise.discrete_gaussian_layers import Layers
from dp_flash_attention.noise.discrete_gaussian_scan import TILE, scan_thresholds
from dp_flash_attention.noise.discrete_gaussian_table import DiscreteGaussianTable
from dp_flash_attention.noise.entropy import TestKey
from dp_flash_attention.noise.kernels.discrete_gaussian import write_discrete_gaussian_kernel
from dp_flash_attention.noise.kernels.writer import refuse_graph_capture

# Not yet measured: each of 8 warps' threads makes one block of hot words, 32 samples.
_NUM_WARPS = 8
_MASK_64: Final = (1 << 64) - 1
# Two layers, and a step of which the first tile has, in one layer, a group with too many late samples for its slots (the kernel's
# rare branch), and in the other five late samples in slots, two of them in one group. Found by search.
CHECK_LAYERS: Final = Layers(variances=(Fraction(64), Fraction(60)), multiplier=4)
CHECK_STEP: Final = 331821
CHECK_NUMBERS: Final = TILE + 5

Write = Callable[[Tensor, "KernelTables", KernelKey, bool], None]


@dataclass(frozen=True, kw_only=True)
class KernelTables:
    """The thresholds of all layers on a device, bottom layer first; ``write_discrete_gaussian_kernel`` has the shapes."""

    hot: Tensor
    rest: Tensor
    direct: Tensor
    multiplier: int

    @classmethod
    def build(
        cls, tables: Sequence[DiscreteGaussianTable], multiplier: int, device: torch.device
    ) -> KernelTables:
        """Returns the thresholds of ``tables`` on ``device``."""
        layers = [scan_thresholds(table) for table in tables]
        num_hot = max(1, *(len(layer.hot) for layer in layers))
        num_rest = max(1, *(len(layer.rest) for layer in layers))
        hot = torch.full((len(layers), num_hot), 1 << 16, dtype=torch.int32)  # no word reaches it
        rest = torch.full((len(layers), num_rest, 2), -1, dtype=torch.int64)
        for i, layer in enumerate(layers):
            hot[i, : len(layer.hot)] = torch.tensor(layer.hot, dtype=torch.int32)
            halves = [[_signed(end >> 64), _signed(end & _MASK_64)] for end in layer.rest]
            rest[i, : len(halves)] = torch.tensor(halves, dtype=torch.int64).reshape(-1, 2)
        direct = torch.tensor([layer.direct for layer in layers], dtype=torch.int32)
        return cls(hot=hot.to(device), rest=rest.to(device), direct=direct.to(device), multiplier=multiplier)


def write_discrete_gaussian(
    out: Tensor, *, tables: KernelTables, key: KernelKey, stream: int, add: bool
) -> None:
    """Overwrites ``out`` with the samples of the position, or adds them to it in place, modulo 2^64.

    Args:
        out: int64 and contiguous, with at least one element.
        tables: Of the law, on the device of ``out``.
        key: The step's ChaCha20 key.
        stream: Number of the stream within the step, in range.
        add: Whether to add.

    Raises:
        InvalidInputError: If ``out`` is not contiguous.
        NoiseReuseError: If a CUDA graph is being captured: its replays would write the same noise again.
        NoiseUnavailableError: If the kernel does not agree with the CPU's generator on this device.
    """
    if not out.is_contiguous():
        raise InvalidInputError(
            "out.stride()", tuple(out.stride()), bound="contiguous on a GPU", remedy="Pass out.contiguous()."
        )
    assert out.dtype is torch.int64, "checked by targets.checked_integer_tensor"
    assert key.cipher == "chacha20", "the exact generators have no other kernel key"
    refuse_graph_capture(out)
    problem = disagreement(_write, str(out.device))
    if problem is not None:
        raise NoiseUnavailableError(
            f"The exact noise kernel failed its check ({problem}). Make the noise on the CPU, and report this device and "
            "the versions of triton and torch."
        )
    _launch(out, tables, key, stream, add)


@lru_cache(maxsize=16)
def disagreement(write: Write, device: str) -> str | None:
    """Returns by how much ``write`` misses the CPU's integers on a device, as a clause, or None if all are equal."""
    generator = DiscreteGaussianGenerator(
        TestKey("exact noise kernel self-check"), layers=CHECK_LAYERS, cipher="chacha20"
    )
    want = generator.fill_(torch.empty(CHECK_NUMBERS, dtype=torch.int64), step=CHECK_STEP, stream=0)
    tables = KernelTables.build(generator.tables, CHECK_LAYERS.multiplier, torch.device(device))
    wrong = 0
    for add, num in ((False, CHECK_NUMBERS), (True, 100)):
        start = 2**40 + torch.arange(num, dtype=torch.int64)
        out = start.to(device, copy=True)
        write(out, tables, generator.kernel_key(CHECK_STEP), add)
        wrong += int((out.cpu() != want[:num] + add * start).sum())
    return f"{wrong} of {CHECK_NUMBERS + 100} integers differ from the CPU's on {device!r}" if wrong else None


def _write(out: Tensor, tables: KernelTables, key: KernelKey, add: bool) -> None:
    _launch(out, tables, key, 0, add)


def _launch(out: Tensor, tables: KernelTables, key: KernelKey, stream: int, add: bool) -> None:
    num_layers, num_hot = tables.hot.shape
    with torch.cuda.device_of(out):
        write_discrete_gaussian_kernel[(triton.cdiv(out.numel(), TILE),)](
            out,
            out.numel(),
            tables.hot,
            tables.rest,
            tables.direct,
            num_layers,
            num_hot,
            tables.rest.shape[1],
            tables.multiplier,
            *key.words,
            stream,
            ADD=add,
            num_warps=_NUM_WARPS,
        )


def _signed(word: int) -> int:
    """The int64 with the bits of a uint64: torch stores no unsigned ones of 64 bits everywhere."""
    return word - (1 << 64) if word >> 63 else word
