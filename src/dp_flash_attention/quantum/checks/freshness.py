"""Checks that no noise is used twice: not by the next release, not by a copy, not when keys are used again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import SecretKey
from dp_flash_attention.quantum.evidence import Evidence, NamedCheck
from dp_flash_attention.quantum.lattice_gaussian import LatticeGaussian
from dp_flash_attention.quantum.layered_noise import LayeredNoise
from dp_flash_attention.quantum.post_quantum_gaussian import PostQuantumGaussian

_BUDGET: Final = PrivacyBudget(epsilon=1.0, delta=1e-6)
_MOVED: Final = Sensitivity(l2=50.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
# Numbers of standard deviation above 100 each: eight equal ones by chance have probability below 2^-64.
_NUMBERS: Final = 8


def freshness_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Without effect: one repetition is enough to see.
    """
    return [("no noise is used twice", fresh_noise)]


def fresh_noise() -> Iterator[Evidence]:
    """Yields how many of several releases of zeros, all from one stored key, differ."""
    key, keys = SecretKey.from_os(), [SecretKey.from_os() for _ in range(3)]
    zeros = np.zeros(_NUMBERS)

    def integers(made: PostQuantumGaussian) -> Any:
        return made.release(zeros, _MOVED, _BUDGET).value

    def lattice(made: LatticeGaussian) -> Any:
        return made.release(zeros, _MOVED, _BUDGET).value

    def layered(made: LayeredNoise) -> Any:
        return made.release(np.zeros((3, _NUMBERS)), _MOVED, _BUDGET, keys=keys).value

    one, other = PostQuantumGaussian(key=key), LatticeGaussian([[2, 0], [1, 2]], key=key)
    parties = LayeredNoise(num_parties=3, num_honest=2)
    yield _distinct(
        one.name,
        [integers(copy.copy(one)), integers(one), integers(one), integers(PostQuantumGaussian(key=key))],
    )
    yield _distinct(other.name, [lattice(copy.copy(other)), lattice(other), lattice(other)])
    yield _distinct(parties.name, [layered(copy.copy(parties)), layered(parties), layered(parties)])


def _distinct(name: str, released: list[Any]) -> Evidence:
    found = len({values.tobytes() for values in released})
    return Evidence(
        name=f"{name}: fresh noise",
        claim="Releases from one stored key, also by a copy of the mechanism, have noise of their own.",
        measured=f"{found} of {len(released)} releases differ",
        bound="all (false alarm below 2^-60)",
        holds=found == len(released),
    )
