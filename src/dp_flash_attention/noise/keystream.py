"""The layout of random words: which position of which cipher stream each number comes from.

A *position* is (key, purpose, domain, step, stream). Every position owns one stream of bytes with random
access; different positions never share a byte. Streams are cut into tiles so that threads, chunks, a fill
or an add, and a GPU kernel all read the same words for the same element:

    float32, tile t of ``TILE_PAIRS`` = 512 pairs = 1,024 numbers = 4,096 bytes (little-endian uint32):
        words [t*1024       , t*1024 +  512)  radius words of pairs t*512 ...
        words [t*1024 +  512, t*1024 + 1024)  angle words of the same pairs
        element t*1024 + i        is the first number of pair t*512 + i      (i < 512)
        element t*1024 + 512 + i  is the second number of that pair
    float64: the same with uint64 words, 8,192 bytes a tile, in a domain of its own.
    refinement (float32 only): pair p reads uint32 word p of the domain ``FLOAT32_REFINEMENT``, and only if
        its radius word is below ``normals.REFINE_BELOW``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import non_negative_int

TILE_PAIRS = 512
TILE_NUMBERS = 2 * TILE_PAIRS
MAX_STEP = 2**63 - 1
MAX_STREAM = 2**32 - 1
# 2^44 numbers of 8 bytes are 2^47 bytes: every cipher's block counter (layouts in secure.py, fast.py) holds that.
MAX_NUMBERS = 2**44

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


class Reader(Protocol):
    """Reads one position's stream forward. Not shared between threads."""

    def read(self, num_bytes: int) -> Bytes:
        """Returns the next ``num_bytes`` (a whole number of blocks), valid until the next call."""


class Keystream(Protocol):
    """Random access to the streams of one key. Immutable, so threads may share it."""

    @property
    def block_bytes(self) -> int:
        """Size of the unit that the counter counts."""

    def reader(self, domain: Domain, *, step: int, stream: int, block: int = 0) -> Reader:
        """Returns a reader whose first byte is the first byte of ``block``."""

    def words32_at(self, domain: Domain, *, step: int, stream: int, indices: Indices) -> Words32:
        """Returns the little-endian uint32 words at ``indices`` of the stream."""


def checked_position(step: object, stream: object) -> tuple[int, int]:
    """Returns (step, stream) as ints inside the range that the counters can hold.

    Raises:
        InvalidInputError: If one of them is not a whole number in range.
    """
    checked_step = non_negative_int("step", step, remedy="Count logical steps from 0.")
    checked_stream = non_negative_int("stream", stream, remedy="Number parameters from 0.")
    # A larger value would have to wrap round, and a wrapped position is a reused one.
    if checked_step > MAX_STEP:
        raise InvalidInputError("step", step, bound=f"at most {MAX_STEP}", remedy="Start a new key instead.")
    if checked_stream > MAX_STREAM:
        raise InvalidInputError("stream", stream, bound=f"at most {MAX_STREAM}", remedy="Start a new key instead.")
    return checked_step, checked_stream


def checked_count(name: str, count: object) -> int:
    """Returns ``count`` as an int that one position can serve.

    Raises:
        InvalidInputError: If it is not a whole number in [0, ``MAX_NUMBERS``].
    """
    checked = non_negative_int(name, count, remedy="Ask for a number of values.")
    if checked > MAX_NUMBERS:
        raise InvalidInputError(name, count, bound=f"at most {MAX_NUMBERS}", remedy="Spread it over several streams.")
    return checked
