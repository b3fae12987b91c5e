"""Exact noise: rounds a call's output to each row's grid and adds whole numbers. docs/attention.md, Theorem 6."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dp_flash_attention.attention.finite_precision import MAX_STEPS, grid_noise
from dp_flash_attention.attention.interface import NoiseStream
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise.wide_discrete_gaussian import CHUNK

# Numbers that are rounded at once: they stay in the first two levels of cache, and torch runs each operation on the caller's
# thread (its threads start beyond 32,768 numbers). Six short parallel regions a piece took ten times as long on a busy machine.
_PIECE: Final = 1 << 15
# Near it float64 has whole numbers only, so that adding and subtracting it rounds what is below 2^51, halves to even. torch.round
# would start threads for any length.
_TO_WHOLE: Final = 1.5 * 2.0**52
# Chunks of noise that are made at once: each thread has several, and 8 MiB hold them.
_CHUNKS: Final = 8


def add_on_grid(exact: Tensor, stddev: Tensor, noise: NoiseStream, out_dtype: torch.dtype) -> Tensor:
    """Returns the noisy output [B, H, Q, E]; its gradient with respect to ``exact`` is the identity.

    Arguments as ``noising.add_noise``.
    """
    return cast(Tensor, _OnGrid.apply(exact, stddev, noise, out_dtype))  # type: ignore[no-untyped-call]


def add_on_grid_into(
    out: Tensor, exact: Tensor, stddev: Tensor, noise: NoiseStream, *, entry: int = 0, head: int = 0
) -> None:
    """Writes ``γ·(round(exact/γ) + x)`` to ``out``, x whole numbers; arguments as ``noising.add_noise_into``.

    Guarantees:
        neighbouring relation, privacy unit, sensitivity: the plan's. Public: the grids γ = ``stddev/noise.steps``.
        theorem: docs/attention.md, Theorem 6. What reaches ``out`` is a function of the whole numbers and of γ: the product
            and the conversion to ``out``'s dtype are post-processing.

    Raises:
        InvalidInputError: If the stream does not say how many steps a deviation has.
    """
    num_entries, num_heads, num_queries, width = exact.shape
    numbers, per_head = _Numbers(noise), num_queries * width
    for b in range(num_entries):
        first = ((entry + b) * out.shape[1] + head) * per_head
        if b == 0 or num_heads != out.shape[1]:
            # Entries follow each other without a gap where the slice has all heads.
            left = num_entries - b if num_heads == out.shape[1] else 1
            numbers.seek(first, first + left * num_heads * per_head)
        for heads, rows in _pieces(num_heads, num_queries, width):
            source = exact[b, heads, rows]
            into = slice(head + heads.start, head + heads.stop)
            grid = stddev[entry + b, into, rows].to(device=out.device, dtype=torch.float64)
            grid = grid.unsqueeze(-1) / numbers.steps  # exact, k being a power of two
            counts = torch.empty(source.shape, dtype=torch.float64, device=out.device)
            torch.div(source, grid, out=counts).clamp_(-MAX_STEPS, MAX_STEPS).add_(_TO_WHOLE).sub_(_TO_WHOLE)
            x = torch.from_numpy(numbers.take(counts.numel())).view(counts.shape)
            # Whole numbers below 2^51: their sum is exact.
            out[entry + b, into, rows] = counts.add_(x.to(out.device)).mul_(grid)


class _Numbers:
    """The whole numbers of a call, one after the other: number ((b·H + h)·Q + t)·E + e belongs to element (b, h, t, e)."""

    def __init__(self, noise: NoiseStream) -> None:
        if noise.name != "exact" or noise.steps is None:
            raise InvalidInputError(
                "noise.steps",
                noise.steps,
                bound="the k of a plan for noise 'exact'",
                remedy="Make the call with release_attention.",
            )
        self.steps = noise.steps
        self._noise, self._sampler = noise, grid_noise(noise.steps)
        self._made: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._next = self._stop = 0

    def seek(self, first: int, stop: int) -> None:
        """Goes to number ``first``, of a run that ends before ``stop``."""
        self._made, self._next, self._stop = self._made[:0], first, stop

    def take(self, num: int) -> npt.NDArray[np.int64]:
        """Returns the next numbers, int64, and goes on behind them."""
        if len(self._made) < num:
            start = self._next + len(self._made)
            # To the end of a chunk, a part of one costing as much as the whole, and of several while there is need for them.
            stop = max(self._next + num, min(start + _CHUNKS * CHUNK, self._stop))
            stop = -(-stop // CHUNK) * CHUNK
            more = self._sampler.draw(
                self._noise.key,
                stop - start,
                step=self._noise.call_id,
                stream=0,
                first=start,
                cipher=self._noise.cipher,
            )
            self._made = np.concatenate([self._made, more]) if len(self._made) else more
        taken, self._made = self._made[:num], self._made[num:]
        self._next += num
        return taken


def _pieces(num_heads: int, num_queries: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yields heads and rows of one batch entry, in the order of the numbers: several small heads, or a part of a large one."""
    if num_queries * width <= _PIECE:
        together = max(1, _PIECE // (num_queries * width))
        for first in range(0, num_heads, together):
            yield slice(first, min(first + together, num_heads)), slice(0, num_queries)
        return
    rows = max(1, _PIECE // width)
    for head in range(num_heads):
        for row in range(0, num_queries, rows):
            yield slice(head, head + 1), slice(row, min(row + rows, num_queries))


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exact: Tensor, stddev: Tensor, noise: NoiseStream, out_dtype: torch.dtype
    ) -> Tensor:
        ctx.dtype = exact.dtype
        out = torch.empty(exact.shape, dtype=out_dtype, device=exact.device)
        add_on_grid_into(out, exact, stddev, noise)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtype), None, None, None
