"""What every normal generator offers, and the choice of one by name."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.fast import FastNormalGenerator
from dp_flash_attention.noise.secure import SecureNormalGenerator

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


def make_generator(name: NoiseName, key: NoiseKey) -> NormalGenerator:
    """Returns the generator called ``name`` on ``key``.

    Raises:
        InvalidInputError: If the name is unknown.
        NoiseUnavailableError: If ``secure`` is asked for and ``cryptography`` is missing. There is no
            fallback.
    """
    if name == "secure":
        return SecureNormalGenerator(key)
    if name == "fast":
        return FastNormalGenerator(key)
    raise InvalidInputError("noise", name, bound="'secure' or 'fast'", remedy="Use 'secure' for releases.")
