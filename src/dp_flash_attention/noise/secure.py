"""Cryptographic key-streams: AES-256-CTR and ChaCha20, from ``cryptography``.

Layout (all of it fixed, so that another implementation can reproduce the bytes):

    generator key = key.derive("noise.keystream.<cipher>")          one per (key, purpose, cipher)
    step key      = BLAKE2b-256(key = generator key, person = "dpfa.step.v1", data = uint64le(step))

    AES-256-CTR   initial counter block, 16 bytes, big-endian as NIST SP 800-38A increments it:
                  [ domain : 4 | stream : 4 | block counter : 8 ]
    ChaCha20      RFC 8439 state words 12..15, little-endian:
                  [ block counter mod 2^32 : 4 | domain : 4 | stream : 4 | block counter div 2^32 : 4 ]

Why positions never collide: different steps have different keys (up to a BLAKE2b collision, 2^-128 for 2^64
steps); within a step the counter block holds (domain, stream, block) without overlap, and ``keystream.py`` bounds
all three so that no field overflows into its neighbour.

Why the birthday bound is small: AES is a permutation, so a counter stream never repeats a block where true
randomness would. With b blocks under one step key that costs at most b^2 / 2^129 (PRP/PRF switching lemma, Bellare &
Rogaway 2006). One step over 10^9 float32 parameters reads 2^28 blocks, hence 2^-73; 10^6 such steps, 2^-53. ChaCha20's block
function is no permutation of its counter and has no such term.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise.entropy import KEY_BYTES, NoiseKey
from dp_flash_attention.noise.keystream import Bytes, Domain, Indices, Keystream, Reader, Words32
from dp_flash_attention.noise.writer import CounterNormalGenerator

Cipher = Literal["aes-256-ctr", "chacha20"]

_STEP_PERSON = b"dpfa.step.v1"
_CHACHA_RUN_BLOCKS = 1 << 32
# Some versions of cryptography ask for a cipher block of room behind the payload, less one byte.
_UPDATE_SLACK_BYTES = 64


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


def _probe(build: Callable[[], Reader], cipher: str) -> None:
    """Encrypts one block, so that a cipher that this build of OpenSSL forbids fails now and not in training."""
    try:
        build().read(64)
    except Exception as error:
        raise NoiseUnavailableError(
            f"Cipher {cipher!r} is not offered by the installed cryptography ({error}). "
            "Choose the other one of 'aes-256-ctr' and 'chacha20', or install an unrestricted build."
        ) from error


def _step_key(generator_key: bytes, step: int) -> bytes:
    return hashlib.blake2b(
        struct.pack("<Q", step), key=generator_key, digest_size=KEY_BYTES, person=_STEP_PERSON
    ).digest()


class _CipherReader:
    """Encrypts zeros with a running cipher context: the ciphertext is the key-stream."""

    def __init__(self, encryptor: Any) -> None:
        self._encryptor = encryptor
        self._zeros = np.zeros(0, dtype=np.uint8)
        self._buffer = np.empty(0, dtype=np.uint8)

    def read(self, num_bytes: int) -> Bytes:
        """Returns the next ``num_bytes`` of the stream, valid until the next call."""
        if len(self._zeros) < num_bytes:
            self._zeros = np.zeros(num_bytes, dtype=np.uint8)
            self._buffer = np.empty(num_bytes + _UPDATE_SLACK_BYTES, dtype=np.uint8)
        # update_into releases the GIL, so several threads encrypt at the same time.
        self._encryptor.update_into(self._zeros[:num_bytes], self._buffer)
        return self._buffer[:num_bytes]


class AesCtrKeystream:
    """AES-256 in counter mode; the layout is in the module's docstring.

    Args:
        key: Master key; the stream uses a subkey of its own.

    Raises:
        NoiseUnavailableError: If ``cryptography`` cannot be imported or lacks the cipher.
    """

    block_bytes = 16

    def __init__(self, key: NoiseKey) -> None:
        self._cipher, self._algorithms, self._modes = _import_ciphers()
        self._key = key.derive("noise.keystream.aes-256-ctr").export()
        _probe(lambda: self.reader(Domain.BITS, step=0, stream=0), "aes-256-ctr")

    def reader(self, domain: Domain, *, step: int, stream: int, block: int = 0) -> Reader:
        """Returns a reader that starts at ``block``."""
        counter = struct.pack(">IIQ", domain, stream, block)
        aes = self._algorithms.AES(_step_key(self._key, step))
        return _CipherReader(self._cipher(aes, self._modes.CTR(counter)).encryptor())

    def words32_at(self, domain: Domain, *, step: int, stream: int, indices: Indices) -> Words32:
        """Returns single words: encrypts their counter blocks in one call."""
        counters = np.empty((len(indices), 2), dtype=">u8")
        counters[:, 0] = (int(domain) << 32) | stream
        counters[:, 1] = indices >> 2
        aes = self._algorithms.AES(_step_key(self._key, step))
        # ECB of distinct counter blocks *is* counter mode, with random access.
        blocks = self._cipher(aes, self._modes.ECB()).encryptor().update(counters.tobytes())
        words = np.frombuffer(blocks, dtype="<u4").reshape(-1, 4)
        return words[np.arange(len(indices)), indices & 3].astype(np.uint32)


class _ChaChaReader:
    """Joins runs of 2^32 blocks, where RFC 8439's block counter ends."""

    def __init__(self, keystream: ChaCha20Keystream, prefix: bytes, key: bytes, block: int) -> None:
        self._keystream, self._prefix, self._key, self._block = keystream, prefix, key, block
        self._run: Reader | None = None

    def read(self, num_bytes: int) -> Bytes:
        """Returns the next ``num_bytes`` of the stream, valid until the next call."""
        left = (_CHACHA_RUN_BLOCKS - self._block % _CHACHA_RUN_BLOCKS) * ChaCha20Keystream.block_bytes
        if num_bytes > left:
            head = self.read(left).copy()
            return np.concatenate([head, self.read(num_bytes - left)])
        if self._run is None or self._block % _CHACHA_RUN_BLOCKS == 0:
            self._run = self._keystream.run(self._key, self._prefix, self._block)
        self._block += num_bytes // ChaCha20Keystream.block_bytes
        return self._run.read(num_bytes)


class ChaCha20Keystream:
    """ChaCha20 (RFC 8439); the layout is in the module's docstring.

    Args:
        key: Master key; the stream uses a subkey of its own.

    Raises:
        NoiseUnavailableError: If ``cryptography`` cannot be imported or lacks the cipher.
    """

    block_bytes = 64

    def __init__(self, key: NoiseKey) -> None:
        self._cipher, self._algorithms, _ = _import_ciphers()
        self._key = key.derive("noise.keystream.chacha20").export()
        _probe(lambda: self.reader(Domain.BITS, step=0, stream=0), "chacha20")

    def run(self, step_key: bytes, prefix: bytes, block: int) -> Reader:
        """Returns a reader that may go to the next multiple of 2^32 blocks and not beyond."""
        high, low = divmod(block, _CHACHA_RUN_BLOCKS)
        nonce = struct.pack("<I", low) + prefix + struct.pack("<I", high)
        return _CipherReader(self._cipher(self._algorithms.ChaCha20(step_key, nonce), mode=None).encryptor())

    def reader(self, domain: Domain, *, step: int, stream: int, block: int = 0) -> Reader:
        """Returns a reader that starts at ``block``."""
        return _ChaChaReader(self, struct.pack("<II", domain, stream), _step_key(self._key, step), block)

    def words32_at(self, domain: Domain, *, step: int, stream: int, indices: Indices) -> Words32:
        """Returns single words, one cipher block each."""
        prefix, step_key = struct.pack("<II", domain, stream), _step_key(self._key, step)
        words = np.empty(len(indices), dtype=np.uint32)
        for position, index in enumerate(indices.tolist()):
            block = self.run(step_key, prefix, index // 16).read(self.block_bytes)
            words[position] = block.view("<u4")[index % 16]
        return words


_KEYSTREAMS: dict[Cipher, Callable[[NoiseKey], Keystream]] = {
    "aes-256-ctr": AesCtrKeystream,
    "chacha20": ChaCha20Keystream,
}


def secure_keystream(key: NoiseKey, cipher: Cipher = "aes-256-ctr") -> Keystream:
    """Returns the key-stream of ``cipher`` under ``key``.

    Raises:
        InvalidInputError: If the cipher is unknown.
        NoiseUnavailableError: If ``cryptography`` cannot be imported or lacks the cipher.
    """
    if cipher not in _KEYSTREAMS:
        raise InvalidInputError(
            "cipher", cipher, bound=f"one of {', '.join(_KEYSTREAMS)}", remedy="Use 'aes-256-ctr' if in doubt."
        )
    return _KEYSTREAMS[cipher](key)


class SecureNormalGenerator(CounterNormalGenerator):
    """Standard normals from a 256-bit cipher, full tail. The default noise of training.

    Args:
        key: Secret of the run. A ``TestKey`` makes a generator whose ``uses_test_key`` is true.
        cipher: ``"aes-256-ctr"`` (fastest with AES instructions) or ``"chacha20"``.

    Raises:
        InvalidInputError: If the cipher is unknown.
        NoiseUnavailableError: If ``cryptography`` cannot be imported or lacks the cipher.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: the caller's; this object turns a standard deviation
          into noise and knows nothing about data.
        * Public: cipher, layout, step and stream numbers. Secret: the key.
        * Theorem: if the cipher is a pseudo-random function, noise at all distinct (step, stream) positions is
          computationally indistinguishable from independent uniform words put through Box and Muller's
          transform, whose distance from ideal normals is stated in ``normals.py``. (ε, δ) analysed for ideal
          normals then holds against computationally bounded observers, up to that distance.
        * Source: NIST SP 800-38A (CTR), RFC 8439 (ChaCha20), Box & Muller 1958, Mironov et al. 2009
          (computational differential privacy).
    """

    name = "secure"

    def __init__(self, key: NoiseKey, *, cipher: Cipher = "aes-256-ctr") -> None:
        super().__init__(secure_keystream(key, cipher), uses_test_key=key.is_test_key)
        self.cipher = cipher
