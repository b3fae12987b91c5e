"""What this room takes from ``cryptography`` and the operating system, loaded where it is used."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from dp_flash_attention.core.errors import DependencyMissingError, InvalidInputError
from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.crypto.errors import AuthenticationError

AEAD_KEY_BYTES = 32
AEAD_TAG_BYTES = 16
NONCE_BYTES = 12
_REMEDY = "Install it: pip install 'cryptography>=48' (a build with OpenSSL 3.5 or newer, as its wheels are)."


def asymmetric(module: str) -> Any:
    """Returns a module of ``cryptography.hazmat.primitives.asymmetric``.

    Raises:
        DependencyMissingError: If this ``cryptography`` does not have it.
    """
    import importlib

    try:
        return importlib.import_module(f"cryptography.hazmat.primitives.asymmetric.{module}")
    except ImportError as error:
        raise missing(module, error) from error


def missing(what: str, error: BaseException) -> DependencyMissingError:
    """Returns the error to raise where ``cryptography`` or its OpenSSL lacks an algorithm."""
    return DependencyMissingError(f"the installed cryptography has no {what} ({error}). {_REMEDY}")


def unsupported() -> type[Exception]:
    """Returns the class that ``cryptography`` raises when its OpenSSL lacks an algorithm."""
    from cryptography.exceptions import UnsupportedAlgorithm

    return UnsupportedAlgorithm


def exactly(name: str, value: object, num_bytes: int) -> bytes:
    """Returns ``value`` if it is ``num_bytes`` bytes; a message shows its kind and length, never its content.

    Raises:
        InvalidInputError: If it is not.
    """
    if isinstance(value, bytes | bytearray) and len(value) == num_bytes:
        return bytes(value)
    shown = f"{type(value).__name__}" + (f" of length {len(value)}" if isinstance(value, bytes) else "")
    raise InvalidInputError(
        name,
        shown,
        bound=f"{num_bytes} bytes",
        remedy="Pass it whole, as it was made, and for this algorithm.",
    )


def fresh_secret(num_bytes: int) -> bytes:
    """Returns bytes of the operating system's cryptographic generator; there is no fallback.

    Raises:
        DependencyMissingError: If there is none, or it answers with one repeated byte.
    """
    count = positive_int("num_bytes", num_bytes, remedy="Ask for at least one byte.")
    try:
        secret = os.urandom(count)
    except (OSError, NotImplementedError) as error:
        raise DependencyMissingError(
            f"os.urandom({count}) failed ({error}), but keys need secure entropy. Make the operating system's "
            "random source available to this process."
        ) from error
    # 16 equal bytes have probability 2^-120 from a working source, so they mean a broken one.
    if len(secret) != count or (count >= 16 and len(set(secret)) == 1):
        raise DependencyMissingError(
            f"os.urandom({count}) gave a short or constant answer, but keys need secure entropy. Repair the "
            "operating system's random source."
        )
    return secret


def derive(secret: bytes, *, salt: bytes, info: bytes, num_bytes: int = AEAD_KEY_BYTES) -> bytes:
    """Returns HKDF-SHA-512 (RFC 5869) of a secret; different ``info`` give independent keys."""
    from cryptography.hazmat.primitives.hashes import SHA512
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA512(), length=num_bytes, salt=salt, info=info).derive(secret)


def aead_encrypt(key: bytes, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """Returns AES-256-GCM (SP 800-38D) ciphertext with its tag. The caller owns that no nonce repeats."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key).encrypt(nonce, plaintext, associated)


def aead_decrypt(key: bytes, nonce: bytes, ciphertext: bytes, associated: bytes, *, otherwise: str) -> bytes:
    """Returns the plaintext.

    Raises:
        AuthenticationError: With the message ``otherwise``, if anything was altered or the key is another.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(nonce, ciphertext, associated)
    except (InvalidTag, ValueError):
        raise AuthenticationError(otherwise) from None


def framed(*parts: bytes) -> bytes:
    """Joins byte strings so that no two lists of them give the same bytes: each after its 8-byte length."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def sha3_512(*parts: bytes) -> bytes:
    """Returns SHA3-512 of framed parts, 64 bytes."""
    return hashlib.sha3_512(framed(*parts)).digest()
