"""Runs the attention of few queries over many rows in ranges of rows, and says where that is worth it."""

from __future__ import annotations

import math
from typing import Final

import torch
import triton
from torch import Tensor

from dp_flash_attention.attention.interface import PASS_ROWS, AttentionCall
from dp_flash_attention.attention.kernels.operands import LOG2_E
from dp_flash_attention.attention.kernels.split import dp_attention_merge_kernel, dp_attention_part_kernel
from dp_flash_attention.noise.device import KernelKey
from dp_flash_attention.noise.keystream import TILE_NUMBERS

NUM_PROGRAMS: Final = 132
"""Programs that a call is cut into if its queries are fewer: one for each multiprocessor of an H100. A constant and not
the device's own count, so that a call has the same ranges, and is rounded in the same places, on every device. Not yet
measured."""

NUM_STAGES: Final = 2
NUM_WARPS: Final = 4
MERGE_TILES: Final = 2
"""Tiles of noise that a program of the merge makes: as many as keep four warps' layout (``block_shape``)."""


def part_blocks(num_queries: int, width: int, value_width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Returns BLOCK_M and BLOCK_N of the ranges' kernel.

    Not yet measured; the largest, of those tried, for which four warps spill no register on sm_90 (triton 3.7.1), or in
    float32 next to none, which ``tests/integration/test_kernels_compile.py`` checks. The kernel makes no noise, so few
    queries need no whole tile of it.
    """
    widest = max(width, value_width)
    most = 32 if dtype is torch.float32 or widest > 128 else 64
    if widest > 128 and dtype is not torch.bfloat16:
        most = 16
    block_n = 16 if widest > 128 and dtype is torch.float32 else 32
    return max(16, min(most, int(triton.next_power_of_2(num_queries)))), block_n


def default_splits(call: AttentionCall) -> int:
    """Returns into how many ranges the rows of a call are cut; a function of its public shapes alone. 1 for no cut.

    A range is whole passes, and there are as many programs as ``NUM_PROGRAMS`` at most. Scratch is at most that many
    tiles of sums in float32: 4.2 MiB at a width of 128.
    """
    batch, num_heads, num_queries, width = call.query.shape
    num_passes = math.ceil(call.key.shape[2] / PASS_ROWS)
    if call.causal or num_passes < 2:
        return 1
    block_m, _ = part_blocks(num_queries, width, call.value.shape[3], call.query.dtype)
    programs = batch * num_heads * math.ceil(num_queries / block_m)
    return 1 if programs == 0 else _whole_ranges(num_passes, NUM_PROGRAMS // programs)


def attention_split(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor | None,
    *,
    splits: int,
    factors: tuple[Tensor, Tensor] | None,
    hidden: Tensor | None,
    stddev: Tensor,
    noise: KernelKey | None,
) -> None:
    """Writes the output of a call, not empty, and the logarithms of its denominators if there is room for them.

    Args:
        call: A call without causal mask.
        out: [B, H, Q, E], contiguous.
        lse: float32 [B, H, Q], contiguous, or None.
        splits: At most so many ranges.
        factors: Of keys and values; None to compute them from the tiles.
        hidden: One byte for each of [B, K], or None.
        stddev: float32 [B, H, Q] on the device.
        noise: Where the noise comes from; None for none.
    """
    assert not call.causal, "the ranges' kernel has no diagonal"
    query, key, value = call.query, call.key, call.value
    batch, num_heads, num_queries, width = query.shape
    num_groups, num_rows, value_width = key.shape[1], key.shape[2], value.shape[3]
    num_outputs = batch * num_heads * num_queries
    num_passes = max(1, math.ceil(num_rows / PASS_ROWS))
    num_splits = _whole_ranges(num_passes, splits)
    block_m, block_n = part_blocks(num_queries, width, value_width, query.dtype)
    part_sums = torch.empty((num_splits, num_outputs, value_width), device=query.device)
    part_weights = torch.empty((num_splits, num_outputs), device=query.device)
    key_factors, value_factors = (key, value) if factors is None else factors
    shift_log2 = call.score_bound * LOG2_E
    grid = triton.cdiv(num_queries, block_m) * batch * num_heads * num_splits
    dp_attention_part_kernel[(grid,)](
        query,
        key,
        value,
        part_sums,
        part_weights,
        key_factors,
        value_factors,
        key if hidden is None else hidden,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *((0, 0) if hidden is None else hidden.stride()),
        num_heads,
        num_heads // num_groups,
        num_queries,
        num_rows,
        num_outputs,
        num_splits,
        math.ceil(num_passes / num_splits) * PASS_ROWS,
        call.norms.query,
        call.norms.key,
        call.norms.value,
        call.scale * LOG2_E,
        shift_log2,
        WIDTH=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        BLOCK_E=value_width,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PASS_ROWS=PASS_ROWS,
        HAS_HIDDEN=hidden is not None,
        INLINE_FACTORS=factors is None,
        PRECISION="ieee",
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    tile_rows = MERGE_TILES * TILE_NUMBERS // value_width
    dp_attention_merge_kernel[(triton.cdiv(num_queries, tile_rows) * batch * num_heads,)](
        part_sums,
        part_weights,
        out,
        out if lse is None else lse,
        stddev,
        *stddev.stride(),
        num_heads,
        num_queries,
        num_outputs,
        num_splits,
        shift_log2,
        call.null_rows * math.exp(-call.score_bound),
        *((0,) * 8 if noise is None else noise.words),
        0 if noise is None else noise.step,
        BLOCK_E=value_width,
        BLOCK_M=tile_rows,
        STORE_LSE=lse is not None,
        CIPHER=None if noise is None else noise.cipher,
        num_warps=NUM_WARPS,
    )


def _whole_ranges(num_passes: int, most: int) -> int:
    """Returns a number of ranges of equally many whole passes, the last perhaps of fewer; at most ``most``, at least 1."""
    return math.ceil(num_passes / math.ceil(num_passes / max(1, most)))
