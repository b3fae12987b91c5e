"""The layout of random words: which position of which cipher stream each number comes from.

A *position* is (key, domain, step, stream). Every position owns one stream of bytes with random access, and
different positions never share a byte. Streams are cut into tiles, so that threads, chunks, a fill, an add
and a GPU kernel all read the same words for the same element:

    float32, tile t of ``TILE_PAIRS`` = 1,024 pairs = 2,048 numbers = 8,192 bytes (little-endian uint32):
        words t*2048        + i   radius word of pair t*1024 + i            (0 <= i < 1024)
        words t*2048 + 1024 + i   angle word of the same pair
        number t*2048        + i  first number of that pair
        number t*2048 + 1024 + i  second number of that pair
    float64: the same with uint64 words, 16,384 bytes a tile, in a domain of its own.
    refinement (float32 only): pair p reads uint32 word p of the domain ``FLOAT32_REFINEMENT``, and only if
        its radius word is below ``normals.REFINE_BELOW``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import non_negative_int
from dp_flash_attention.noise.device import KernelKey

TILE_PAIRS: Final = 1024
TILE_NUMBERS: Final = 2 * TILE_PAIRS
MAX_STEP: Final = 2**63 - 1
MAX_STREAM: Final = 2**32 - 1
# 2^44 numbers of 8 bytes are 2^47 bytes, which every block counter (layouts in secure.py and fast.py) can
# count.
MAX_NUMBERS: Final = 2**44
MAX_READ_BYTES: Final = 1 << 21
# Some versions of cryptography want room behind the payload: a cipher block less one byte.
_SLACK_BYTES: Final = 16

Bytes = npt.NDArray[np.uint8]
Words32 = npt.NDArray[np.uint32]
Indices = npt.NDArray[np.int64]


class Domain(IntEnum):
    """What a stream is read for. Part of every cipher's initial counter, so domains never share a byte."""

    FLOAT32 = 1
    FLOAT32_REFINEMENT = 2
    FLOAT64 = 3
    BITS = 4
    BERNOULLI = 5
    DISCRETE_LAPLACE = 6
    DISCRETE_GAUSSIAN = 7
    DISCRETE_GAUSSIAN_OVERFLOW = 8


class Stream(Protocol):
    """The bytes of one (key, step, stream), with random access. Immutable: threads may share it."""

    @property
    def block_bytes(self) -> int:
        """Size of the unit that the counter counts."""

    def read(self, num_bytes: int, *, domain: Domain, block: int, buffer: Bytes) -> Bytes:
        """Returns ``num_bytes`` that start at ``block``.

        Args:
            num_bytes: A whole number of blocks, at most ``MAX_READ_BYTES``.
            domain: What the bytes are for.
            block: Index of the first block.
            buffer: Scratch from ``new_buffer(num_bytes)`` or larger; the result may lie in it.
        """

    def words32_at(self, indices: Indices, *, domain: Domain) -> Words32:
        """Returns the little-endian uint32 words at ``indices``, counted in words."""


class Keystream(Protocol):
    """The streams of one key."""

    def at(self, *, step: int, stream: int) -> Stream:
        """Returns the stream of a position whose range was checked."""

    def kernel_key(self, step: int) -> KernelKey:
        """Returns what a GPU kernel needs to read the streams of a step whose range was checked.

        Raises:
            NoiseUnavailableError: If no kernel makes these integers.
        """


def new_buffer(num_bytes: int) -> Bytes:
    """Returns scratch that ``Stream.read`` accepts for ``num_bytes``."""
    return np.empty(num_bytes + _SLACK_BYTES, dtype=np.uint8)


def checked_position(step: object, stream: object) -> tuple[int, int]:
    """Returns (step, stream) as ints inside the range that the counters can hold.

    Raises:
        InvalidInputError: If one of them is not a whole number in range.
    """
    checked_step = non_negative_int("step", step, remedy="Count logical steps from 0.")
    checked_stream = non_negative_int("stream", stream, remedy="Number parameters from 0.")
    # A larger value would have to wrap round, and a wrapped position is a reused one.
    if checked_step > MAX_STEP:
        raise InvalidInputError("step", step, bound=f"at most {MAX_STEP}", remedy="Start a new key.")
    if checked_stream > MAX_STREAM:
        raise InvalidInputError("stream", stream, bound=f"at most {MAX_STREAM}", remedy="Start a new key.")
    return checked_step, checked_stream


def checked_count(name: str, count: object) -> int:
    """Returns ``count`` as an int that one position can serve.

    Raises:
        InvalidInputError: If it is not a whole number in [0, ``MAX_NUMBERS``].
    """
    checked = non_negative_int(name, count, remedy="Ask for a number of values.")
    if checked > MAX_NUMBERS:
        raise InvalidInputError(name, count, bound=f"at most {MAX_NUMBERS}", remedy="Use several streams.")
    return checked
