"""Philox4x64-10, a counter-based generator: statistical quality, no secrecy.

Layout, so that a GPU kernel can reproduce the integers (all words little-endian uint64):

    generator key   = key.derive("noise.keystream.philox4x64")
    Philox key      = (k0, k1), the first 16 bytes of the generator key
    Philox counter  = (block + 1, domain << 32 | stream, step, 0), first word least significant
    block b         = philox4x64_10(counter, key): four words, 32 bytes, in order

``block + 1`` because NumPy's bit generator increments its counter before it produces a block. The counter's
words are separate fields, and ``keystream.py`` bounds block, stream and step, so no two positions share a
counter.
"""

from __future__ import annotations

import struct

import numpy as np

from dp_flash_attention.noise.device import KernelKey
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.keystream import Bytes, Domain, Indices, Stream, Words32
from dp_flash_attention.noise.writer import CounterNormalGenerator

_MASK64 = (1 << 64) - 1
# Salmon, Moraes, Dror & Shaw 2011, table 2: round multipliers and Weyl constants of Philox-4x64.
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


def philox4x64_block(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns one block of four uint64 words, in plain integers (Salmon et al. 2011, section 3.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 64) ^ c1 ^ k0,
            product1 & _MASK64,
            (product0 >> 64) ^ c3 ^ k1,
            product0 & _MASK64,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK64, (k1 + _WEYL[1]) & _MASK64
    return c0, c1, c2, c3


class _PhiloxStream:
    block_bytes = 32

    def __init__(self, key: tuple[int, int], step: int, stream: int) -> None:
        self._key = key
        self._step = step
        self._stream = stream

    def read(self, num_bytes: int, *, domain: Domain, block: int, buffer: Bytes) -> Bytes:
        counter = np.array([block, (int(domain) << 32) | self._stream, self._step, 0], dtype=np.uint64)
        philox = np.random.Philox(key=np.array(self._key, dtype=np.uint64), counter=counter)
        return philox.random_raw(num_bytes // 8).astype("<u8", copy=False).view(np.uint8)

    def words32_at(self, indices: Indices, *, domain: Domain) -> Words32:
        # A block in plain integers takes half the time of building a NumPy generator for it.
        words = np.empty(len(indices), dtype=np.uint32)
        for position, index in enumerate(indices.tolist()):
            block, word = divmod(index, 8)
            counter = (block + 1, (int(domain) << 32) | self._stream, self._step, 0)
            pair = philox4x64_block(counter, self._key)[word >> 1]
            words[position] = (pair >> 32 * (word & 1)) & 0xFFFFFFFF
        return words


class PhiloxKeystream:
    """The streams of Philox4x64-10; the layout is in the module's docstring.

    Args:
        key: Master key; the streams use a subkey of their own.
    """

    def __init__(self, key: NoiseKey) -> None:
        k0, k1 = struct.unpack("<QQ", key.derive("noise.keystream.philox4x64").export()[:16])
        self._key: tuple[int, int] = (k0, k1)

    def at(self, *, step: int, stream: int) -> Stream:
        """Returns the stream of a position."""
        return _PhiloxStream(self._key, step, stream)

    def kernel_key(self, step: int) -> KernelKey:
        """Returns the generator's key and the step for a GPU kernel."""
        return KernelKey.from_bytes("philox4x64", struct.pack("<QQ", *self._key), step=step)


class FastNormalGenerator(CounterNormalGenerator):
    """Standard normals from Philox4x64-10, full tail. For research; never the default.

    Args:
        key: Key of the run; reproducible noise needs a ``TestKey``.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: the caller's; this object knows nothing about data.
        * Public: the layout. Philox is **not** a cipher: whoever sees enough outputs may recover its key.
        * Theorem: none. It passes the BigCrush statistical tests (Salmon et al. 2011, section 5), so (ε, δ)
          analysed for ideal normals holds only against observers who do not attack the generator.
        * Source: Salmon, Moraes, Dror & Shaw 2011 (Philox), Box & Muller 1958.
    """

    name = "fast"

    def __init__(self, key: NoiseKey) -> None:
        super().__init__(PhiloxKeystream(key), uses_test_key=key.is_test_key)
