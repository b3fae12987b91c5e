"""Health tests of entropy sources: repetition count and adaptive proportion (NIST SP 800-90B, section 4.4).

Both hold a source against the min-entropy per byte that it *claims*, and raise when bytes come out that a source of
that entropy produces with a probability of at most ``ALARM_RATE`` per position. They notice a source that is stuck
or badly biased. They cannot notice a predictable one: a counter that was encrypted passes.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError

# SP 800-90B, 4.4 recommends 2^-20 to 2^-40. Over 1,024 bytes and both tests a good source then fails with
# probability below 2^-29.
ALARM_RATE: Final = Fraction(1, 2**40)
STARTUP_BYTES: Final = 1024
# SP 800-90B, 4.4.2: the window of a source with more than two symbols.
WINDOW: Final = 512


def repetition_cutoff(min_entropy_per_byte: float) -> int:
    """Returns the run length at which the repetition count test raises: 1 + ceil(40/H)."""
    _checked(min_entropy_per_byte)
    return 1 + math.ceil(-math.log2(ALARM_RATE) / min_entropy_per_byte)


def proportion_cutoff(min_entropy_per_byte: float, window: int = WINDOW) -> int:
    """Returns the count within a window, of 512 if not said, at which the adaptive proportion test raises.

    That is 1 + the smallest c with P(Binomial(window, 2^-H) > c) ≤ 2^-40, computed exactly: the probability is
    rounded up to a multiple of 2^-53, and sums are of integers.
    """
    _checked(min_entropy_per_byte)
    scale = 53
    success = min(1 << scale, math.ceil(2.0 ** (scale - min_entropy_per_byte)))
    failure = (1 << scale) - success
    whole = 1 << scale * window
    above, count, term = 0, window, success**window
    # Adds the terms from the top down until the tail is heavier than the rate allows.
    while (above := above + term) <= whole * ALARM_RATE:
        term = term * count * failure // ((window + 1 - count) * success)
        count -= 1
    return count + 1


def check_health(source: str, sample: bytes, *, min_entropy_per_byte: float) -> None:
    """Raises if ``sample`` contradicts the claimed entropy.

    Args:
        source: The source's name, for the message.
        sample: Consecutive bytes of the source.
        min_entropy_per_byte: What it claims, above 0 and at most 8 bits.

    Raises:
        NoiseUnavailableError: If a test fails.
        InvalidInputError: If the claim is out of range.
    """
    run, allowed = longest_run(sample), repetition_cutoff(min_entropy_per_byte)
    if run >= allowed:
        raise NoiseUnavailableError(
            f"Entropy source {source!r} repeated a byte {run} times in a row, but a source of "
            f"{min_entropy_per_byte:g} bits a byte stays below {allowed} (SP 800-90B, 4.4.1). "
            "Repair or remove the source."
        )
    window = min(WINDOW, len(sample))
    count, most = largest_proportion(sample), proportion_cutoff(min_entropy_per_byte, window)
    if count >= most:
        raise NoiseUnavailableError(
            f"Entropy source {source!r} gave one byte {count} times within {window}, but a source of "
            f"{min_entropy_per_byte:g} bits a byte stays below {most} (SP 800-90B, 4.4.2). "
            "Repair or remove the source."
        )


def longest_run(sample: bytes) -> int:
    """Returns the length of the longest run of equal bytes."""
    symbols = _symbols(sample)
    if len(symbols) == 0:
        return 0
    starts = np.flatnonzero(np.concatenate(([True], symbols[1:] != symbols[:-1])))
    return int(np.diff(np.append(starts, len(symbols))).max())


def largest_proportion(sample: bytes) -> int:
    """Returns how often a window's first byte occurs in it, at most, over consecutive windows of 512.

    A shorter sample is one window. What is left over behind whole windows is not counted.
    """
    symbols = _symbols(sample)
    size = max(1, min(WINDOW, len(symbols)))
    windows = symbols[: len(symbols) // size * size].reshape(-1, size)
    return int((windows == windows[:, :1]).sum(axis=1).max(initial=0))


def _symbols(sample: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(sample, dtype=np.uint8)


def _checked(min_entropy_per_byte: float) -> None:
    if not 0.0 < min_entropy_per_byte <= 8.0:
        raise InvalidInputError(
            "min_entropy_per_byte",
            min_entropy_per_byte,
            bound="above 0 and at most 8 bits",
            remedy="State what the source's own documentation or assessment says.",
        )
