"""A keyed digest of long vectors at memory speed: universal hashing of the pieces, then the keyed hash of what is left.

    key_1, key_2 = keyed_shake256(secret, label; domain ‖ ".universal")                       32 bytes each
    tag_i(piece) = AES-256-GCM's tag of (no plaintext, associated data = piece, zero nonce) under key_i    16 bytes each
    digest       = keyed_shake256(secret, label, place_1 ‖ tag_1 ‖ tag_2, place_2 ‖ …; domain)

GCM's tag is GHASH_H(piece) plus a constant of the key, and GHASH is a polynomial in H of degree at most m + 1 for m blocks: two
different pieces of m blocks have equal tags for at most m + 1 of the 2^128 values of H (McGrew & Viega 2004). H and the constant
are AES's outputs at two public points under a key of this label alone, and no tag is ever shown: whoever looks for a collision
has no oracle, so what is left of AES is that these two outputs look uniform to a test that costs one pass over the data, which no
search for the key helps with. With two keys, two different vectors of pieces up to 2^20 bytes collide with probability at most
(2^16 + 1)²/2^256 < 2^-223, whatever computer chose them. (Carter & Wegman 1981: a universal hash under a pseudo-random function
is a pseudo-random function up to that.)

SHAKE256 over the numbers themselves costs twenty times the time and keeps one thread busy.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy.typing as npt

from dp_flash_attention.core.errors import NoiseUnavailableError
from dp_flash_attention.quantum.prf import keyed_shake256

MAX_PIECE: Final = 1 << 17
"""Numbers of 8 bytes in a piece."""
_NUM_KEYS: Final = 2
_KEY_BYTES: Final = 32
_NONCE: Final = bytes(12)


class UniversalDigest:
    """The digest of one vector, which comes in pieces: in any order, from several threads.

    Args:
        secret: Secret of whoever compares digests.
        label: What the digest is bound to; every label has hash keys of its own.
        domain: What the digest is for.

    Raises:
        NoiseUnavailableError: If ``cryptography`` cannot be imported.

    Guarantees:
        * Secret: ``secret``. Public: label, domain, the places and lengths of pieces (vectors are compared piece by piece:
          cut both alike).
        * Theorem and source: the module's docstring.
    """

    def __init__(self, secret: bytes, label: bytes, *, domain: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as error:
            raise NoiseUnavailableError(
                f"Digests need the package cryptography, which cannot be imported ({error}). "
                "Run: pip install 'cryptography>=48'."
            ) from error
        self._secret, self._label, self._domain = secret, label, domain
        keys = keyed_shake256(secret, label, domain=domain + b".universal", num_bytes=_NUM_KEYS * _KEY_BYTES)
        self._ciphers = [
            Cipher(algorithms.AES(keys[start : start + _KEY_BYTES]), modes.GCM(_NONCE))
            for start in range(0, len(keys), _KEY_BYTES)
        ]
        self._tags: dict[int, bytes] = {}

    def absorb(self, start: int, piece: npt.NDArray[Any]) -> None:
        """Takes the numbers from place ``start`` on, float64 or int64, contiguous, at most 2^20 bytes; each place once."""
        assert piece.nbytes <= 8 * MAX_PIECE, "the bound of collisions counts on it"
        assert start not in self._tags, "a place is taken once"
        little: Any = piece.astype(piece.dtype.newbyteorder("<"), copy=False)
        data = memoryview(little).cast("B")
        tags = b"".join(_tag(cipher, data) for cipher in self._ciphers)
        self._tags[start] = struct.pack("<QQ", start, len(data)) + tags

    def digest(self, num_bytes: int) -> bytes:
        """Returns ``num_bytes`` of the digest of what was taken."""
        return keyed_shake256(
            self._secret,
            self._label,
            b"".join(tag for _, tag in sorted(self._tags.items())),
            domain=self._domain,
            num_bytes=num_bytes,
        )


def _tag(cipher: Any, data: memoryview) -> bytes:
    made = cipher.encryptor()
    made.authenticate_additional_data(data)
    made.finalize()
    tag: bytes = made.tag
    return tag
