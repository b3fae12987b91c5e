"""The key-stream of SHAKE256 in counter mode: 256-bit strength against quantum attackers with a 512-bit key.

Layout, so that another implementation can reproduce the bytes (all numbers little-endian):

    generator key = key.derive("noise.keystream.shake256")                        32 or 64 bytes
    block b       = first 1,024 bytes of SHAKE256(
                        "dpfa.shake.v1" | length of key : 1 | key | step : 8 | domain : 4 | stream : 4 | b : 8)

The message is shorter than the sponge's rate of 136 bytes, its fields have fixed places once the key's length
is read, so different positions are different messages. A block is 1,024 bytes because a shorter one would spend
more of its permutations on absorbing (measured: 512 bytes are 10 % slower, 4,096 bytes 18 % faster).
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, NoReturn

import numpy as np

from dp_flash_attention.core.errors import NoiseUnavailableError
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.keystream import Bytes, Domain, Indices, Stream, Words32

_PERSON: Final = b"dpfa.shake.v1"
_BLOCK_BYTES: Final = 1024


class _ShakeStream:
    block_bytes = _BLOCK_BYTES

    def __init__(self, key: bytes, step: int, stream: int) -> None:
        self._prefix = _PERSON + struct.pack("<B", len(key)) + key + struct.pack("<Q", step)
        self._stream = stream

    def read(self, num_bytes: int, *, domain: Domain, block: int, buffer: Bytes) -> Bytes:
        rows = buffer[:num_bytes].reshape(-1, _BLOCK_BYTES)
        for index, row in enumerate(rows):
            row[:] = np.frombuffer(self._block(domain, block + index, _BLOCK_BYTES), dtype=np.uint8)
        return buffer[:num_bytes]

    def words32_at(self, indices: Indices, *, domain: Domain) -> Words32:
        words = np.empty(len(indices), dtype=np.uint32)
        for position, index in enumerate(indices.tolist()):
            block, word = divmod(index, _BLOCK_BYTES // 4)
            # A shorter output is the beginning of a longer one: squeeze no further than the word.
            words[position] = struct.unpack_from("<I", self._block(domain, block, 4 * word + 4), 4 * word)[0]
        return words

    def _block(self, domain: Domain, block: int, num_bytes: int) -> bytes:
        message = self._prefix + struct.pack("<IIQ", domain, self._stream, block)
        return hashlib.shake_256(message).digest(num_bytes)


class ShakeKeystream:
    """The streams of SHAKE256; the layout is in the module's docstring.

    Args:
        key: Master key; the streams use a subkey of their own. A 512-bit one for 256-bit quantum strength.
    """

    def __init__(self, key: NoiseKey) -> None:
        self._key = key.derive("noise.keystream.shake256").export()

    def at(self, *, step: int, stream: int) -> Stream:
        """Returns the stream of a position."""
        return _ShakeStream(self._key, step, stream)

    def kernel_key(self, step: int) -> NoReturn:
        """Refuses: no kernel makes these integers.

        Raises:
            NoiseUnavailableError: Always.
        """
        raise NoiseUnavailableError(
            f"SHAKE256 has no GPU kernel, but noise of step {step} was asked for on a GPU. Keep it on the CPU."
        )
