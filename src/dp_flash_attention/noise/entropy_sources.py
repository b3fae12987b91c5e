"""Sources of entropy, each with what it may be credited for, and what a mixture of them is worth.

The operating system's pool alone carries at most 256 bits of strength, however many bytes are taken from it. A seed
of 512 bits, which 256-bit quantum strength needs, therefore takes at least two independent sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.core.private_files import read_private_file
from dp_flash_attention.noise.cpu_entropy import load_rdseed, rdseed_bytes
from dp_flash_attention.noise.entropy import os_entropy

MAX_CREDIT_BITS: Final = 256
"""Most that one source is credited for: none is trusted for more than its own state or certificate carries."""
_MAX_KEY_FILE_BYTES: Final = 1 << 20


class EntropySource(Protocol):
    """Somewhere that secret bytes come from. A class of one's own with these four members will do."""

    @property
    def name(self) -> str:
        """What reports call it; sources that are mixed have different names."""

    @property
    def min_entropy_per_byte(self) -> float:
        """The claim that health tests hold it against: bits of min-entropy a byte, above 0, at most 8."""

    @property
    def credit_bits(self) -> int:
        """Bits of secret entropy that a seed may count on, at most 256. 0 for what others can see."""

    def read(self, num_bytes: int) -> bytes:
        """Returns ``num_bytes`` fresh bytes, or fewer if there are no more."""


@dataclass(frozen=True)
class OsPool:
    """The operating system's generator (getrandom). Its state holds 256 bits, so that is its credit."""

    name: str = "os"
    min_entropy_per_byte: float = 8.0
    credit_bits: int = MAX_CREDIT_BITS

    def read(self, num_bytes: int) -> bytes:
        """Returns ``num_bytes`` bytes of ``os.urandom``.

        Raises:
            NoiseUnavailableError: If the system gives none.
        """
        return os_entropy(num_bytes)


class CpuInstruction:
    """The processor's RDSEED. Its credit rests on the maker's word; inside a virtual machine, also on the host.

    Raises:
        NoiseUnavailableError: If the machine has no RDSEED, or does not let it be called.
    """

    name = "cpu"
    min_entropy_per_byte = 8.0
    credit_bits = MAX_CREDIT_BITS

    def __init__(self) -> None:
        self._instruction = load_rdseed()

    def read(self, num_bytes: int) -> bytes:
        """Returns ``num_bytes`` bytes.

        Raises:
            NoiseUnavailableError: If the generator stays dry.
        """
        return rdseed_bytes(self._instruction, num_bytes)


@dataclass(frozen=True, kw_only=True)
class KeyFile:
    """Bytes that the user made elsewhere (dice, another machine, a hardware generator) and keeps secret.

    The whole file enters every seed. It is as fresh as it is: seeds differ because of the sources beside it.

    Attributes:
        path: A file that only its owner may read, 32 bytes to 1 MiB.
        credit_bits: Bits of entropy that the user vouches for; the file cannot show it.
        min_entropy_per_byte: What its bytes are held against; lower it for a file of digits or letters.
        name: What reports call it.
    """

    path: Path
    credit_bits: int
    min_entropy_per_byte: float = 8.0
    name: str = "key file"

    def read(self, num_bytes: int) -> bytes:
        """Returns the whole file, whatever ``num_bytes`` says.

        Raises:
            NoiseUnavailableError: If it cannot be read.
            InvalidInputError: If others may read it, or it is too short or too long.
        """
        try:
            found = read_private_file(self.path, max_bytes=_MAX_KEY_FILE_BYTES, follow_links=True)
        except OSError as error:
            raise NoiseUnavailableError(
                f"Key file {str(self.path)!r} cannot be read ({error.strerror}), but it was named as a source. "
                "Make it readable to this user."
            ) from error
        if found.open_to_others:
            raise InvalidInputError(
                "the key file's mode", oct(found.mode), bound="600 or 400", remedy=f"chmod 600 {self.path}"
            )
        if not 32 <= len(found.content) <= _MAX_KEY_FILE_BYTES:
            raise InvalidInputError(
                "the key file's length",
                "below 32 bytes" if len(found.content) < 32 else "above 1 MiB",
                bound="32 bytes to 1 MiB",
                remedy="Make another file.",
            )
        return found.content


@dataclass(frozen=True, kw_only=True)
class ExternalSource:
    """A hardware token, a quantum generator or a remote beacon, behind a function of the user's.

    Attributes:
        name: What reports call it.
        reader: Takes a number of bytes and returns that many.
        credit_bits: Bits of *secret* entropy that it may be credited for. A public beacon, or anything that crossed
            a network in the clear, is worth 0: it may be mixed in and adds nothing to the reported strength.
        min_entropy_per_byte: What its bytes are held against.
    """

    name: str
    reader: Callable[[int], bytes]
    credit_bits: int
    min_entropy_per_byte: float = 8.0

    def read(self, num_bytes: int) -> bytes:
        """Returns what the function returns.

        Raises:
            NoiseUnavailableError: If the function fails.
        """
        try:
            return self.reader(num_bytes)
        except Exception as error:
            raise NoiseUnavailableError(
                f"Entropy source {self.name!r} failed ({type(error).__name__}: {error}), but it was asked for. "
                "Repair it or leave it out."
            ) from error
