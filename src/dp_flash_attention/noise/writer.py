"""Writes normals into tensors, chunk by chunk, with several threads.

A chunk is a run of whole tiles at a fixed offset, so what lands in an element does not depend on threads,
on fill or add, or on how many elements follow.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dp_flash_attention.noise.chunk_threads import ChunkThreads
from dp_flash_attention.noise.device import KernelKey, require_triton
from dp_flash_attention.noise.keystream import (
    TILE_NUMBERS,
    TILE_PAIRS,
    Domain,
    Indices,
    Keystream,
    Stream,
    Words32,
    checked_position,
    new_buffer,
)
from dp_flash_attention.noise.normals import Float32Transform, normals_float64
from dp_flash_attention.noise.targets import (
    checked_row_stddev,
    checked_stddev,
    checked_target,
    checked_tensor,
    float32_two_variance,
    runs_on_kernel,
    scale_rows_,
)

# Threads meet at the interpreter's lock after every pass, so a pass must be long: on two cores of an AMD EPYC 9004,
# chunks of 32 tiles make 186 million numbers a second (one thread: 223), 128 tiles 385 (268), 256 tiles 432 (275).
# 128 because a tensor of fewer than two chunks is written by one thread.
CHUNK_NUMBERS: Final = 128 * TILE_NUMBERS

Floats = npt.NDArray[Any]


class _Worker:
    """One thread's scratch, and the work of one chunk."""

    def __init__(self) -> None:
        self._buffer = new_buffer(8 * CHUNK_NUMBERS)
        self._transform = Float32Transform(CHUNK_NUMBERS // TILE_NUMBERS)
        self.numbers = np.empty(CHUNK_NUMBERS, dtype=np.float32)

    def words(self, source: Stream, domain: Domain, start: int, tiles: int, dtype: str) -> npt.NDArray[Any]:
        item_bytes = np.dtype(dtype).itemsize
        block = item_bytes * start // source.block_bytes
        read = source.read(tiles * TILE_NUMBERS * item_bytes, domain=domain, block=block, buffer=self._buffer)
        return read.view(dtype).reshape(tiles, 2, TILE_PAIRS)

    def write_float32(self, source: Stream, start: int, two_variance: np.float32, out: Floats) -> None:
        tiles = len(out) // TILE_NUMBERS

        def refine(pairs: Indices) -> Words32:
            return source.words32_at(pairs + start // 2, domain=Domain.FLOAT32_REFINEMENT)

        words = self.words(source, Domain.FLOAT32, start, tiles, "<u4")
        self._transform.write(words, refine, two_variance, out.reshape(tiles, 2, TILE_PAIRS))

    def float64(self, source: Stream, start: int, stddev: float, tiles: int) -> Floats:
        return normals_float64(self.words(source, Domain.FLOAT64, start, tiles, "<u8"), stddev).reshape(-1)


class CounterNormalGenerator:
    """Normals from a key-stream with random access; the named generators are thin shells of it.

    Uses ``torch.get_num_threads()`` threads; the numbers do not depend on how many.

    Args:
        keystream: Where the random words come from.
        uses_test_key: Whether the key is a ``TestKey``; nothing made with one is private.
    """

    name: str

    def __init__(self, keystream: Keystream, *, uses_test_key: bool) -> None:
        self._keystream = keystream
        self._threads = ChunkThreads(_Worker, CHUNK_NUMBERS)
        self.uses_test_key = uses_test_key

    def kernel_key(self, step: int) -> KernelKey:
        """Returns what a GPU kernel needs to make this generator's numbers at ``step``.

        Raises:
            InvalidInputError: If ``step`` is out of range.
            NoiseUnavailableError: If no kernel makes them (AES-256-CTR).
        """
        step, _ = checked_position(step, 0)
        return self._keystream.kernel_key(step)

    def fill_normal_(self, out: Tensor, *, stddev: float = 1.0, step: int, stream: int) -> Tensor:
        """Overwrites ``out`` with independent N(0, stddev²) numbers and returns it.

        The numbers depend on (key, dtype, step, stream, element index in row-major order) alone. A longer
        tensor starts with the numbers of a shorter one.

        Args:
            out: float32 or float64 on the CPU, any shape and strides without overlap; or float32 and
                contiguous on a CUDA device, where the numbers are the same up to their last bits.
            stddev: Absolute standard deviation, rounded up to ``out``'s precision.
            step: Logical step, 0 to 2^63 - 1. A pair (step, stream) is for one release only.
            stream: Number of the parameter within the step, 0 to 2^32 - 1.

        Raises:
            InvalidInputError: If an argument is out of range, or ``out`` has a narrower dtype than
                float32, overlapping memory or needs a gradient.
            NoiseUnavailableError: If ``out`` is on a device that this generator has no kernel for.
            DependencyMissingError: If ``out`` is on a CUDA device and triton is missing.
            NoiseReuseError: If a CUDA graph is being captured.
        """
        return self._write(out, stddev, step, stream, add=False)

    def add_normal_(self, out: Tensor, *, stddev: float, step: int, stream: int) -> Tensor:
        """Adds what ``fill_normal_`` would write, in place and without a full-size buffer; returns ``out``.

        Arguments and errors are those of ``fill_normal_``.
        """
        return self._write(out, stddev, step, stream, add=True)

    def add_row_normal_(self, out: Tensor, *, row_stddev: Tensor, step: int, stream: int) -> Tensor:
        """Adds ``row_stddev[i]`` times what ``fill_normal_(stddev=1)`` would write to row i; returns ``out``.

        Args:
            out: CPU tensor [rows, width], float32 or float64, contiguous.
            row_stddev: [rows], on the CPU, of the same dtype; each is used as it is, so round it up.
            step: As in ``fill_normal_``.
            stream: As in ``fill_normal_``.

        Raises:
            InvalidInputError: If an argument is out of range, or shapes or dtypes do not fit.
            NoiseUnavailableError: If ``out`` is not on the CPU.
        """
        return self._write(out, 1.0, step, stream, add=True, rows=checked_row_stddev(row_stddev, out))

    def _write(
        self, out: Tensor, stddev: float, step: int, stream: int, *, add: bool, rows: Floats | None = None
    ) -> Tensor:
        if runs_on_kernel(out):
            return self._launch(out, stddev, step, stream, add=add)
        target = checked_target(out)
        scale = checked_stddev(stddev, out.dtype)
        step, stream = checked_position(step, stream)
        total = out.numel()
        source = self._keystream.at(step=step, stream=stream)
        two_variance = float32_two_variance(scale) if out.dtype is torch.float32 else np.float32(0.0)
        contiguous = out.is_contiguous()
        # A flat iterator walks any strides in row-major order, slowly, without copying the tensor.
        flat: Any = target.reshape(-1) if contiguous else target.flat

        def write_chunk(worker: _Worker, start: int) -> None:
            stop = min(start + CHUNK_NUMBERS, total)
            tiles = -(-(stop - start) // TILE_NUMBERS)
            if out.dtype is torch.float64:
                numbers = worker.float64(source, start, scale, tiles)
            elif contiguous and not add and stop - start == tiles * TILE_NUMBERS:
                worker.write_float32(source, start, two_variance, flat[start:stop])
                return
            else:
                numbers = worker.numbers[: tiles * TILE_NUMBERS]
                worker.write_float32(source, start, two_variance, numbers)
            numbers = numbers[: stop - start]
            if rows is not None:
                scale_rows_(numbers, start, rows, total // len(rows))
            if add and contiguous:
                np.add(flat[start:stop], numbers, out=flat[start:stop])
            else:
                flat[start:stop] = np.add(flat[start:stop], numbers, out=numbers) if add else numbers

        if total:
            self._threads.run(write_chunk, total, num_threads=torch.get_num_threads() if contiguous else 1)
            # NumPy wrote behind autograd's back: a backward pass that saved the old values must notice.
            torch.autograd.graph.increment_version(out)
        return out

    def _launch(self, out: Tensor, stddev: float, step: int, stream: int, *, add: bool) -> Tensor:
        out = checked_tensor(out)
        scale = checked_stddev(stddev, out.dtype)
        step, stream = checked_position(step, stream)
        key = self.kernel_key(step)
        require_triton(f"Noise {self.name!r} on device {str(out.device)!r}")
        from dp_flash_attention.noise.kernels import write_normals

        if out.numel():
            write_normals(out, two_variance=float32_two_variance(scale), key=key, stream=stream, add=add)
            torch.autograd.graph.increment_version(out)
        return out
