"""What a kernel receives from the host to reproduce a generator's integers."""

from __future__ import annotations

import importlib.util
import struct
from dataclasses import dataclass
from functools import cache
from typing import Literal

from dp_flash_attention.core.errors import DependencyMissingError

KernelCipher = Literal["chacha20", "philox4x64"]


@dataclass(frozen=True, kw_only=True, repr=False)
class KernelKey:
    """The key of one step, as words that a kernel takes as arguments. Its ``repr`` never shows them.

    Attributes:
        cipher: Which device function reads them.
        words: Eight uint32 words, laid out as ``noise/kernels/words.py`` says. Whoever holds them can subtract
            the step's noise.
        step: Logical step, 0 to 2^63 - 1.
    """

    cipher: KernelCipher
    words: tuple[int, ...]
    step: int

    @classmethod
    def from_bytes(cls, cipher: KernelCipher, key: bytes, *, step: int) -> KernelKey:
        """Returns the key whose little-endian bytes, padded with zeros to 32, are ``key``."""
        return cls(cipher=cipher, words=struct.unpack("<8I", key.ljust(32, b"\0")), step=step)

    def __repr__(self) -> str:
        """Says what it is and never what it holds."""
        return f"KernelKey({self.cipher!r}, step={self.step}, <secret words>)"


@cache
def has_triton() -> bool:
    """Whether triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def require_triton(purpose: str) -> None:
    """Raises if the kernels cannot be imported.

    Raises:
        DependencyMissingError: If triton is missing; the message says what for. There is no fallback.
    """
    try:
        import triton  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise DependencyMissingError(
            f"{purpose} needs the package triton, which cannot be imported ({error}). "
            "Run: pip install 'dp-flash-attention[kernels]'."
        ) from error
