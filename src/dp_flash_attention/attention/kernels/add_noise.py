"""Adds a call's noise to an exact output on a device: one pass for all heads, for back ends whose kernels are not ours."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_attention.attention.kernels.narrow import rounded
from dp_flash_attention.attention.kernels.operands import on_device
from dp_flash_attention.noise.device import KernelKey
from dp_flash_attention.noise.kernels.transform import tile_normals
from dp_flash_attention.noise.kernels.writer import refuse_graph_capture, require_agreement
from dp_flash_attention.noise.keystream import TILE_NUMBERS

# Not yet measured; as in noise.kernels.writer.
_TILES_PER_PROGRAM: Final = 2
_NUM_WARPS: Final = 4

_NEVER_SPECIALISED = ["first_stream", "k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "step"]


@triton.jit(do_not_specialize=_NEVER_SPECIALISED)
def add_noise_kernel(
    out,
    exact,
    stddev,
    stride_xb,
    stride_xh,
    stride_xq,
    stride_xe,
    stride_sb,
    stride_sh,
    stride_sq,
    num_heads,
    slice_heads,
    num_queries,
    width,
    first_stream: tl.uint32,
    k0: tl.uint32,
    k1: tl.uint32,
    k2: tl.uint32,
    k3: tl.uint32,
    k4: tl.uint32,
    k5: tl.uint32,
    k6: tl.uint32,
    k7: tl.uint32,
    step: tl.uint64,
    CIPHER: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes exact + stddev·z, rounded, for a slice of heads.

    Args:
        out: [B, H, Q, E], contiguous, from the slice's first head on; exact: the slice, by strides.
        stddev: float32 [B, H, Q] by strides, from the slice's first head on.
        num_heads: H; slice_heads: heads of the slice.
        first_stream: Stream of the slice's first head, b·H + h.
    """
    block = TILES * 2048
    blocks = tl.cdiv(num_queries * width, block)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * TILES
    b, h = matrix // slice_heads, matrix % slice_heads
    index = first * 2048 + tl.arange(0, TILES * 2048)
    inside = index < num_queries * width
    row, column = (index // width).to(tl.int64), index % width
    stream = first_stream.to(tl.int64) + b * num_heads + h
    key = (
        k0.to(tl.uint32),
        k1.to(tl.uint32),
        k2.to(tl.uint32),
        k3.to(tl.uint32),
        k4.to(tl.uint32),
        k5.to(tl.uint32),
        k6.to(tl.uint32),
        k7.to(tl.uint32),
    )
    normals = tile_normals(
        key, first.to(tl.uint64), stream.to(tl.uint32), step.to(tl.uint64), 2.0, stddev, CIPHER, TILES
    )
    place = exact + b * stride_xb + h * stride_xh + row * stride_xq + column * stride_xe
    numbers = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(stddev + b * stride_sb + h * stride_sh + row * stride_sq, mask=inside, other=0.0)
    numbers += scale * normals
    target = out + (b * num_heads + h) * num_queries * width + index
    tl.store(target, rounded(numbers, out.dtype.element_ty), mask=inside)


def add_noise_on_device(
    out: Tensor, exact: Tensor, stddev: Tensor, key: KernelKey, *, entry: int = 0, head: int = 0
) -> None:
    """Writes ``exact`` plus noise to ``out``; arguments are those of ``noising.add_noise_into``.

    Raises:
        NoiseReuseError: If a CUDA graph is being captured.
        NoiseUnavailableError: If the noise kernel fails its check on this device.
    """
    refuse_graph_capture(out)
    if exact.numel() == 0:
        return
    num_heads = out.shape[1]
    num_entries, slice_heads, num_queries, width = exact.shape
    require_agreement(out, key)
    deviations = on_device(stddev, out.device)[entry:, head:]
    blocks = triton.cdiv(num_queries * width, TILE_NUMBERS * _TILES_PER_PROGRAM)
    with torch.cuda.device_of(out):
        add_noise_kernel[(blocks * num_entries * slice_heads,)](
            out[entry:, head:],
            exact,
            deviations,
            *exact.stride(),
            *deviations.stride(),
            num_heads,
            slice_heads,
            num_queries,
            width,
            entry * num_heads + head,
            *key.words,
            key.step,
            CIPHER=key.cipher,
            TILES=_TILES_PER_PROGRAM,
            num_warps=_NUM_WARPS,
        )
    torch.autograd.graph.increment_version(out)
