"""Statistical checks: χ² of the laws, fairness and independence of signs, the normals' tail.

Keys are fresh from the system, so each test has a false-alarm rate; it is part of its row.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from scipy import special, stats

from dp_flash_attention.noise import DiscreteGaussianGenerator, NoiseName, SecretKey, make_generator
from dp_flash_attention.noise.keystream import TILE_PAIRS, Domain, new_buffer
from dp_flash_attention.noise.normals import Float32Transform
from dp_flash_attention.noise.secure import CipherKeystream
from dp_flash_attention.quantum.decimal_law import magnitude_law
from dp_flash_attention.quantum.evidence import Evidence, NamedCheck

ALARM: Final = 1e-7
_NUM: Final = 10_000_000
_DEEP_NUM: Final = 100_000_000
_PART: Final = 10_000_000
_DIEHARDER_PARTS: Final = 256
_NORMAL_CELLS: Final = 1000
# 68 of 10^7 lie beyond: enough to reject a tail cut off there.
_TAIL: Final = 4.5
# The radius of the all-zero word, sqrt(2·65·ln 2): what a full tail reaches.
_REACH: Final = math.sqrt(130.0 * math.log(2.0))
# χ² needs cells that are expected a few times; rarer magnitudes are joined.
_MIN_EXPECTED: Final = 25.0

NORMALS: Final[tuple[NoiseName, ...]] = ("secure", "fast")

Integers = npt.NDArray[np.int64]
DrawIntegers = Callable[[int, int], Integers]
"""Takes a number of samples and a step, returns them."""


def statistics_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Whether to draw 10^8 samples, and to run dieharder if it is installed.
    """
    num = _DEEP_NUM if deep else _NUM
    checks: list[NamedCheck] = [
        (f"exact noise at σ = {stddev}", partial(exact_law, stddev, num)) for stddev in (4, 32)
    ]
    checks += [(f"{name} normals", partial(normal_law, name, num)) for name in NORMALS]
    checks.append(("the normals' reach", normal_reach))
    if deep and shutil.which("dieharder"):
        checks.append(("dieharder on AES-256-CTR", dieharder))
    return checks


def exact_law(stddev: int, num: int) -> Iterator[Evidence]:
    """Yields what ``integer_law`` does of exact noise under a fresh key."""
    generator = DiscreteGaussianGenerator(SecretKey.from_os(), stddev=stddev)
    yield from integer_law(partial(draw_integers, generator), stddev, num)


def draw_integers(generator: DiscreteGaussianGenerator, num: int, step: int) -> Integers:
    """Returns ``num`` samples of ``generator`` at ``step``."""
    return generator.fill_(torch.empty(num, dtype=torch.int64), step=step, stream=0).numpy()


def integer_law(draw: DrawIntegers, stddev: int, num: int) -> Iterator[Evidence]:
    """Yields χ² of signed values against the law, and the independence of signs."""
    law = [float(p) for p in magnitude_law(Fraction(stddev) ** 2)]
    reach = len(law) - 1
    counts = np.zeros(2 * reach + 1, dtype=np.int64)
    products = np.zeros(2, dtype=np.int64)
    pairs = 0
    for step, part in enumerate(_parts(num)):
        values = draw(part, step)
        counts += np.bincount(np.clip(values, -reach, reach) + reach, minlength=2 * reach + 1)
        signs = np.sign(values)
        for lag in (1, 2):
            products[lag - 1] += int(np.dot(signs[:-lag], signs[lag:]))
        pairs += int(np.count_nonzero(signs[:-1] * signs[1:]))
    expected = num * np.array([law[abs(k)] / (1 if k == 0 else 2) for k in range(-reach, reach + 1)])
    cells, p_value = chi_square(counts, expected)
    name = f"exact, σ = {stddev}"
    yield _p_value_row(
        f"{name}: χ² on {num:,} samples", "Signed values follow the law.", p_value, f"{cells} cells"
    )
    score = max(abs(int(product)) for product in products) / math.sqrt(pairs)
    limit = float(stats.norm.isf(ALARM / 4))
    yield Evidence(
        name=f"{name}: signs of neighbours",
        claim="The signs of samples next to each other, and next but one, are independent.",
        measured=f"{score:.2f} standard deviations from independence",
        bound=f"{limit:.2f} (false alarm {ALARM:g})",
        holds=score <= limit,
    )


def chi_square(counts: npt.NDArray[Any], expected: npt.NDArray[Any]) -> tuple[int, float]:
    """Returns the number of cells and the p-value, neighbouring cells joined until each expects enough."""
    cells = np.floor(np.cumsum(expected) / _MIN_EXPECTED).astype(np.int64)
    # A cell of its own for every value that is expected often enough, or the last of a run of rare ones.
    ends = np.flatnonzero(np.diff(cells, append=cells[-1] + 1))
    ends[-1] = len(expected) - 1
    observed = np.diff(np.cumsum(counts)[ends], prepend=0)
    joined = np.diff(np.cumsum(expected)[ends], prepend=0.0)
    joined *= observed.sum() / joined.sum()  # sums differ by rounding only
    return len(ends), float(stats.chisquare(observed, joined).pvalue)


def normal_law(name: NoiseName, num: int) -> Iterator[Evidence]:
    """Yields χ² over cells of equal probability, and how many normals lie beyond 4.5."""
    generator = make_generator(name, SecretKey.from_os())
    counts = np.zeros(_NORMAL_CELLS, dtype=np.int64)
    beyond = 0
    for step, part in enumerate(_parts(num)):
        values = generator.fill_normal_(torch.empty(part), step=step, stream=0).numpy()
        cells = (special.ndtr(values.astype(np.float64)) * _NORMAL_CELLS).astype(np.int64)
        counts += np.bincount(np.minimum(cells, _NORMAL_CELLS - 1), minlength=_NORMAL_CELLS)
        beyond += int(np.count_nonzero(np.abs(values) > _TAIL))
    p_value = float(stats.chisquare(counts).pvalue)
    yield _p_value_row(
        f"{name}: χ² on {num:,} samples", "Normals follow their law.", p_value, f"{_NORMAL_CELLS} cells"
    )
    expected = num * math.erfc(_TAIL / math.sqrt(2.0))
    low, high = stats.poisson.interval(1 - ALARM, expected)
    yield Evidence(
        name=f"{name}: tail beyond {_TAIL} σ",
        claim="The tail is neither cut off nor too heavy.",
        measured=f"{beyond}",
        bound=f"{low:.0f} to {high:.0f} (expected {expected:.1f}, false alarm {ALARM:g})",
        holds=low <= beyond <= high,
    )


def normal_reach() -> Iterator[Evidence]:
    """Yields the largest normal that the transform can make, by giving it the words that make it."""
    words = np.zeros((1, 2, TILE_PAIRS), dtype=np.uint32)
    out = np.empty((1, 2, TILE_PAIRS), dtype=np.float32)
    Float32Transform(1).write(words, lambda pairs: np.zeros(len(pairs), np.uint32), np.float32(2.0), out)
    reach = float(np.abs(out).max())
    yield Evidence(
        name="normals, float32: reach",
        claim="Nothing is clamped: the smallest uniform number gives the full radius (a clamp at 1e-7 gives 5.68).",
        measured=f"{reach:.4f} σ",
        bound=f"{_REACH:.4f} σ ± 1e-4",
        holds=abs(reach - _REACH) < 1e-4,
        basis="computed",
    )


def dieharder() -> Iterator[Evidence]:
    """Yields dieharder's verdicts on a stream of AES-256-CTR, quick tests only."""
    source = CipherKeystream(SecretKey.from_os(), "aes-256-ctr").at(step=0, stream=0)
    size = 1 << 20
    # 256 MiB: less makes dieharder read the same words again.
    words = b"".join(
        source.read(size, domain=Domain.BITS, block=part * size // 16, buffer=new_buffer(size)).tobytes()
        for part in range(_DIEHARDER_PARTS)
    )
    for test in ("0", "2", "8", "15", "100", "101"):
        done = subprocess.run(
            ["dieharder", "-d", test, "-g", "200", "-c", ","], input=words, capture_output=True, check=True
        )
        verdict = done.stdout.decode().strip().splitlines()[-1].split(",")[-1].strip()
        yield Evidence(
            name=f"dieharder, test {test}",
            claim="The bits pass dieharder.",
            measured=verdict,
            bound="not FAILED (false alarm 1e-6 each)",
            holds=verdict in ("PASSED", "WEAK"),
        )


def _parts(num: int) -> list[int]:
    return [min(_PART, num - start) for start in range(0, num, _PART)]


def _p_value_row(name: str, claim: str, p_value: float, cells: str) -> Evidence:
    return Evidence(
        name=name,
        claim=claim,
        measured=f"p = {p_value:.3g}, {cells}",
        bound=f"p ≥ {ALARM:g}",
        holds=p_value >= ALARM,
    )
