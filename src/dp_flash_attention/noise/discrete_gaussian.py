"""Exact noise: integers from the discrete Gaussian N_ℤ(0, σ²), by position, with a certified distance."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from numbers import Rational
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise.chunk_threads import ChunkThreads
from dp_flash_attention.noise.device import KernelKey, require_triton
from dp_flash_attention.noise.discrete_gaussian_layers import (
    DEFAULT_MAX_DISTANCE,
    Layers,
    certify_layers,
    plan_layers,
)
from dp_flash_attention.noise.discrete_gaussian_scan import OVERFLOW_BYTES, TILE, TILE_BYTES, TableScan
from dp_flash_attention.noise.discrete_gaussian_table import DiscreteGaussianTable
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.keystream import (
    MAX_READ_BYTES,
    Bytes,
    Domain,
    Keystream,
    Stream,
    checked_count,
    checked_position,
    new_buffer,
)
from dp_flash_attention.noise.secure import CipherKeystream
from dp_flash_attention.noise.shake import ShakeKeystream
from dp_flash_attention.noise.targets import checked_integer_target, checked_integer_tensor, runs_on_kernel

if TYPE_CHECKING:
    from dp_flash_attention.noise.kernels.exact_writer import KernelTables

ExactCipher = Literal["aes-256-ctr", "chacha20", "shake256"]

# Tiles drawn at once: they share what a call of a cipher or of NumPy costs by itself, and threads meet less often at
# the interpreter's lock (σ = 32 on two cores of an AMD EPYC 9004: 61 million a second with 4, 99 with 16).
_MAX_CHUNK_TILES: Final = 16
_INT32_LIMIT: Final = 2**31

Integers = npt.NDArray[Any]
Consume = Callable[[int, Integers], None]
"""Takes the place of the first number and some numbers, int32 or int64; they are scratch, which it may use up."""


class _Worker:
    """One thread's scratch, and the work of one chunk."""

    def __init__(
        self, tables: tuple[DiscreteGaussianTable, ...], multiplier: int, largest: int, chunk_tiles: int
    ) -> None:
        scans = {table.variance: TableScan(table, chunk_tiles) for table in tables}
        self._layers = [scans[table.variance] for table in tables]
        self._layer_bytes = len(tables) * TILE_BYTES
        self._buffer = new_buffer(chunk_tiles * self._layer_bytes)
        self._sum = np.empty(chunk_tiles * TILE, dtype=np.int32 if largest < _INT32_LIMIT else np.int64)
        self._multiplier = self._sum.dtype.type(multiplier)

    def write(self, source: Stream, start: int, out: Integers, *, add: bool) -> None:
        """Writes or adds samples start … start + len(out) - 1, where ``start`` begins a tile."""
        samples = self.samples(source, start, len(out))
        if add:
            np.add(out, samples, out=out)
        else:
            np.copyto(out, samples)

    def samples(self, source: Stream, start: int, num: int) -> Integers:
        """Returns samples start … start + num - 1, which lie in scratch."""
        num_tiles = -(-num // TILE)
        words = source.read(
            num_tiles * self._layer_bytes,
            domain=Domain.DISCRETE_GAUSSIAN,
            block=start // TILE * self._layer_bytes // source.block_bytes,
            buffer=self._buffer,
        )
        return self._samples(
            source, start // TILE, words.reshape(num_tiles, len(self._layers), TILE_BYTES), num
        )

    def _samples(self, source: Stream, first_tile: int, words: Bytes, num: int) -> Integers:
        """Horner's scheme from the top layer down; layer i reads the i-th part of each tile's bytes."""
        total, top = self._sum[:num], len(self._layers) - 1
        for layer in range(top, -1, -1):

            def read_overflow(tile: int, layer: int = layer) -> Bytes:
                part = (first_tile + tile) * len(self._layers) + layer
                return source.read(
                    OVERFLOW_BYTES,
                    domain=Domain.DISCRETE_GAUSSIAN_OVERFLOW,
                    block=part * OVERFLOW_BYTES // source.block_bytes,
                    buffer=new_buffer(OVERFLOW_BYTES),
                )

            drawn = self._layers[layer].draw(words[:, layer], num, read_overflow)
            if layer == top:
                np.copyto(total, drawn)
            else:
                np.multiply(total, self._multiplier, out=total)
                np.add(total, drawn, out=total)
        return total


class DiscreteGaussianGenerator:
    """Independent integers X with P(X = k) ∝ exp(-k²/(2σ²)), up to a certified distance.

    Uses ``torch.get_num_threads()`` threads; the numbers do not depend on how many.

    Args:
        key: Secret of the run. A ``TestKey`` makes a generator whose ``uses_test_key`` is true.
        stddev: σ, positive and rational; a float is taken as the exact dyadic number it is. Give this or
            ``variance``.
        variance: σ², positive and rational.
        cipher: ``"aes-256-ctr"`` (fastest on CPUs), ``"chacha20"``, the one that GPUs can run, or ``"shake256"``.
        max_distance: Largest certified total variation per sample that is accepted.
        layers: How to put wide samples together, if not as ``plan_layers`` says; instead of σ.

    Attributes:
        certificate: The law that is realised (its variance is exactly the one asked for), how it is put together
            and how far it is from the ideal law.
        tables: The tables in use, bottom layer first; public.

    Raises:
        InvalidInputError: If an argument is out of range, or the certified distance is above ``max_distance``.
        NoiseUnavailableError: If the cipher cannot be used.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: the caller's; this object turns a standard deviation
          into integers and knows nothing about data.
        * Public: σ, tables, layers, cipher, layout, step and stream numbers. Secret: the key.
        * Theorem: with truly random bits, N samples are within N·``certificate.total_variation`` of N independent
          ideal ones (proofs in ``certify_table`` and ``certify_layers``); with the cipher's bits, computationally
          so. No floating-point number takes part, so there is no rounding to leak through. Generators of different
          variances on one key share no bytes.
        * Time: which NumPy passes run, and over how many bytes, does not depend on the values, up to the two rare
          events stated in ``discrete_gaussian_scan``; NumPy, CPython and the processor promise no more.
        * Source: Canonne, Kamath & Steinke 2020 (the law and its privacy); Micciancio & Walter 2017 (tables and
          convolution); Peikert 2010.
    """

    name = "exact"

    def __init__(
        self,
        key: NoiseKey,
        *,
        stddev: Rational | float | None = None,
        variance: Rational | None = None,
        layers: Layers | None = None,
        cipher: ExactCipher = "aes-256-ctr",
        max_distance: Rational = DEFAULT_MAX_DISTANCE,
    ) -> None:
        if sum(given is not None for given in (stddev, variance, layers)) != 1:
            raise InvalidInputError(
                "stddev, variance, layers",
                (stddev, variance, layers),
                bound="exactly one of them",
                remedy="Pass stddev=4, or variance=Fraction(50, 3).",
            )
        if layers is None:
            exact = variance if stddev is None else _exact_stddev(stddev) ** 2
            layers = plan_layers(exact, max_distance=max_distance)  # type: ignore[arg-type]  # one is not None
        self.certificate, self.tables = certify_layers(layers, max_distance=max_distance)
        self.cipher = cipher
        self.uses_test_key = key.is_test_key
        self._keystream = _make_keystream(key, layers, cipher)
        self._kernel_tables: dict[torch.device, KernelTables] = {}
        tables, largest = self.tables, self.certificate.largest
        chunk_tiles = min(_MAX_CHUNK_TILES, MAX_READ_BYTES // (len(tables) * TILE_BYTES))
        self._chunk = chunk_tiles * TILE
        self._threads = ChunkThreads(
            lambda: _Worker(tables, layers.multiplier, largest, chunk_tiles), chunk=self._chunk
        )

    def kernel_key(self, step: int) -> KernelKey:
        """Returns what a GPU kernel needs to make this generator's integers at ``step``.

        Raises:
            InvalidInputError: If ``step`` is out of range.
            NoiseUnavailableError: If no kernel makes them: only ChaCha20 has one.
        """
        step, _ = checked_position(step, 0)
        return self._keystream.kernel_key(step)

    @property
    def variance(self) -> Fraction:
        """σ² of the ideal law, exactly."""
        return self.certificate.variance

    def fill_(self, out: Tensor, *, step: int, stream: int) -> Tensor:
        """Overwrites ``out`` with independent samples and returns it.

        The numbers depend on (key, σ, cipher, step, stream, element index in row-major order) alone. A longer
        tensor starts with the numbers of a shorter one.

        Args:
            out: int64, any shape and strides without overlap on the CPU; contiguous on a CUDA device, where the
                integers are the same.
            step: Logical step, 0 to 2^63 - 1. A pair (step, stream) is for one release only.
            stream: Number of the tensor within the step, 0 to 2^32 - 1.

        Raises:
            InvalidInputError: If an argument is out of range, or ``out`` is not int64 or has overlapping memory.
            NoiseUnavailableError: If ``out`` is on a CUDA device and the cipher is not ``"chacha20"``, or on another
                device.
            DependencyMissingError: If ``out`` is on a CUDA device and triton is missing.
            NoiseReuseError: If a CUDA graph is being captured.
        """
        return self._write(out, step, stream, add=False)

    def add_(self, out: Tensor, *, step: int, stream: int) -> Tensor:
        """Adds what ``fill_`` would write, in place, modulo 2^64 as int64 does; returns ``out``.

        Arguments and errors are those of ``fill_``.
        """
        return self._write(out, step, stream, add=True)

    def stream(self, num: int, consume: Consume, *, step: int, stream: int) -> None:
        """Hands what ``fill_`` would write to ``consume``, chunk by chunk while it is in the cache, from several threads.

        Args:
            num: How many samples.
            consume: Takes the place of the first one and a piece, int32 or int64, which is scratch.
            step: As in ``fill_``.
            stream: As in ``fill_``.

        Raises:
            InvalidInputError: If an argument is out of range.
        """
        count = checked_count("num", num)
        step, stream = checked_position(step, stream)
        source = self._keystream.at(step=step, stream=stream)

        def hand_chunk(worker: _Worker, start: int) -> None:
            consume(start, worker.samples(source, start, min(self._chunk, count - start)))

        if count:
            self._threads.run(hand_chunk, count, num_threads=torch.get_num_threads())

    def _write(self, out: Tensor, step: int, stream: int, *, add: bool) -> Tensor:
        if runs_on_kernel(out):
            return self._launch(out, step, stream, add=add)
        target = checked_integer_target(out)
        step, stream = checked_position(step, stream)
        total, contiguous = out.numel(), out.is_contiguous()
        source = self._keystream.at(step=step, stream=stream)
        # A flat iterator walks any strides in row-major order, slowly, without copying the tensor.
        flat: Any = target.reshape(-1) if contiguous else target.flat

        def write_chunk(worker: _Worker, start: int) -> None:
            stop = min(start + self._chunk, total)
            part = flat[start:stop]  # a view if contiguous, else a copy
            worker.write(source, start, part, add=add)
            if not contiguous:
                flat[start:stop] = part

        if total:
            self._threads.run(write_chunk, total, num_threads=torch.get_num_threads() if contiguous else 1)
            # NumPy wrote behind autograd's back.
            torch.autograd.graph.increment_version(out)
        return out

    def _launch(self, out: Tensor, step: int, stream: int, *, add: bool) -> Tensor:
        out = checked_integer_tensor(out)
        step, stream = checked_position(step, stream)
        key = self.kernel_key(step)
        require_triton(f"Exact noise on device {str(out.device)!r}")
        from dp_flash_attention.noise.kernels.exact_writer import KernelTables, write_discrete_gaussian

        tables = self._kernel_tables.get(out.device)
        if tables is None:
            tables = KernelTables.build(self.tables, self.certificate.layers.multiplier, out.device)
            self._kernel_tables[out.device] = tables
        if out.numel():
            write_discrete_gaussian(out, tables=tables, key=key, stream=stream, add=add)
            torch.autograd.graph.increment_version(out)
        return out


def _make_keystream(key: NoiseKey, layers: Layers, cipher: ExactCipher) -> Keystream:
    # One key for each law: bits that two laws shared would make their samples dependent.
    law = ",".join(str(variance) for variance in layers.variances)
    key = key.derive(f"noise.discrete-gaussian.v1:{layers.multiplier}:{law}")
    if cipher == "shake256":
        return ShakeKeystream(key)
    if cipher not in ("aes-256-ctr", "chacha20"):
        bound = "one of aes-256-ctr, chacha20, shake256"
        raise InvalidInputError("cipher", cipher, bound=bound, remedy="Use 'aes-256-ctr' if in doubt.")
    return CipherKeystream(key, cipher)


def _exact_stddev(stddev: object) -> Fraction:
    bound, remedy = "a positive finite rational number", "Pass σ as a Fraction, an int or a float."
    if isinstance(stddev, bool) or not isinstance(stddev, Rational | float):
        raise InvalidInputError("stddev", stddev, bound=bound, remedy=remedy)
    try:
        exact = Fraction(stddev)
    except (ValueError, OverflowError) as error:
        raise InvalidInputError("stddev", stddev, bound=bound, remedy=remedy) from error
    if exact <= 0:
        raise InvalidInputError("stddev", stddev, bound=bound, remedy=remedy)
    return exact
