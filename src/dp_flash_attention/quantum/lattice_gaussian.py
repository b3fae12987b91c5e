"""``LatticeGaussian``: a vector rounded to a lattice, with a discrete Gaussian of that lattice added."""

from __future__ import annotations

import dataclasses
import math
import threading
from fractions import Fraction
from typing import Any, Final

import numpy as np

from dp_flash_attention.accounting.lattice_gaussian import (
    lattice_distance,
    lattice_gaussian_delta,
    lattice_gaussian_sigma,
)
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import Guarantee, PrivacyBudget, PrivacyUnit, Sensitivity
from dp_flash_attention.noise import NoiseKey, SecretKey
from dp_flash_attention.noise.entropy import vouched_entropy
from dp_flash_attention.quantum.exact_noise import MAX_DISTANCE
from dp_flash_attention.quantum.fresh_keys import fresh_subkey
from dp_flash_attention.quantum.generator_strength import (
    generator_advantage,
    given_assumed_entropy,
    quantum_security_bits,
    searched_bits,
    secret_bits,
    strength_assumptions,
    suitable_cipher,
)
from dp_flash_attention.quantum.interface import DeltaParts, Release, checked_request
from dp_flash_attention.quantum.lattice import Lattice, lattice_from_rows
from dp_flash_attention.quantum.post_quantum_gaussian import PostQuantumGaussian
from dp_flash_attention.quantum.rational_sampler import RationalCoins
from dp_flash_attention.quantum.values import unpack

_CIPHER: Final = "aes-256-ctr"
# A coordinate costs about 1 ms in rational arithmetic; more than this is a mistake of scale.
MAX_COORDINATES = 1 << 16
# Rational coins read some hundred blocks a coordinate; the switching term is charged for a tile of each.
_TILE_PER_COORDINATE = 8192


class LatticeGaussian:
    """Releases vectors on a lattice L with noise P(x) ∝ exp(−‖x‖²/2σ²), x ∈ L.

    It is a discrete Gaussian mechanism on the lattice that was asked for. It is no statement about lattice problems:
    its privacy needs no hardness of LWE, and gains nothing from it.

    Args:
        basis: Rows of a square matrix of full rank, in the value's unit, at most 64 x 64; None for scaled ℤ^d, the grid of
            ``PostQuantumGaussian``, which is thousands of times faster.
        grid: γ of scaled ℤ^d; only with ``basis=None``.
        key: Secret of the noise; a fresh one if None. Each release uses a subkey of its own.
        privacy_unit: What the sensitivity was derived for.

    Raises:
        InvalidInputError: If the basis is none, or both it and a grid are given.

    Guarantees:
        * Neighbouring relation: that of the sensitivity. Privacy unit: ``privacy_unit``.
        * Sensitivity: rounding to the nearest plane moves two vectors at most √(m·Σ‖b̃_i‖²) further apart, for m
          lattice vectors: Δ plus that.
        * Public: basis, kind and shape, Δ, budget, σ. Secret: the key and the value.
        * Theorem: ``accounting.lattice_gaussian``. Klein's sampler runs in rational arithmetic, so its only distance
          from the ideal law is the one bounded there; where that is above 2^-100, the release is refused.
        * Source: Klein 2000; Gentry, Peikert & Vaikuntanathan 2008; Canonne, Kamath & Steinke 2020.

    Example:
        >>> from dp_flash_attention.core.privacy import NeighboringRelation
        >>> moved = Sensitivity(l2=50.0, neighboring_relation=NeighboringRelation.REPLACE_ONE)
        >>> hexagons = LatticeGaussian([[2, 0], [1, 2]])
        >>> hexagons.release([3.0, 4.0], moved, PrivacyBudget(epsilon=1.0, delta=1e-6))
        Traceback (most recent call last):
        ...
        dp_flash_attention.core.errors.InvalidInputError: value is 'list', but it must be a float or ...
        >>> hexagons.release(np.array([3.0, 4.0]), moved, PrivacyBudget(epsilon=1.0, delta=1e-6)).value.shape
        (2,)
    """

    name = "LatticeGaussian"

    def __init__(
        self,
        basis: object = None,
        *,
        grid: float | None = None,
        key: NoiseKey | None = None,
        privacy_unit: PrivacyUnit = PrivacyUnit.EXAMPLE,
    ) -> None:
        if basis is not None and grid is not None:
            raise InvalidInputError(
                "grid", grid, bound="None with a basis", remedy="Scale the basis instead."
            )
        self._key = SecretKey.from_os() if key is None else key
        if basis is not None:
            suitable_cipher(self._key, _CIPHER)  # rational coins come from AES-256, which takes 256-bit keys
        self._unit = privacy_unit
        self._lattice = None if basis is None else lattice_from_rows(basis)
        self._integers = PostQuantumGaussian(key=self._key, grid=grid, privacy_unit=privacy_unit)
        self._step = 0
        self._lock = threading.Lock()

    def release(self, value: Any, sensitivity: Sensitivity, budget: PrivacyBudget) -> Release:
        """Returns ``value`` on the lattice, with noise; its size is a multiple of the lattice's dimension.

        Raises:
            InvalidInputError: If the value's size does not fit the lattice, the lattice is too coarse for the sensitivity,
                or σ too small for the closeness bound. Nothing is released then. What the value holds never raises:
                NaN counts as 0, and numbers saturate at ±2^464 (whole ones at ±2^52).
        """
        if self._lattice is None:
            found = self._integers.release(value, sensitivity, budget)
            return dataclasses.replace(found, mechanism=self.name)
        return self._release_on(self._lattice, value, *checked_request(sensitivity, budget))

    def _release_on(
        self, lattice: Lattice, value: Any, sensitivity: Sensitivity, budget: PrivacyBudget
    ) -> Release:
        unpacked = unpack(value)
        copies, rest = divmod(unpacked.flat.size, lattice.dimension)
        if rest or unpacked.flat.size > MAX_COORDINATES:
            raise InvalidInputError(
                "the value's size",
                unpacked.flat.size,
                bound=f"a multiple of {lattice.dimension}, at most {MAX_COORDINATES}",
                remedy="Pad it, or use the integers (basis=None).",
            )
        added = lattice.rounding_bound * math.sqrt(copies)
        if added > sensitivity.l2:
            raise InvalidInputError(
                "basis",
                f"rounding adds {added:.6g}",
                bound=f"fine enough that rounding adds at most the sensitivity, {sensitivity.l2:.6g}",
                remedy="Scale the basis down.",
            )
        moved = (sensitivity.l2 + added) * (1.0 + 1e-12)
        variance, delta = self._calibrated(lattice, copies, moved, budget)
        with self._lock:
            step, self._step = self._step, self._step + 1
        coins = RationalCoins(fresh_subkey(self._key, "quantum.lattice_gaussian"), step=step)
        noisy: list[float] = []
        zero = (Fraction(0),) * lattice.dimension
        for row in unpacked.vector.reshape(copies, lattice.dimension).tolist():
            where = lattice.nearest_plane(tuple(map(Fraction, row)))
            noise = lattice.klein(zero, variance, coins)
            noisy += map(float, lattice.point([a + b for a, b in zip(where, noise, strict=True)]))
        sigma = math.sqrt(float(variance))
        return Release(
            value=unpacked.restore(np.array(noisy, dtype=np.float64)),
            mechanism=self.name,
            epsilon=budget.epsilon,
            delta=delta,
            rho=0.5 * (moved / sigma) ** 2 * (1.0 + 1e-12),
            noise_stddev=sigma,
            grid=f"lattice of dimension {lattice.dimension}, longest Gram-Schmidt vector "
            f"{max(lattice.gram_schmidt_norms):.6g}",
            guarantee=Guarantee(
                neighboring_relation=sensitivity.neighboring_relation,
                privacy_unit=self._unit,
                sensitivity=f"{sensitivity.l2:g} in L2; {moved:g} after rounding to the lattice",
                public=(
                    "kind and shape of the value",
                    "sensitivity",
                    "budget",
                    "basis",
                    "noise variance",
                    "numbers saturate at 2^464, whole ones at 2^52; NaN counts as 0",
                ),
                theorem="discrete Gaussian on a lattice; Klein's sampler within its Gram-Schmidt bound",
                source="Canonne, Kamath & Steinke 2020; Gentry, Peikert & Vaikuntanathan 2008",
            ),
            quantum_security_bits=quantum_security_bits(secret_bits(self._key), _CIPHER),
            certified=(
                f"({budget.epsilon:g}, {delta.total:.3g})-DP on the lattice"
                f"{given_assumed_entropy(vouched_entropy(self._key))}",
            ),
            estimated=(),
            assumed=(
                "The sensitivity passed in holds for the value passed in, between values with NaN counted as 0.",
                "Nobody times the sampler: how long it runs depends on the noise.",
                *strength_assumptions(secret_bits(self._key), _CIPHER, vouched=vouched_entropy(self._key)),
            ),
        )

    def _calibrated(
        self, lattice: Lattice, copies: int, moved: float, budget: PrivacyBudget
    ) -> tuple[Fraction, DeltaParts]:
        norms = lattice.gram_schmidt_norms
        factor = 1.0 + math.exp(budget.epsilon)
        coordinates = copies * lattice.dimension
        advantage = generator_advantage(coordinates * _TILE_PER_COORDINATE, searched_bits(self._key), _CIPHER)
        reserved = factor * (coordinates * MAX_DISTANCE + advantage)
        if reserved >= 0.5 * budget.delta:
            raise InvalidInputError(
                "delta",
                budget.delta,
                bound=f"above {2 * reserved:.3g}",
                remedy="Raise delta or lower epsilon.",
            )
        ideal = PrivacyBudget(epsilon=budget.epsilon, delta=(budget.delta - reserved) * (1.0 - 1e-12))
        sigma = lattice_gaussian_sigma(
            budget=ideal, l2_sensitivity=moved, gram_schmidt_norms=norms, copies=copies
        )
        variance = Fraction(sigma * (1.0 + 1e-12)) ** 2
        distance = lattice_distance(sigma=sigma, gram_schmidt_norms=norms, copies=copies)
        if distance > coordinates * MAX_DISTANCE:
            raise InvalidInputError(
                "sigma",
                sigma,
                bound=f"at least about {1.9 * max(norms):.6g}, 1.9 times the longest Gram-Schmidt vector, "
                "for the sampler to be within 2^-100",
                remedy="Scale the basis down or reduce it, or lower epsilon.",
            )
        delta = lattice_gaussian_delta(
            epsilon=budget.epsilon, sigma=sigma, l2_sensitivity=moved, gram_schmidt_norms=norms, copies=copies
        )
        return variance, DeltaParts(ideal=delta, sampler=factor * distance, generator=factor * advantage)
