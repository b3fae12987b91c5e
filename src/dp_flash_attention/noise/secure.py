"""Cryptographic key-streams: AES-256-CTR and ChaCha20, from ``cryptography``.

Layout (all of it fixed, so that another implementation can reproduce the bytes):

    generator key = key.derive("noise.keystream.<cipher>")          one per (key, purpose, cipher)
    step key      = BLAKE2b-256(key = generator key, person = "dpfa.step.v1", data = uint64le(step))

    AES-256-CTR   initial counter block, 16 bytes, big-endian as NIST SP 800-38A increments it:
                  [ domain : 4 | stream : 4 | block : 8 ]
    ChaCha20      RFC 8439 state words 12..15, little-endian:
                  [ block mod 2^32 : 4 | domain : 4 | stream : 4 | block div 2^32 : 4 ]

Why positions never collide: different steps have different keys (up to a BLAKE2b collision, 2^-128 for 2^64
steps); within a step the counter block holds (domain, stream, block) without overlap, and ``keystream.py``
bounds all three so that no field overflows into its neighbour.

Why the birthday bound is small: AES is a permutation, so a counter stream never repeats a block where true
randomness would. With b blocks under one step key that costs at most b^2 / 2^129 (PRP/PRF switching lemma,
Bellare & Rogaway 2006). One step over 10^9 float32 parameters reads 2^28 blocks, hence 2^-73; 10^6 such
steps, 2^-53. ChaCha20's block function is no permutation of its counter and has no such term.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise.device import KernelKey
from dp_flash_attention.noise.entropy import KEY_BYTES, NoiseKey
from dp_flash_attention.noise.keystream import (
    MAX_READ_BYTES,
    Bytes,
    Domain,
    Indices,
    Stream,
    Words32,
    new_buffer,
)
from dp_flash_attention.noise.writer import CounterNormalGenerator

Cipher = Literal["aes-256-ctr", "chacha20"]

_STEP_PERSON: Final = b"dpfa.step.v1"
_CHACHA_RUN_BLOCKS: Final = 1 << 32
# A cipher encrypts zeros: the ciphertext is the key-stream.
_ZEROS: Final = memoryview(bytes(MAX_READ_BYTES))


def _import_ciphers() -> tuple[Any, Any, Any]:
    """Imports ``cryptography`` only when a secure stream is really built."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher as CipherContext
        from cryptography.hazmat.primitives.ciphers import algorithms, modes
    except ImportError as error:
        raise NoiseUnavailableError(
            f"Noise 'secure' needs the package cryptography, which cannot be imported ({error}). "
            "Run: pip install 'cryptography>=45'."
        ) from error
    return CipherContext, algorithms, modes


def _step_key(generator_key: bytes, step: int) -> bytes:
    data = struct.pack("<Q", step)
    return hashlib.blake2b(data, key=generator_key, digest_size=KEY_BYTES, person=_STEP_PERSON).digest()


class _AesCtrStream:
    block_bytes = 16

    def __init__(self, ciphers: tuple[Any, Any, Any], step_key: bytes, stream: int) -> None:
        self._context, algorithms, self._modes = ciphers
        self._aes = algorithms.AES(step_key)
        self._stream = stream

    def read(self, num_bytes: int, *, domain: Domain, block: int, buffer: Bytes) -> Bytes:
        counter = struct.pack(">IIQ", domain, self._stream, block)
        # update_into releases the GIL: several threads encrypt at the same time.
        self._context(self._aes, self._modes.CTR(counter)).encryptor().update_into(_ZEROS[:num_bytes], buffer)
        return buffer[:num_bytes]

    def words32_at(self, indices: Indices, *, domain: Domain) -> Words32:
        counters = np.empty((len(indices), 2), dtype=">u8")
        counters[:, 0] = (int(domain) << 32) | self._stream
        counters[:, 1] = indices >> 2
        # ECB over counter blocks *is* counter mode, with random access.
        blocks = self._context(self._aes, self._modes.ECB()).encryptor().update(counters.tobytes())
        words = np.frombuffer(blocks, dtype="<u4").reshape(-1, 4)
        picked: Words32 = words[np.arange(len(indices)), indices & 3].astype(np.uint32)
        return picked


class _ChaCha20Stream:
    block_bytes = 64

    def __init__(self, ciphers: tuple[Any, Any, Any], step_key: bytes, stream: int) -> None:
        self._context, self._algorithms, _ = ciphers
        self._key = step_key
        self._stream = stream

    def read(self, num_bytes: int, *, domain: Domain, block: int, buffer: Bytes) -> Bytes:
        done = 0
        while done < num_bytes:
            high, low = divmod(block + done // self.block_bytes, _CHACHA_RUN_BLOCKS)
            # RFC 8439 ends a nonce's stream after 2^32 blocks; the next run has the next nonce.
            size = min(num_bytes - done, (_CHACHA_RUN_BLOCKS - low) * self.block_bytes)
            nonce = struct.pack("<IIII", low, domain, self._stream, high)
            chacha = self._context(self._algorithms.ChaCha20(self._key, nonce), mode=None)
            chacha.encryptor().update_into(_ZEROS[:size], buffer[done:])
            done += size
        return buffer[:num_bytes]

    def words32_at(self, indices: Indices, *, domain: Domain) -> Words32:
        buffer, words = new_buffer(self.block_bytes), np.empty(len(indices), dtype=np.uint32)
        for position, index in enumerate(indices.tolist()):
            block = self.read(self.block_bytes, domain=domain, block=index // 16, buffer=buffer)
            words[position] = block.view("<u4")[index % 16]
        return words


_STREAMS: Final[dict[Cipher, Callable[[tuple[Any, Any, Any], bytes, int], Stream]]] = {
    "aes-256-ctr": _AesCtrStream,
    "chacha20": _ChaCha20Stream,
}


class CipherKeystream:
    """The streams of a 256-bit cipher; the layout is in the module's docstring.

    Args:
        key: Master key; the streams use a subkey of their own.
        cipher: ``"aes-256-ctr"`` or ``"chacha20"``.

    Raises:
        InvalidInputError: If the cipher is unknown, or the key is not of 256 bits.
        NoiseUnavailableError: If ``cryptography`` cannot be imported or lacks the cipher.
    """

    def __init__(self, key: NoiseKey, cipher: Cipher) -> None:
        if cipher not in _STREAMS:
            bound = f"one of {', '.join(_STREAMS)}"
            raise InvalidInputError("cipher", cipher, bound=bound, remedy="Use 'aes-256-ctr' if in doubt.")
        self._ciphers = _import_ciphers()
        self._cipher = cipher
        self._stream_type = _STREAMS[cipher]
        self._key = key.derive(f"noise.keystream.{cipher}").export()
        if len(self._key) != KEY_BYTES:
            raise InvalidInputError(
                "the key's length",
                len(self._key),
                bound=f"{KEY_BYTES} bytes for {cipher}",
                remedy="Use a SecretKey, or the cipher 'shake256' with a wide one.",
            )
        try:
            # A cipher that this build of OpenSSL forbids must fail now and not in the middle of training.
            self.at(step=0, stream=0).read(64, domain=Domain.BITS, block=0, buffer=new_buffer(64))
        except Exception as error:
            raise NoiseUnavailableError(
                f"Cipher {cipher!r} is refused by the installed cryptography ({error}). "
                "Choose the other one of 'aes-256-ctr' and 'chacha20', or install an unrestricted build."
            ) from error

    def at(self, *, step: int, stream: int) -> Stream:
        """Returns the stream of a position, under the step's own key."""
        return self._stream_type(self._ciphers, _step_key(self._key, step), stream)

    def kernel_key(self, step: int) -> KernelKey:
        """Returns the step's key for a GPU kernel.

        Raises:
            NoiseUnavailableError: If the cipher is AES: without its instructions a kernel would need tables,
                which are slow and leak through their timing.
        """
        if self._cipher != "chacha20":
            raise NoiseUnavailableError(
                f"Cipher {self._cipher!r} has no GPU kernel, but noise was asked for on a GPU. "
                "Build the generator with cipher='chacha20', which gives the same numbers on both."
            )
        return KernelKey.from_bytes("chacha20", _step_key(self._key, step), step=step)


class SecureNormalGenerator(CounterNormalGenerator):
    """Standard normals from a 256-bit cipher, full tail. The default noise of training.

    Args:
        key: Secret of the run. A ``TestKey`` makes a generator whose ``uses_test_key`` is true.
        cipher: ``"aes-256-ctr"`` (fastest with AES instructions) or ``"chacha20"``, the one that GPUs can run.

    Raises:
        InvalidInputError: If the cipher is unknown.
        NoiseUnavailableError: If ``cryptography`` cannot be imported or lacks the cipher.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: the caller's; this object turns a standard deviation
          into noise and knows nothing about data.
        * Public: cipher, layout, step and stream numbers. Secret: the key.
        * Theorem: if the cipher is a pseudo-random function, noise at all distinct (step, stream) positions
          is computationally indistinguishable from independent uniform words put through Box and Muller's
          transform, whose distance from ideal normals is stated in ``normals.py``. (ε, δ) analysed for ideal
          normals then holds against computationally bounded observers, up to that distance.
        * Source: NIST SP 800-38A (CTR), RFC 8439 (ChaCha20), Box & Muller 1958, Mironov et al. 2009
          (computational differential privacy).
    """

    name = "secure"

    def __init__(self, key: NoiseKey, *, cipher: Cipher = "aes-256-ctr") -> None:
        super().__init__(CipherKeystream(key, cipher), uses_test_key=key.is_test_key)
        self.cipher = cipher
