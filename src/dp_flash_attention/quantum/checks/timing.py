"""Does the time of a draw tell its value? The rank correlation of time with magnitude, and a control that leaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import numpy as np
import torch
from scipy import stats

from dp_flash_attention.noise import DiscreteGaussianGenerator, SecretKey
from dp_flash_attention.quantum.evidence import Evidence, NamedCheck

MAX_CORRELATION: Final = 0.02
# The standard deviation of ρ over n independent calls is 1/sqrt(n - 1): the bound lies 4.9 of them away at 60,000
# calls (false alarm 1e-6) and 20 at 10^6.
_CALLS: Final = 60_000
_DEEP_CALLS: Final = 1_000_000
_CONTROL_CALLS: Final = 5_000
_CONTROL_STDDEV: Final = 4
MIN_CONTROL: Final = 0.1

DrawOne = Callable[[int], int]
"""Takes the number of the call and returns one sample; its time is what is measured."""


def timing_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Whether to time 10^6 calls of each, rather than 60,000.
    """
    calls = _DEEP_CALLS if deep else _CALLS
    stddevs = (4, 32) if deep else (4,)
    return [
        ("a sampler that leaks is seen", control),
        *((f"time of exact noise at σ = {stddev}", partial(exact_time, stddev, calls)) for stddev in stddevs),
    ]


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
    yield Evidence(
        name=f"{name}: time against magnitude",
        claim="How long a draw takes does not tell how large it is.",
        measured=f"ρ = {found:+.4f} over {calls:,} calls",
        bound=f"|ρ| < {MAX_CORRELATION:g} (independent calls: ±{calls**-0.5:.4f})",
        holds=abs(found) < MAX_CORRELATION,
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
