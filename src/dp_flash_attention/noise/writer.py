"""Writes normals into tensors, chunk by chunk, with several threads.

A chunk is a fixed run of whole tiles at a fixed offset, so what lands in an element does not depend on threads, on
fill or add, or on how many elements follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.core.validation import positive_finite
from dp_flash_attention.noise.keystream import (
    MAX_NUMBERS,
    TILE_NUMBERS,
    TILE_PAIRS,
    Domain,
    Indices,
    Keystream,
    Words32,
    checked_position,
)
from dp_flash_attention.noise.normals import normals_float32, normals_float64

CHUNK_NUMBERS: Final = 32 * TILE_NUMBERS
SPAN_NUMBERS: Final = 16 * CHUNK_NUMBERS
_STDDEV_REMEDY = "Pass the noise's absolute standard deviation (noise_multiplier times clip norm)."

Floats = npt.NDArray[Any]


class CounterNormalGenerator:
    """Normals from a key-stream with random access; the two named generators are thin shells of it.

    Args:
        keystream: Where the random words come from.
        uses_test_key: Whether the key is a ``TestKey``; nothing made with one is private.
    """

    name: str

    def __init__(self, keystream: Keystream, *, uses_test_key: bool) -> None:
        self._keystream = keystream
        self.uses_test_key = uses_test_key

    def fill_normal_(self, out: Tensor, *, stddev: float = 1.0, step: int, stream: int) -> Tensor:
        """Overwrites ``out`` with independent N(0, stddev²) numbers and returns it.

        The numbers depend on (key, dtype, step, stream, element index in row-major order) alone. A longer
        tensor starts with the numbers of a shorter one.

        Args:
            out: CPU tensor, float32 or float64, any shape and strides without overlap.
            stddev: Absolute standard deviation, rounded up to ``out``'s precision.
            step: Logical step, 0 … 2^63 - 1. A pair (step, stream) is for one release only.
            stream: Number of the parameter within the step, 0 … 2^32 - 1.

        Raises:
            InvalidInputError: If an argument is out of range, or ``out`` has a narrower dtype than
                float32, overlapping memory or needs a gradient.
            NoiseUnavailableError: If ``out`` is not on the CPU.
        """
        return self._write(out, stddev, step, stream, add=False)

    def add_normal_(self, out: Tensor, *, stddev: float, step: int, stream: int) -> Tensor:
        """Adds what ``fill_normal_`` would write, in place and without a full-size buffer; returns ``out``.

        Arguments and errors are those of ``fill_normal_``.
        """
        return self._write(out, stddev, step, stream, add=True)

    def _write(self, out: Tensor, stddev: float, step: int, stream: int, *, add: bool) -> Tensor:
        _check_target(out)
        scale = checked_stddev(stddev, out.dtype)
        step, stream = checked_position(step, stream)
        if out.numel() == 0:
            return out
        target = out.detach().numpy()
        contiguous = out.is_contiguous()
        # A flat iterator walks any strides in row-major order, slowly, without copying the tensor.
        flat: Any = target.reshape(-1) if contiguous else target.flat
        chunks = self._chunks32 if out.dtype is torch.float32 else self._chunks64

        def write_span(first: int) -> None:
            last = min(first + SPAN_NUMBERS, out.numel())
            for start, numbers in chunks(first, last, scale, step, stream):
                stop = start + len(numbers)
                if add:
                    numbers += flat[start:stop]
                flat[start:stop] = numbers

        _run_spans(write_span, out.numel(), threads=torch.get_num_threads() if contiguous else 1)
        torch.autograd.graph.increment_version(out)
        return out

    def _chunks32(self, first: int, last: int, scale: float, step: int, stream: int) -> Iterator[tuple[int, Floats]]:
        reader = self._keystream.reader(
            Domain.FLOAT32, step=step, stream=stream, block=4 * first // self._keystream.block_bytes
        )
        for start in range(first, last, CHUNK_NUMBERS):
            count = min(CHUNK_NUMBERS, last - start)
            tiles = -(-count // TILE_NUMBERS)
            words = reader.read(tiles * TILE_NUMBERS * 4).view("<u4").reshape(tiles, 2, TILE_PAIRS)

            def refine(pairs: Indices, start: int = start) -> Words32:
                return self._keystream.words32_at(
                    Domain.FLOAT32_REFINEMENT, step=step, stream=stream, indices=pairs + start // 2
                )

            yield start, normals_float32(words, refine, np.float32(scale)).reshape(-1)[:count]

    def _chunks64(self, first: int, last: int, scale: float, step: int, stream: int) -> Iterator[tuple[int, Floats]]:
        reader = self._keystream.reader(
            Domain.FLOAT64, step=step, stream=stream, block=8 * first // self._keystream.block_bytes
        )
        for start in range(first, last, CHUNK_NUMBERS):
            count = min(CHUNK_NUMBERS, last - start)
            tiles = -(-count // TILE_NUMBERS)
            words = reader.read(tiles * TILE_NUMBERS * 8).view("<u8").reshape(tiles, 2, TILE_PAIRS)
            yield start, normals_float64(words, scale).reshape(-1)[:count]


def _run_spans(write_span: Callable[[int], None], total: int, *, threads: int) -> None:
    spans = range(0, total, SPAN_NUMBERS)
    if threads == 1 or len(spans) == 1:
        for first in spans:
            write_span(first)
        return
    with ThreadPoolExecutor(max_workers=min(threads, len(spans))) as pool:
        for done in [pool.submit(write_span, first) for first in spans]:
            done.result()


def checked_stddev(stddev: object, dtype: torch.dtype) -> float:
    """Returns ``stddev`` as a float that ``dtype`` holds exactly, rounded up: noise is never too small.

    Raises:
        InvalidInputError: If it is not a positive finite number, or would over- or underflow.
    """
    value = positive_finite("stddev", stddev, remedy=_STDDEV_REMEDY)
    if dtype is torch.float64:
        return value
    # Far from float32's ends, so that neither a tail value nor a number next to zero leaves its range.
    if not 2.0**-80 <= value <= 2.0**120:
        raise InvalidInputError("stddev", stddev, bound="between 2^-80 and 2^120 for float32", remedy="Use float64.")
    rounded = np.float32(value)
    return float(rounded if float(rounded) >= value else np.nextafter(rounded, np.float32(math.inf)))


def _check_target(out: object) -> None:
    if not isinstance(out, Tensor):
        raise InvalidInputError("out", type(out).__name__, bound="a torch.Tensor", remedy="Pass torch.empty(...).")
    if out.device.type != "cpu":
        raise NoiseUnavailableError(
            f"out is on {str(out.device)!r}, but this generator writes to the CPU only. "
            "Keep the sums on the CPU, or fill a CPU tensor and copy it over."
        )
    if out.dtype not in (torch.float32, torch.float64):
        raise InvalidInputError(
            "out.dtype", out.dtype, bound="float32 or float64, because narrower noise leaks through its rounding",
            remedy="Keep clipped sums and noise in float32 and convert after the noise is added.",
        )
    if out.layout is not torch.strided or out.is_neg():
        raise InvalidInputError("out", out.layout, bound="a plain dense tensor", remedy="Pass out.to_dense().clone().")
    if out.requires_grad and torch.is_grad_enabled():
        raise InvalidInputError(
            "out.requires_grad", True, bound="False outside torch.no_grad()",
            remedy="Call under torch.no_grad(), or pass the gradient's sum.",
        )
    if out.numel() > MAX_NUMBERS:
        raise InvalidInputError("out.numel()", out.numel(), bound=f"at most {MAX_NUMBERS}", remedy="Split the tensor.")
    if _may_overlap(out):
        raise InvalidInputError(
            "out.stride()", tuple(out.stride()), bound="free of overlap, or elements would share noise",
            remedy="Pass out.contiguous() or a clone.",
        )


def _may_overlap(out: Tensor) -> bool:
    """Whether two elements may lie at the same address (an expanded tensor, a sliding window)."""
    reach = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
