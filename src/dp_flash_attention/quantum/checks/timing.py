"""Does the time of a draw tell its value? The rank correlation of time with magnitude, and a control that leaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Final

import numpy as np
import torch
from scipy import stats

from dp_flash_attention.noise import DiscreteGaussianGenerator, SecretKey
from dp_flash_attention.quantum.evidence import Evidence, NamedCheck
from dp_flash_attention.quantum.exact_noise import ExactNoise, noise_for, skellam_noise_for

MAX_CORRELATION: Final = 0.02
# The standard deviation of ρ over n independent calls is 1/sqrt(n - 1): the bound lies 4.9 of them away at 60,000
# calls (false alarm 1e-6) and 20 at 10^6.
_CALLS: Final = 60_000
_DEEP_CALLS: Final = 1_000_000
# A wide draw scans three tiles, so fewer fit the time; with fewer than 60,000 calls the bound is 4.9 deviations.
_WIDE_CALLS: Final = 8_000
_DEEP_WIDE_CALLS: Final = 250_000
_DEVIATIONS: Final = 4.9
_WIDE_VARIANCE: Final = Fraction(3 * 2**39)
_CONTROL_CALLS: Final = 5_000
_CONTROL_STDDEV: Final = 4
MIN_CONTROL: Final = 0.1
_PLANTED_NS: Final = 20_000
"""What a planted leak adds to a wide draw of 0.5 ms for each standard deviation of its value."""
_PLANTED_CALLS: Final = 2_000

DrawOne = Callable[[int], int]
"""Takes the number of the call and returns one sample; its time is what is measured."""
MakeNoise = Callable[[Fraction], ExactNoise]
"""Takes a variance and returns what a mechanism draws from."""


def timing_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Whether to time 10^6 calls of narrow noise, rather than 60,000, and 250,000 of wide noise, rather than 8,000.
    """
    calls = _DEEP_CALLS if deep else _CALLS
    wide_calls = _DEEP_WIDE_CALLS if deep else _WIDE_CALLS
    stddevs = (4, 32) if deep else (4,)
    wide = {"wide Gaussian": noise_for, "wide Skellam": skellam_noise_for}
    return [
        ("a sampler that leaks is seen", control),
        *((f"time of exact noise at σ = {stddev}", partial(exact_time, stddev, calls)) for stddev in stddevs),
        ("a wide sampler that leaks is seen", wide_control),
        *((f"time of {law} noise", partial(wide_time, law, make, wide_calls)) for law, make in wide.items()),
    ]


def wide_time(law: str, make: MakeNoise, calls: int) -> Iterator[Evidence]:
    """Yields what ``no_leak`` does of what mechanisms draw from, at σ = 1.3 million steps and under a fresh key."""
    yield from no_leak(law, wide_at_a_time(make), calls)


def wide_at_a_time(make: MakeNoise) -> DrawOne:
    """Returns a function that draws a single wide integer at the step of its argument, as mechanisms do."""
    noise, key = make(_WIDE_VARIANCE), SecretKey.from_os()
    return lambda call: int(noise.draw(key, 1, step=call)[0])


def planted(draw: DrawOne, stddev: float) -> DrawOne:
    """Returns ``draw`` with a leak: it goes on for 20 µs a standard deviation of what it drew."""

    def leaking(call: int) -> int:
        value = draw(call)
        until = time.perf_counter_ns() + int(_PLANTED_NS * abs(value) / stddev)
        while time.perf_counter_ns() < until:
            pass
        return value

    return leaking


def wide_control() -> Iterator[Evidence]:
    """Yields whether this clock, on this machine, today, sees 4 % of a wide draw's time for each standard deviation."""
    found = correlation(planted(wide_at_a_time(noise_for), float(_WIDE_VARIANCE) ** 0.5), _PLANTED_CALLS)
    yield Evidence(
        name="control: a wide sampler that leaks",
        claim="The measurement can see a leak of wide noise: 20 µs for each standard deviation show.",
        measured=f"ρ = {found:+.4f} over {_PLANTED_CALLS:,} calls",
        bound=f"ρ > {MIN_CONTROL:g}",
        holds=found > MIN_CONTROL,
    )


def exact_time(stddev: int, calls: int) -> Iterator[Evidence]:
    """Yields what ``no_leak`` does of exact noise under a fresh key."""
    draw = one_at_a_time(DiscreteGaussianGenerator(SecretKey.from_os(), stddev=stddev))
    yield from no_leak(f"σ = {stddev}", draw, calls)


def one_at_a_time(generator: DiscreteGaussianGenerator) -> DrawOne:
    """Returns a function that draws a single integer at the step of its argument."""
    out = torch.empty(1, dtype=torch.int64)

    def draw(call: int) -> int:
        generator.fill_(out, step=call, stream=0)
        return int(out)

    return draw


def correlation(draw: DrawOne, calls: int) -> float:
    """Returns Spearman's ρ between the time of a call and the magnitude of what it returned."""
    seconds, magnitudes = np.empty(calls), np.empty(calls, dtype=np.int64)
    for call in range(-100, calls):  # the first hundred warm caches and are overwritten
        began = time.perf_counter_ns()
        value = draw(call if call >= 0 else call + (1 << 40))
        seconds[call] = time.perf_counter_ns() - began
        magnitudes[call] = abs(value)
    return float(stats.spearmanr(seconds, magnitudes).statistic)


def no_leak(name: str, draw: DrawOne, calls: int) -> Iterator[Evidence]:
    """Yields the correlation of ``draw``."""
    found = correlation(draw, calls)
    largest = max(MAX_CORRELATION, _DEVIATIONS * calls**-0.5)
    yield Evidence(
        name=f"{name}: time against magnitude",
        claim="How long a draw takes does not tell how large it is.",
        measured=f"ρ = {found:+.4f} over {calls:,} calls",
        bound=f"|ρ| < {largest:.2g} (independent calls: ±{calls**-0.5:.4f})",
        holds=abs(found) < largest,
    )


def walking_sampler() -> DrawOne:
    """Returns a sampler with the leak of textbooks: it walks up the table until the word is used up."""
    table = DiscreteGaussianGenerator(SecretKey.from_os(), stddev=_CONTROL_STDDEV).tables[0]
    bits = np.random.default_rng()

    def draw(call: int) -> int:
        word = int.from_bytes(bits.bytes(16), "little")
        magnitude = 0
        while word >= table.masses[magnitude]:
            word -= table.masses[magnitude]
            magnitude += 1
        return magnitude

    return draw


def control() -> Iterator[Evidence]:
    """Yields whether this clock, on this machine, today, sees a sampler that walks along its table."""
    found = correlation(walking_sampler(), _CONTROL_CALLS)
    yield Evidence(
        name="control: a sampler that leaks",
        claim="The measurement can see a leak: a sampler that walks along its table shows one.",
        measured=f"ρ = {found:+.4f} over {_CONTROL_CALLS:,} calls",
        bound=f"ρ > {MIN_CONTROL:g}",
        holds=found > MIN_CONTROL,
    )
