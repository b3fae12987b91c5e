"""Checks of laws that are put together: wide noise from a table and a coin, noise that several parties add up.

Statistical checks draw fresh secret keys; each row's false-alarm rate is 1e-9.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import partial
from typing import Final

import numpy as np

from dp_flash_attention.accounting import skellam_rdp, summed_discrete_gaussian_tau
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.noise import SecretKey
from dp_flash_attention.noise.skellam import skellam_table
from dp_flash_attention.noise.wide_discrete_gaussian import WideDiscreteGaussian
from dp_flash_attention.noise.wide_skellam import WideSkellam
from dp_flash_attention.quantum.evidence import Evidence, NamedCheck
from dp_flash_attention.quantum.layered_noise import LayeredNoise
from dp_flash_attention.quantum.layered_plan import NoiseLaw
from dp_flash_attention.quantum.scale_evidence import scale_row, sensitivity

_BUDGET: Final = PrivacyBudget(epsilon=1.0, delta=1e-6)


def laws_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Whether to draw ten times as many numbers.
    """
    return [
        ("law of wide noise", wide_law),
        ("law of wide Skellam noise", wide_skellam),
        ("noise of several parties", partial(layered, 1_000_000 if deep else 100_000)),
        ("summed laws by independent code", summed_laws),
    ]


def wide_law() -> Iterator[Evidence]:
    """Yields the distance of wide noise from its law, summed in decimals over everything that can come out."""
    noise = WideDiscreteGaussian(Fraction(4096))
    k, masses = noise.multiplier, noise.table.masses
    with localcontext(Context(prec=60)):
        twice = 2 * Decimal(4096)
        # What is drawn and accepted at y = kA + u, and what should be, for y ≥ 0; both halves have the same sign coin.
        drawn = [
            Decimal(mass) * (-Decimal(u * (u + 2 * k * a)) / twice).exp()
            for a, mass in enumerate(masses)
            for u in range(k)
        ]
        ideal = [(-Decimal(y * y) / twice).exp() for y in range(len(drawn) + 200)]
        totals = (2 * sum(drawn) - drawn[0], 2 * sum(ideal) - ideal[0])
        padded = [*drawn, *[Decimal(0)] * 200]
        gaps = [abs(p / totals[0] - q / totals[1]) for p, q in zip(padded, ideal, strict=True)]
        distance = float((2 * sum(gaps) - gaps[0]) / 2)
        accepted = float(sum(drawn) / (Decimal(2) ** 128 * k))
    yield Evidence(
        name="wide noise, σ = 64: distance",
        claim="The law that is drawn is within the certified distance of the discrete Gaussian.",
        measured=f"total variation 2^{math.log2(distance):.1f}",
        bound=f"at most the certificate, 2^{math.log2(noise.total_variation):.1f}, itself at most 2^-100",
        holds=distance <= noise.total_variation <= 2.0**-100,
        basis="computed",
    )
    yield Evidence(
        name="wide noise, σ = 64: supply",
        claim="So many proposals are accepted that a chunk never runs short.",
        measured=f"{accepted:.4f} accepted",
        bound="at least 0.905, where 0.875 are needed of 131,072",
        holds=accepted >= 0.905,
        basis="computed",
    )


def wide_skellam() -> Iterator[Evidence]:
    """Yields what the table and the coin of wide Skellam noise make, against SciPy's Bessel functions."""
    from scipy.special import ive

    noise = WideSkellam(Fraction(2**28))
    k, mu = noise.multiplier, float(noise.variance)
    worst = 0.0
    for a in range(0, 32, 3):
        for u in (0, 1, k // 2, k - 1):
            ours = noise.table.masses[a] / noise.table.masses[0] * float(noise.acceptance(k * a, u))
            worst = max(worst, abs(ours / (ive(k * a + u, mu) / ive(0, mu)) - 1.0))
    yield Evidence(
        name="wide Skellam, μ = 2^28: table and coin",
        claim="What is drawn and accepted has the law's probabilities, e^-μ·I_k(μ), by SciPy's Bessel functions.",
        measured=f"largest relative error {worst:.1e} within 8 standard deviations",
        bound="1e-10",
        holds=worst <= 1e-10,
        basis="computed",
    )
    yield Evidence(
        name="wide Skellam, μ = 2^28: distance",
        claim="The certified distance of the sampled law from Skellam's is negligible.",
        measured=f"2^{math.log2(noise.total_variation):.1f}",
        bound="at most 2^-100",
        holds=0.0 < noise.total_variation <= 2.0**-100,
        basis="computed",
    )


def layered(num: int) -> Iterator[Evidence]:
    """Yields the variance of any h honest shares, and their ε."""
    laws: tuple[NoiseLaw, ...] = ("skellam", "discrete_gaussian")
    for law in laws:
        noise = LayeredNoise(num_parties=6, num_honest=4, law=law, grid=2.0**-8)
        plan = noise.plan(
            dimension=num,
            sensitivity=sensitivity(8.0),
            budget=_BUDGET,
        )
        row = np.zeros(num)
        honest = sum(noise.message(row, plan, key=SecretKey.from_os(), step=0) for _ in range(4))
        stddev = plan.layer("", 4).noise_stddev
        yield scale_row(
            f"LayeredNoise: 4 honest of 6, {law.replace('_', ' ')}", np.asarray(honest) * plan.grid, stddev
        )
        epsilon = plan.layer("", 4).epsilon
        yield Evidence(
            name=f"LayeredNoise: ε of 4 honest shares, {law.replace('_', ' ')}",
            claim="Four honest shares alone meet the budget.",
            measured=f"ε = {epsilon:.6f}",
            bound=f"at most {_BUDGET.epsilon:g}",
            holds=epsilon <= _BUDGET.epsilon,
            basis="computed",
        )


def summed_laws() -> Iterator[Evidence]:
    """Yields the Skellam table against SciPy's Bessel functions, its Rényi bound, and τ, against convolved laws."""
    from scipy.special import ive

    variance = Fraction(100)
    table = skellam_table(variance)
    reach = 60
    places = np.arange(-reach, reach + 1)
    ours = np.array([table.masses[table.largest + int(k)] / 2.0**128 for k in places])
    theirs = ive(np.abs(places), float(variance))
    error = float(np.abs(ours / theirs - 1.0).max())
    yield Evidence(
        name="Skellam: table, μ = 100",
        claim="The table's probabilities are those of the law, e^-μ·I_k(μ), by SciPy's Bessel functions.",
        measured=f"largest relative error {error:.1e} within 6 standard deviations",
        bound="1e-10",
        holds=error <= 1e-10,
        basis="computed",
    )
    worst = 0.0
    for order, shift in ((2, 1), (4, 3), (8, 5)):
        wide = np.arange(-400, 401)
        first, second = (np.log(np.maximum(ive(np.abs(wide - s), 100.0), 1e-290)) for s in (0, shift))
        true = float(np.logaddexp.reduce(order * first + (1 - order) * second) / (order - 1))
        worst = max(worst, true / skellam_rdp(order, variance=100.0, l2_sensitivity=shift, dimension=1))
    yield Evidence(
        name="Skellam: Rényi bound",
        claim="The published bound is not below the divergence, summed directly.",
        measured=f"truth over bound at most {worst:.4f}",
        bound="1",
        holds=worst <= 1.0,
        basis="computed",
    )
    sigma, count = 0.6, 3
    mass = np.exp(-0.5 * (np.arange(-30, 31) / sigma) ** 2)
    mass /= mass.sum()
    summed = np.convolve(np.convolve(mass, mass), mass)[60:121]
    wide_mass = np.exp(-0.5 * (np.arange(-30, 31) / sigma) ** 2 / count)
    seen = float(np.abs(np.log(summed[25:36] / (wide_mass / wide_mass.sum())[25:36])).max())
    tau = summed_discrete_gaussian_tau(sigma=sigma, num_summands=count)
    yield Evidence(
        name="summed discrete Gaussians: τ",
        claim="The closeness bound covers the log-ratio of the convolved law to the ideal one.",
        measured=f"log-ratio {seen:.4f}",
        bound=f"at most tau = {tau:.4f}",
        holds=seen <= tau,
        basis="computed",
    )
