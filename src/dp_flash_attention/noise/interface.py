"""What every normal generator offers, and the choice of one by name."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.fast import FastNormalGenerator
from dp_flash_attention.noise.secure import Cipher, SecureNormalGenerator

NoiseName = Literal["secure", "fast"]


class NormalGenerator(Protocol):
    """Fills or adds independent normals; a position (step, stream) always gives the same bytes."""

    @property
    def name(self) -> str:
        """``"secure"`` or ``"fast"``: what a plan and a certificate call it."""

    @property
    def uses_test_key(self) -> bool:
        """Whether its key is a ``TestKey``, so that nothing made with it is private."""

    def fill_normal_(self, out: Tensor, *, stddev: float = 1.0, step: int, stream: int) -> Tensor:
        """Overwrites ``out`` with N(0, stddev²) numbers and returns it."""

    def add_normal_(self, out: Tensor, *, stddev: float, step: int, stream: int) -> Tensor:
        """Adds to ``out`` in place what ``fill_normal_`` would write, and returns it."""

    def add_row_normal_(self, out: Tensor, *, row_stddev: Tensor, step: int, stream: int) -> Tensor:
        """Adds to row i of a matrix ``row_stddev[i]`` times unit normals of the position, and returns it."""


def make_generator(name: NoiseName, key: NoiseKey, *, cipher: Cipher | None = None) -> NormalGenerator:
    """Returns the generator called ``name`` on ``key``.

    Args:
        name: ``"secure"`` or ``"fast"``.
        key: Secret of the run.
        cipher: For ``secure`` alone: ``"aes-256-ctr"``, which is meant if it is None, or ``"chacha20"``, which is
            needed to write to a GPU and gives the same numbers on the CPU.

    Raises:
        InvalidInputError: If the name or the cipher is unknown, or a cipher is given for ``fast``.
        NoiseUnavailableError: If ``secure`` is asked for and ``cryptography`` is missing. There is no
            fallback.
    """
    if name == "secure":
        return SecureNormalGenerator(key, cipher="aes-256-ctr" if cipher is None else cipher)
    if name == "fast":
        if cipher is not None:
            raise InvalidInputError(
                "cipher", cipher, bound="None for noise 'fast'", remedy="Use 'secure' with a cipher."
            )
        return FastNormalGenerator(key)
    raise InvalidInputError("noise", name, bound="'secure' or 'fast'", remedy="Use 'secure' for releases.")
