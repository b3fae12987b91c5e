"""The noise room's exact generator, as this room uses it: by variance, with its certificate, one key a release."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from dp_flash_attention.noise import (
    DiscreteGaussianGenerator,
    ExactCipher,
    GaussianCertificate,
    NoiseKey,
    certify_layers,
    plan_layers,
)
from dp_flash_attention.quantum.values import Integers

MAX_DISTANCE_EXACT = Fraction(1, 2**100)
MAX_DISTANCE = float(MAX_DISTANCE_EXACT)
"""Largest certified total variation per sample; plans reserve δ for it."""


@dataclass(frozen=True, kw_only=True)
class ExactNoise:
    """The discrete Gaussian of one variance.

    Attributes:
        certificate: How it is put together and how far it is from the ideal law.
    """

    certificate: GaussianCertificate

    @property
    def total_variation(self) -> float:
        """Certified distance of one sample, rounded up."""
        exact = self.certificate.total_variation
        return float(exact) * (1.0 + 1e-15)

    @property
    def largest(self) -> int:
        """The largest magnitude that can come out."""
        return self.certificate.largest

    def draw(self, key: NoiseKey, num: int, *, step: int, cipher: ExactCipher = "aes-256-ctr") -> Integers:
        """Returns ``num`` integers, int64. A pair (key, step) is for one release only.

        Raises:
            NoiseUnavailableError: If the cipher cannot be used.
        """
        generator = DiscreteGaussianGenerator(
            key, layers=self.certificate.layers, cipher=cipher, max_distance=MAX_DISTANCE_EXACT
        )
        out = torch.empty(num, dtype=torch.int64)
        generator.fill_(out, step=step, stream=0)
        drawn: Integers = out.numpy().astype(np.int64, copy=False)
        return drawn


@lru_cache(maxsize=64)
def noise_for(variance: Fraction) -> ExactNoise:
    """Returns the noise of ``variance`` (in units of the grid squared), with its certificate.

    Raises:
        InvalidInputError: If the certified distance would be above 2^-100, or the variance is out of range.
    """
    certificate, _ = certify_layers(
        plan_layers(variance, max_distance=MAX_DISTANCE_EXACT), max_distance=MAX_DISTANCE_EXACT
    )
    return ExactNoise(certificate=certificate)
