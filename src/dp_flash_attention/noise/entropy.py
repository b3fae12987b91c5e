"""Keys: where every random bit of the library comes from.

There is no default seed and no fallback. A production key is a ``SecretKey``; reproducible noise for
tests needs a ``TestKey``, which is another type and marks every generator built on it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import ClassVar, NoReturn, Protocol

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError

KEY_BYTES = 32
_DERIVE_PERSON = b"dpfa.derive.v1"
_TEST_KEY_PERSON = b"dpfa.testkey.v1"
_PURPOSE_REMEDY = "Name what the derived key is for, such as 'training.noise'."


class NoiseKey(Protocol):
    """What a generator needs of a key: independent subkeys, its bytes, and whether it is a test key."""

    @property
    def is_test_key(self) -> bool:
        """Whether the bytes come from a public label, so that nothing made with it is private."""

    def derive(self, purpose: str) -> NoiseKey:
        """Returns the key for ``purpose``."""

    def export(self) -> bytes:
        """Returns the key bytes: 32, or the 64 of a ``WideSecretKey``."""


def vouched_entropy(key: NoiseKey) -> tuple[str, ...]:
    """Returns what about a key's entropy is nobody's word but the caller's; empty if the library drew all of it.

    A key of the caller's own type that says nothing about it is the caller's word altogether.
    """
    if key.is_test_key:
        return ()
    stated: tuple[str, ...] = getattr(
        key, "vouched", (f"all bits of the key, which is of the caller's own type {type(key).__name__}",)
    )
    return stated


def os_entropy(num_bytes: int) -> bytes:
    """Returns ``num_bytes`` bytes of the operating system's cryptographic generator.

    Raises:
        NoiseUnavailableError: If the system has no such generator, it fails, or it returns a short or
            constant answer. There is no fallback.
    """
    try:
        entropy = os.urandom(num_bytes)
    except (OSError, NotImplementedError) as error:
        raise NoiseUnavailableError(
            f"os.urandom({num_bytes}) failed ({error}), but noise needs secure entropy. "
            "Make the operating system's random source (getrandom, /dev/urandom) available to this process."
        ) from error
    if len(entropy) != num_bytes:
        raise NoiseUnavailableError(
            f"os.urandom({num_bytes}) returned {len(entropy)} bytes, but it must return all of them. "
            "Repair the operating system's random source."
        )
    # A constant 32-byte answer has probability 2^-248 from a working source, so it means a broken one.
    if num_bytes >= KEY_BYTES and len(set(entropy)) == 1:
        raise NoiseUnavailableError(
            f"os.urandom({num_bytes}) returned one repeated byte, but it must be random. "
            "Repair the operating system's random source."
        )
    return entropy


def _derived_bytes(key: bytes, purpose: str) -> bytes:
    if not isinstance(purpose, str) or not purpose:
        raise InvalidInputError("purpose", purpose, bound="a non-empty string", remedy=_PURPOSE_REMEDY)
    return hashlib.blake2b(
        purpose.encode("utf-8"), key=key, digest_size=KEY_BYTES, person=_DERIVE_PERSON
    ).digest()


class SecretBytes:
    """What every kind of secret key is: bytes that are never shown, pickled or hashed, and can be destroyed.

    Abstract. A kind names itself and its length, and says how subkeys are derived.

    Args:
        secret: The bytes; copied.
        vouched: What about their entropy rests on the caller's word, one statement each; None for bytes that were passed
            in, all of which does. Subkeys carry it along, and certificates list it under *assumed*.

    Raises:
        InvalidInputError: If they are not ``num_bytes`` bytes.
    """

    is_test_key: ClassVar[bool] = False
    kind: ClassVar[str]
    num_bytes: ClassVar[int]
    origin: ClassVar[str]  # where such a key comes from, for errors

    def __init__(self, secret: bytes | bytearray, *, vouched: tuple[str, ...] | None = None) -> None:
        if not isinstance(secret, bytes | bytearray) or len(secret) != self.num_bytes:
            # Shows the kind and never the value: messages end up in logs.
            shown = f"{type(secret).__name__} of length {len(secret) if hasattr(secret, '__len__') else '?'}"
            raise InvalidInputError(
                self.kind, shown, bound=f"{self.num_bytes} bytes", remedy=f"Use {self.origin}."
            )
        self._secret: bytearray | None = bytearray(secret)
        passed_in = f"all bits of the {self.kind}, whose bytes were passed in and not drawn"
        self.vouched = (passed_in,) if vouched is None else vouched

    def export(self) -> bytes:
        """Returns the secret bytes. Whoever holds them can subtract the noise.

        Raises:
            NoiseUnavailableError: If the key was destroyed.
        """
        if self._secret is None:
            raise NoiseUnavailableError(
                f"This {self.kind} is destroyed, but a living one is needed. Start a new run with a new key."
            )
        return bytes(self._secret)

    def destroy(self) -> None:
        """Overwrites the bytes and makes every later use raise. Calling it again does nothing.

        Copies that ``export``, ``derive`` or a generator made before live until they are collected.
        """
        if self._secret is not None:
            self._secret[:] = bytes(self.num_bytes)
            self._secret = None

    def __eq__(self, other: object) -> bool:
        """Compares in constant time; a destroyed key equals only itself."""
        if not isinstance(other, type(self)):
            return NotImplemented
        if self._secret is None or other._secret is None:
            return self is other
        return hmac.compare_digest(self._secret, other._secret)

    __hash__ = None  # type: ignore[assignment]  # a hash of the bytes would be one more place they leak to

    def __repr__(self) -> str:
        """Says what it is and never what it holds."""
        return f"{type(self).__name__}({self._state()})"

    def _state(self) -> str:
        return "<destroyed>" if self._secret is None else f"<{self.num_bytes} secret bytes>"

    def __reduce__(self) -> NoReturn:
        """Refuses to be pickled, so that ``torch.save`` of a session cannot write a secret by accident."""
        raise TypeError(
            f"A {type(self).__name__} cannot be pickled or copied. Write export() to a file with mode 600."
        )


class SecretKey(SecretBytes):
    """A 256-bit secret. Its ``repr`` never shows the bytes, it cannot be pickled, and it can be destroyed.

    Build one with ``SecretKey.from_os()``; read a stored one back with ``SecretKey.from_bytes``.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: none; a key knows nothing about data.
        * Public: nothing. Privacy of everything made with the key ends when its bytes are known.
        * Theorem: keyed BLAKE2b is a pseudo-random function, so subkeys of different purposes are
          computationally independent uniform keys.
        * Source: Aumasson et al. 2013 (BLAKE2), section 2; RFC 7693.
    """

    kind = "secret key"
    num_bytes = KEY_BYTES
    origin = "SecretKey.from_os()"

    @classmethod
    def from_os(cls) -> SecretKey:
        """Returns a fresh key from the operating system.

        Raises:
            NoiseUnavailableError: If the system gives no secure entropy.
        """
        return cls(os_entropy(KEY_BYTES), vouched=())

    @classmethod
    def from_bytes(cls, secret: bytes, *, vouched: tuple[str, ...] | None = None) -> SecretKey:
        """Returns the key that ``export`` wrote. That its bits were random is then the caller's word.

        Args:
            secret: 32 bytes.
            vouched: As in ``SecretBytes``: what rests on the caller's word; None for all of it.

        Raises:
            InvalidInputError: If ``secret`` is not 32 bytes.
        """
        return cls(secret, vouched=vouched)

    def derive(self, purpose: str) -> SecretKey:
        """Returns the subkey for ``purpose``: keyed BLAKE2b over the purpose's UTF-8 bytes.

        The same purpose gives the same subkey; the parent cannot be computed from it.

        Raises:
            InvalidInputError: If ``purpose`` is not a non-empty string.
            NoiseUnavailableError: If the key was destroyed.
        """
        return SecretKey(_derived_bytes(self.export(), purpose), vouched=self.vouched)


class TestKey:
    """A deterministic key made from a public label: anyone can subtract noise made with it.

    It is for tests only: generators built on one answer ``uses_test_key = True``, and the training room
    refuses to certify them.

    Args:
        label: Any text or whole number; equal labels give equal keys.
    """

    __test__: ClassVar[bool] = False  # keeps pytest from collecting the class because of its name
    is_test_key: ClassVar[bool] = True

    def __init__(self, label: str | int) -> None:
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise InvalidInputError(
                "test key label", label, bound="a string or a whole number", remedy="Use TestKey('my test')."
            )
        self._label = label
        tagged = f"{type(label).__name__}:{label}".encode()
        self._bytes = hashlib.blake2b(tagged, digest_size=KEY_BYTES, person=_TEST_KEY_PERSON).digest()

    def derive(self, purpose: str) -> TestKey:
        """Returns the test key for ``purpose``, by the same derivation as ``SecretKey.derive``."""
        child = TestKey(f"{self._label}/{purpose}")
        child._bytes = _derived_bytes(self._bytes, purpose)
        return child

    def export(self) -> bytes:
        """Returns the 32 bytes, which are public."""
        return self._bytes

    def __repr__(self) -> str:
        """Shows the label, which is all there is to know."""
        return f"TestKey({self._label!r})"
