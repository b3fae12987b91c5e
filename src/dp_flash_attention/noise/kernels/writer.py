"""Writes normals into a tensor on the device that Triton compiles for."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError, NoiseReuseError, NoiseUnavailableError
from dp_flash_attention.noise.device import KernelKey
from dp_flash_attention.noise.kernels.selfcheck import disagreement
from dp_flash_attention.noise.kernels.transform import tile_normals
from dp_flash_attention.noise.keystream import TILE_NUMBERS

# Not yet measured: two tiles give each of 4 warps' threads one block of radius words and one of angle words.
_TILES_PER_PROGRAM = 2
_NUM_WARPS = 4

_NEVER_SPECIALISED = ["two_variance", "k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "stream", "step"]


@triton.jit(do_not_specialize=_NEVER_SPECIALISED)  # a variant for each key would be compiled otherwise
def write_normals_kernel(
    out,
    total,
    two_variance,
    k0: tl.uint32,
    k1: tl.uint32,
    k2: tl.uint32,
    k3: tl.uint32,
    k4: tl.uint32,
    k5: tl.uint32,
    k6: tl.uint32,
    k7: tl.uint32,
    stream: tl.uint32,
    step: tl.uint64,
    CIPHER: tl.constexpr,
    ADD: tl.constexpr,
    TILES: tl.constexpr,
):
    """Fills ``out`` (float32, contiguous, ``total`` numbers) with normals, or adds them if ``ADD``."""
    # The interpreter ignores the annotations of the arguments; on a device these conversions do nothing.
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
    program = tl.program_id(0).to(tl.int64)
    first_tile = (program * TILES).to(tl.uint64)
    numbers = tile_normals(
        key, first_tile, stream.to(tl.uint32), step.to(tl.uint64), two_variance, out, CIPHER, TILES
    )
    index = program * (2048 * TILES) + tl.arange(0, 2048 * TILES)
    inside = index < total
    if ADD:
        numbers += tl.load(out + index, mask=inside, other=0.0)
    tl.store(out + index, numbers, mask=inside)


def write_normals(
    out: Tensor,
    *,
    two_variance: np.float32,
    key: KernelKey,
    stream: int,
    add: bool,
    tiles_per_program: int = _TILES_PER_PROGRAM,
) -> None:
    """Overwrites ``out`` with the numbers of the position, or adds them to it in place.

    Args:
        out: float32 and contiguous, checked by ``targets.checked_tensor``, with at least one element.
        two_variance: Twice the variance, from ``targets.float32_two_variance``.
        key: The step's key.
        stream: Number of the parameter within the step, in range.
        add: Whether to add.
        tiles_per_program: A power of two; changes the speed only.

    Raises:
        InvalidInputError: If ``out`` is not float32 or not contiguous.
        NoiseReuseError: If a CUDA graph is being captured: its replays would write the same noise again.
        NoiseUnavailableError: If the kernel does not agree with the CPU's generator on this device.
    """
    if out.dtype is not torch.float32:
        raise InvalidInputError(
            "out.dtype", out.dtype, bound="float32 on a GPU", remedy="Keep float64 sums on the CPU."
        )
    if not out.is_contiguous():
        raise InvalidInputError(
            "out.stride()", tuple(out.stride()), bound="contiguous on a GPU", remedy="Pass out.contiguous()."
        )
    refuse_graph_capture(out)
    require_agreement(out, key)
    _launch(out, two_variance, key, stream, add, tiles_per_program)


def require_agreement(out: Tensor, key: KernelKey) -> None:
    """Runs the kernel beside the CPU's generator before its first use for a device and a cipher.

    Raises:
        NoiseUnavailableError: If their numbers differ by more than rounding: nothing made with this kernel, here,
            would be noise as it is accounted for.
    """
    problem = disagreement(_fill, str(out.device), key.cipher)
    if problem is not None:
        raise NoiseUnavailableError(
            f"The noise kernel failed its check ({problem}). Make the noise on the CPU, and report this device and the versions "
            "of triton and torch."
        )


def _fill(out: Tensor, key: KernelKey) -> None:
    _launch(out, np.float32(2.0), key, 0, False, _TILES_PER_PROGRAM)


def _launch(
    out: Tensor, two_variance: np.float32, key: KernelKey, stream: int, add: bool, tiles_per_program: int
) -> None:
    grid = (triton.cdiv(out.numel(), TILE_NUMBERS * tiles_per_program),)
    with torch.cuda.device_of(out):
        write_normals_kernel[grid](
            out,
            out.numel(),
            float(two_variance),
            *key.words,
            stream,
            key.step,
            CIPHER=key.cipher,
            ADD=add,
            TILES=tiles_per_program,
            num_warps=_NUM_WARPS,
        )


def refuse_graph_capture(out: Tensor) -> None:
    """Raises if a launch would be recorded instead of run.

    Raises:
        NoiseReuseError: If the current stream of ``out``'s device is capturing.
    """
    if out.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NoiseReuseError(
            "A CUDA graph is being captured, but each of its replays would write the same noise. "
            "Add noise outside of the captured region."
        )
