"""Health tests: cut-offs by another library, bad sources found, good ones left alone at the stated rate."""

import math

import numpy as np
import pytest
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise.health import (
    ALARM_RATE,
    STARTUP_BYTES,
    WINDOW,
    check_health,
    largest_proportion,
    longest_run,
    proportion_cutoff,
    repetition_cutoff,
)


@pytest.mark.parametrize("entropy", [0.01, 0.3, 1.0, 2.5, 7.5, 8.0])
def test_cutoffs_are_those_of_the_standard(entropy):
    assert repetition_cutoff(entropy) == 1 + math.ceil(40 / entropy)
    # SP 800-90B, 4.4.2: 1 + CRITBINOM(W, 2^-H, 1 - α).
    cutoff = proportion_cutoff(entropy)
    tail = stats.binom.sf(np.array([cutoff - 1, cutoff - 2]), WINDOW, 2.0**-entropy)
    assert tail[0] <= float(ALARM_RATE) * (1 + 1e-6)
    assert tail[1] > float(ALARM_RATE) * (1 - 1e-6)


def test_a_published_cutoff():
    """SP 800-90B, section 4.4.1: at α = 2^-20 and H = 2 the cut-off is 11; ours is for 2^-40, hence 21."""
    assert repetition_cutoff(2.0) == 21


def test_a_perfect_source_fails_less_often_than_stated():
    at_most = STARTUP_BYTES * 256.0 ** (1 - repetition_cutoff(8.0))
    at_most += STARTUP_BYTES / WINDOW * stats.binom.sf(proportion_cutoff(8.0) - 2, WINDOW - 1, 1 / 256)
    assert at_most < 2.0**-29
    for start in range(20):
        sample = np.random.default_rng(start).bytes(STARTUP_BYTES)
        check_health("good", sample, min_entropy_per_byte=8.0)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (bytes(1024), "in a row"),
        (b"\x07" * 6 + bytes(range(256)) * 4, "in a row"),
        (b"ab" * 512, "within 512"),
        (bytes(i % 16 for i in range(1024)), "within 512"),
    ],
    ids=["stuck", "stuck for a moment", "two values", "sixteen values"],
)
def test_a_bad_source_is_found(sample, said):
    with pytest.raises(NoiseUnavailableError, match=said):
        check_health("bad", sample, min_entropy_per_byte=8.0)


def test_a_weak_source_that_says_so_passes():
    sample = np.random.default_rng(3).integers(0, 2, 1024, dtype=np.uint8).tobytes()
    check_health("coin", sample, min_entropy_per_byte=1.0)
    with pytest.raises(NoiseUnavailableError, match="coin"):
        check_health("coin", sample, min_entropy_per_byte=4.0)


def test_the_statistics_themselves():
    assert longest_run(b"") == 0
    assert longest_run(b"abbbcc") == 3
    assert longest_run(b"aaaa") == 4
    assert largest_proportion(b"") == 0
    assert largest_proportion(b"a" * 511) == 511
    assert largest_proportion(b"a" + b"b" * 510 + b"a" + b"c" * 512) == 512


@pytest.mark.parametrize("entropy", [0.0, -1.0, 8.1, math.nan])
def test_a_claim_out_of_range_is_refused(entropy):
    with pytest.raises(InvalidInputError, match="min_entropy_per_byte"):
        check_health("x", bytes(32), min_entropy_per_byte=entropy)


@pytest.mark.parametrize("window", [32, 40, 256])
def test_a_sample_shorter_than_a_window_is_one(window):
    """A key file of 32 bytes may be one: two values in turn, or sixteen, are not 8 bits a byte."""
    with pytest.raises(NoiseUnavailableError, match=f"within {window}"):
        check_health("short", b"ab" * (window // 2), min_entropy_per_byte=8.0)
    cutoff = proportion_cutoff(8.0, window)
    tail = stats.binom.sf(np.array([cutoff - 1, cutoff - 2]), window, 1 / 256)
    assert tail[0] <= float(ALARM_RATE) * (1 + 1e-6)
    assert tail[1] > float(ALARM_RATE) * (1 - 1e-6)
    for start in range(20):
        check_health("good", np.random.default_rng(start).bytes(window), min_entropy_per_byte=8.0)
