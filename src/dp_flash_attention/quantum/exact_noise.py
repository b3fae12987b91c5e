"""The noise room's exact samplers, as this room uses them: by variance, with their certificate, one key a release."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dp_flash_attention.noise import (
    DiscreteGaussianGenerator,
    ExactCipher,
    Layers,
    NoiseKey,
    certify_layers,
    plan_layers,
)
from dp_flash_attention.noise.discrete_gaussian import Consume
from dp_flash_attention.noise.skellam import SkellamTable, skellam, skellam_table
from dp_flash_attention.noise.wide_discrete_gaussian import MIN_VARIANCE, WideDiscreteGaussian
from dp_flash_attention.noise.wide_skellam import MIN_VARIANCE as _WIDE_SKELLAM_FROM
from dp_flash_attention.noise.wide_skellam import WideSkellam
from dp_flash_attention.quantum.values import Integers

# Layers over one table and coins, millions a second on one core of an AMD EPYC 9004: 47 and 88 at σ = 64, 33 and 88 at
# σ = 300, 29 and 66 at σ = 2,047; one number alone 3 to 5 ms (its tables are certified anew) and 0.5 ms.
_WIDE_FROM = MIN_VARIANCE
MAX_DISTANCE_EXACT = Fraction(1, 2**100)
MAX_DISTANCE = float(MAX_DISTANCE_EXACT)
"""Largest certified total variation per sample; plans reserve δ for it."""


@dataclass(frozen=True, kw_only=True)
class ExactNoise:
    """The discrete Gaussian, or Skellam's law, of one variance.

    Attributes:
        total_variation: Certified distance of one sample from the ideal law, rounded up.
        largest: The largest magnitude that can come out.
        sampler: What draws: layers of tables, one table and coins for wide noise, or one Skellam table.
    """

    total_variation: float
    largest: int
    sampler: Layers | WideDiscreteGaussian | WideSkellam | SkellamTable

    def draw(self, key: NoiseKey, num: int, *, step: int, cipher: ExactCipher = "aes-256-ctr") -> Integers:
        """Returns ``num`` integers, int64. A pair (key, step) is for one release only.

        Raises:
            NoiseUnavailableError: If the cipher cannot be used.
        """
        out = np.empty(num, dtype=np.int64)

        def keep(start: int, numbers: npt.NDArray[Any]) -> None:
            out[start : start + len(numbers)] = numbers

        self.stream(key, num, keep, step=step, cipher=cipher)
        return out

    def stream(
        self, key: NoiseKey, num: int, consume: Consume, *, step: int, cipher: ExactCipher = "aes-256-ctr"
    ) -> None:
        """Hands what ``draw`` returns to ``consume``, piece by piece and from several threads; no full-size buffer.

        Raises:
            NoiseUnavailableError: If the cipher cannot be used.
        """
        if isinstance(self.sampler, WideDiscreteGaussian | WideSkellam):
            self.sampler.stream(key, num, consume, step=step, cipher=cipher)
        elif isinstance(self.sampler, SkellamTable):
            assert cipher == "aes-256-ctr", "tables of Skellam numbers are read with AES-256 only"
            consume(0, skellam(num, variance=self.sampler.variance, key=key, step=step))
        else:
            self.generator(key, cipher=cipher).stream(num, consume, step=step, stream=0)

    def generator(self, key: NoiseKey, *, cipher: ExactCipher) -> DiscreteGaussianGenerator:
        """Returns the generator of layered noise, which writes to CUDA tensors too if the cipher is ChaCha20.

        Raises:
            NoiseUnavailableError: If the cipher cannot be used.
        """
        assert isinstance(self.sampler, Layers), "ask noise_for for layers"
        return DiscreteGaussianGenerator(
            key, layers=self.sampler, cipher=cipher, max_distance=MAX_DISTANCE_EXACT
        )


def makes_layers(cipher: ExactCipher) -> bool:
    """Whether a cipher's noise is layers whatever its width.

    ChaCha20 is the cipher with a kernel, and the kernel makes layers. So that one key makes the same integers on every
    device, the host makes them of layers too; AES-256-CTR and SHAKE256 run on the host only, and take the fastest sampler.
    """
    return cipher == "chacha20"


@lru_cache(maxsize=64)
def noise_for(variance: Fraction, *, layered: bool = False) -> ExactNoise:
    """Returns the noise of ``variance`` (in units of the grid squared), with its certificate.

    Args:
        variance: σ².
        layered: Whether only layers will do: ``makes_layers(cipher)``.

    Raises:
        InvalidInputError: If the certified distance would be above 2^-100, or the variance is out of range.
    """
    if variance >= _WIDE_FROM and not layered:
        wide = WideDiscreteGaussian(variance)
        assert wide.total_variation <= MAX_DISTANCE, "128-bit tables are far finer"
        return ExactNoise(total_variation=wide.total_variation, largest=wide.largest, sampler=wide)
    layers = plan_layers(variance, max_distance=MAX_DISTANCE_EXACT)
    certificate, _ = certify_layers(layers, max_distance=MAX_DISTANCE_EXACT)
    return ExactNoise(
        total_variation=float(certificate.total_variation) * (1.0 + 1e-15),
        largest=certificate.largest,
        sampler=layers,
    )


@lru_cache(maxsize=16)
def skellam_noise_for(variance: Fraction) -> ExactNoise:
    """Returns Skellam noise of ``variance`` (in units of the grid squared), with its certificate.

    From 2^28 on it is drawn as wide discrete Gaussians are; below, by binary search in one table, whose time depends on what
    comes out.

    Raises:
        InvalidInputError: If the variance is out of range.
    """
    if variance >= _WIDE_SKELLAM_FROM:
        wide = WideSkellam(variance)
        return ExactNoise(total_variation=wide.total_variation, largest=wide.largest, sampler=wide)
    table = skellam_table(variance)
    return ExactNoise(total_variation=table.total_variation, largest=table.largest, sampler=table)
