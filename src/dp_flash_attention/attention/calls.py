"""Call numbers and the key they belong to: a number is used for one call, once."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Lock
from typing import NoReturn

from dp_flash_attention.attention.interface import AttentionNoise, Cipher, NoiseStream
from dp_flash_attention.core.errors import InvalidInputError, NoiseReuseError
from dp_flash_attention.core.validation import non_negative_int
from dp_flash_attention.noise import (
    FastNormalGenerator,
    NoiseKey,
    NormalGenerator,
    SecretKey,
    SecureNormalGenerator,
)
from dp_flash_attention.noise.entropy import vouched_entropy
from dp_flash_attention.noise.keystream import MAX_STEP
from dp_flash_attention.noise.secure import CipherKeystream


class CallNoise:
    """Gives every attention call noise of its own: a key, and numbers that only go up.

    One object belongs to one process and one key; build a single one where calls are made, and pass it to all of them.
    ``CallNoise.from_os()`` is the usual way: a fresh key needs no memory of earlier numbers.

    Args:
        key: Secret of the caller; a ``TestKey`` makes releases that say they are not private.
        name: ``"secure"`` (default), ``"exact"`` (whole numbers on a public grid, finite precision accounted for) or
            ``"fast"`` (research; see ``noise.fast``).
        cipher: Cipher of ``"secure"`` and ``"exact"``. ``"aes-256-ctr"`` is the fastest on CPUs; GPU kernels use
            ``"chacha20"``.
        rank: Number of this process among several that share the key. Each rank has a subkey of its own.
        first_call: First number that is free under this key and rank; for keys that outlive a process.

    Raises:
        InvalidInputError: If an argument is out of range.
        NoiseUnavailableError: If the generator cannot be built. There is no fallback.

    Guarantees:
        Neighbouring relation, unit, sensitivity: the call's. Public: call numbers, ranks, layout. Secret: the
        key. Theorem: positions (rank, call, batch entry, head, element) never repeat, so noise is computationally
        independent across all of them (``noise.secure``). Two objects on one key and rank would break that:
        the key is yours to use once.
    """

    def __init__(
        self,
        key: NoiseKey,
        *,
        name: AttentionNoise = "secure",
        cipher: Cipher = "aes-256-ctr",
        rank: int = 0,
        first_call: int = 0,
    ) -> None:
        number = non_negative_int("rank", rank, remedy="Number the processes from 0.")
        self._next_call = _checked_number("first_call", first_call)
        self._key = key.derive(f"attention.rank.{number}")
        self._name, self._cipher = name, cipher
        self._generator = _generator(name, self._key, cipher)
        self._process = os.getpid()
        self._lock = Lock()

    @classmethod
    def from_os(cls, *, name: AttentionNoise = "secure", cipher: Cipher = "aes-256-ctr") -> CallNoise:
        """Returns an object on a fresh key of the operating system.

        Raises:
            NoiseUnavailableError: If the system gives no secure entropy.
        """
        return cls(SecretKey.from_os(), name=name, cipher=cipher)

    @property
    def name(self) -> AttentionNoise:
        """``"secure"``, ``"exact"`` or ``"fast"``."""
        return self._name

    @property
    def cipher(self) -> Cipher:
        """Cipher of ``"secure"`` and ``"exact"``."""
        return self._cipher

    @property
    def uses_test_key(self) -> bool:
        """Whether the key is public, so that nothing made with it is private."""
        return self._key.is_test_key

    @property
    def vouched(self) -> tuple[str, ...]:
        """What of the key's entropy is the caller's word, one statement each; nothing for a key that was drawn."""
        return vouched_entropy(self._key)

    @property
    def next_call(self) -> int:
        """The lowest number that is still free."""
        return self._next_call

    def check(self, call_id: int | None = None) -> int:
        """Returns the number that ``claim`` would take, without taking it.

        Raises:
            NoiseReuseError: If the number is taken, or this object was copied into another process.
            InvalidInputError: If it is not a whole number of at least 0.
        """
        if os.getpid() != self._process:
            raise NoiseReuseError(
                f"This CallNoise belongs to process {self._process}, but process {os.getpid()} uses a copy of it, and both "
                "would give the same noise to different calls. Build one CallNoise in each process."
            )
        if call_id is None:
            return _checked_number("call_id", self._next_call)
        number = _checked_number("call_id", call_id)
        if number < self._next_call:
            raise NoiseReuseError(
                f"call_id is {number}, but numbers below {self._next_call} are used up under this key, and noise that is "
                "used twice cancels. Leave call_id out to take the next number."
            )
        return number

    def peek(self, call_id: int | None = None) -> NoiseStream:
        """Returns what ``claim`` would, without taking the number: to ask a back end whether it can make the noise.

        Never release with it: the number is still free for another call.

        Raises:
            NoiseReuseError: As in ``check``.
        """
        return self._stream(self.check(call_id))

    def claim(self, call_id: int | None = None) -> NoiseStream:
        """Takes a number, and with it all lower ones, for one call.

        Args:
            call_id: A number of the caller's choice, at least ``next_call``; None takes ``next_call``.

        Raises:
            NoiseReuseError: As in ``check``.
        """
        return self.claim_for(_nothing, call_id)

    def claim_for(self, pay: Callable[[], None], call_id: int | None = None) -> NoiseStream:
        """Pays for a call and takes its number, as one act: no thread pays for a number that another has taken.

        Args:
            pay: Spends the call's budget; what it raises is passed on, and the number stays free.
            call_id: As in ``claim``.

        Raises:
            NoiseReuseError: As in ``check``; nothing was paid.
        """
        with self._lock:
            number = self.check(call_id)
            pay()
            self._next_call = number + 1
        return self._stream(number)

    def _stream(self, number: int) -> NoiseStream:
        return NoiseStream(
            key=self._key, name=self._name, cipher=self._cipher, call_id=number, generator=self._generator
        )

    def __repr__(self) -> str:
        """Says what it is and never what it holds."""
        return f"CallNoise(name={self._name!r}, cipher={self._cipher!r}, next_call={self._next_call})"

    def __reduce__(self) -> NoReturn:
        """Refuses to be copied or pickled: two copies would use the same numbers."""
        raise TypeError(
            "A CallNoise cannot be pickled or copied. Build one in each process, on a key of its own."
        )

    def __deepcopy__(self, memo: object) -> CallNoise:
        """Returns the object itself, so that a copied module goes on counting with the original."""
        return self


def _nothing() -> None:
    """What a call without a filter pays."""


def _checked_number(name: str, value: object) -> int:
    number = non_negative_int(name, value, remedy="Leave it out to take the next number.")
    # The generator refuses larger ones, but only when the call has been paid for.
    if number > MAX_STEP:
        raise InvalidInputError(name, value, bound=f"at most {MAX_STEP}", remedy="Start a new key.")
    return number


def _generator(name: AttentionNoise, key: NoiseKey, cipher: Cipher) -> NormalGenerator | None:
    if name == "secure":
        return SecureNormalGenerator(key, cipher=cipher)
    if name == "fast":
        return FastNormalGenerator(key)
    if name == "exact":
        # Fails now and not after the first payment, if the cipher or the key is of no use.
        CipherKeystream(key.derive("attention.probe"), cipher)
        return None
    raise InvalidInputError(
        "noise", name, bound="'secure', 'exact' or 'fast'", remedy="Use 'secure' or 'exact' for releases."
    )
