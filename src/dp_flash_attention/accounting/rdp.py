"""Rényi-DP bounds: the cross-check of the PLD accountant, computed independently of it.

The Rényi divergence of a sampled Gaussian is summed here term by term, all terms positive: dp_accounting 0.6
loses its digits where sampling is rare (it finds a negative divergence, and then reports ε = 0). The
conversion to (ε, δ) is dp_accounting's.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from dp_flash_attention.accounting.events import GaussianRelease, PoissonSampledGaussian, PrivacyEvent
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation

# Dense where the optimum usually lies, sparse up to what budgets of ε < 0.03 at δ = 1e-6 need.
_ORDERS: NDArray[np.float64] = np.array(
    [
        *np.arange(1.05, 8.0, 0.05),
        *range(8, 64),
        *range(64, 256, 8),
        256,
        320,
        384,
        512,
        768,
        1024,
        2048,
        4096,
        8192,
    ]
)


def rdp_epsilon(events: tuple[PrivacyEvent, ...], delta: float) -> float:
    """Returns an upper bound of ε at ``delta`` (conversion: Canonne, Kamath & Steinke 2020, Proposition 12).

    Raises:
        InvalidInputError: For Poisson sampling under replace-one, which has no Rényi bound here.
    """
    value, _ = rdp_privacy_accountant.compute_epsilon(_ORDERS, _divergence(events), delta)
    return float(value)


def rdp_delta(events: tuple[PrivacyEvent, ...], epsilon: float) -> float:
    """Returns an upper bound of δ at ``epsilon``; see ``rdp_epsilon``.

    Raises:
        InvalidInputError: For Poisson sampling under replace-one, which has no Rényi bound here.
    """
    value, _ = rdp_privacy_accountant.compute_delta(_ORDERS, _divergence(events), epsilon)
    return float(value)


def unsampled_epsilon(events: tuple[PrivacyEvent, ...], delta: float) -> float:
    """Returns an upper bound of ε that claims no amplification by sampling; valid for either relation."""
    squared_mu = sum(gaussian_mu(event) ** 2 for event in events)
    value, _ = rdp_privacy_accountant.compute_epsilon(_ORDERS, 0.5 * squared_mu * _ORDERS, delta)
    return float(value)


def gaussian_mu(event: PrivacyEvent) -> float:
    """Returns the μ of the Gaussian-DP bound of an event, sampling ignored.

    k Gaussian releases of μ₁ each are one of μ₁·√k (Dong, Roth & Su 2022, Corollary 3.3). Under replace-one a
    clipped sum moves by 2C.
    """
    if isinstance(event, GaussianRelease):
        return math.sqrt(event.count) / event.noise_multiplier
    count = event.num_steps if isinstance(event, PoissonSampledGaussian) else event.num_epochs
    shift = 2.0 if event.neighboring_relation is NeighboringRelation.REPLACE_ONE else 1.0
    return shift * math.sqrt(count) / event.noise_multiplier


def _divergence(events: tuple[PrivacyEvent, ...]) -> NDArray[np.float64]:
    total = np.zeros_like(_ORDERS)
    for event in events:
        if isinstance(event, PoissonSampledGaussian) and event.sampling_prob < 1.0:
            if event.neighboring_relation is NeighboringRelation.REPLACE_ONE:
                raise InvalidInputError(
                    "accountant",
                    "rdp",
                    bound="'pld' for Poisson sampling under replace-one",
                    remedy="Leave accountant at its default.",
                )
            total += event.num_steps * np.array(
                _sampled_divergence(event.sampling_prob, event.noise_multiplier)
            )
        else:
            total += 0.5 * gaussian_mu(event) ** 2 * _ORDERS
    return total


@lru_cache(maxsize=64)
def _sampled_divergence(sampling_prob: float, noise_multiplier: float) -> tuple[float, ...]:
    """Rényi divergence of one sampled Gaussian at every order (Mironov et al. 2019, section 3.3).

    It is the larger of the two directions (their Theorem 5). (α−1)·R(α) is the cumulant generating function
    of the loss, hence convex in α and 0 at α = 1. Between whole orders its chord is therefore an upper bound.
    """
    lower = np.floor(_ORDERS).astype(int)
    wanted = sorted({*lower.tolist(), *(lower + 1).tolist()})
    cumulant = {order: _cumulant(order, sampling_prob, noise_multiplier) for order in wanted}
    chords = []
    for order, below in zip(_ORDERS.tolist(), lower.tolist(), strict=True):
        share = order - below
        value = (
            cumulant[below] if share == 0.0 else (1.0 - share) * cumulant[below] + share * cumulant[below + 1]
        )
        chords.append(value / (order - 1.0))
    return tuple(chords)


def _cumulant(order: int, sampling_prob: float, noise_multiplier: float) -> float:
    """Returns log E[(P/Q)^α] = log1p(Σ_{k=2}^α C(α,k) (1−q)^{α−k} q^k (e^{k(k−1)/2σ²} − 1)) for whole α."""
    if order < 2:
        return 0.0
    k = np.arange(2, order + 1, dtype=np.float64)
    exponent = k * (k - 1.0) / (2.0 * noise_multiplier**2)
    # log(e^x − 1), exact at both ends
    log_growth = np.where(exponent > 30.0, exponent, np.log(np.expm1(np.minimum(exponent, 30.0))))
    log_choose = gammaln(order + 1.0) - gammaln(k + 1.0) - gammaln(order - k + 1.0)
    log_terms = (
        log_choose + (order - k) * math.log1p(-sampling_prob) + k * math.log(sampling_prob) + log_growth
    )
    return float(np.logaddexp(0.0, logsumexp(log_terms)))
