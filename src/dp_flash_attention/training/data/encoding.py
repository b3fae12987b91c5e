"""How one column of values becomes token ids and interpolation weights. NumPy only.

Nothing here looks at more than the value being encoded: no minimum, mean, quantile or vocabulary is
learnt from the column, so encoding costs no privacy and adding a record changes no other record's tokens.

Shape letters: N records. Ids are local to the field; the schema adds each field's offset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

MISSING_ID = 0
"""Local id of a missing value, in every field."""

MISSING_TEXTS = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "<NA>"})
"""Texts that mean "no value" in a file. A fixed, public list."""

Ids = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]


def default_knots() -> tuple[float, ...]:
    """Returns the knots of a numeric column of which nothing is known: 0 and ±(1, 2, 5)·10^k, k = -3..6.

    >>> default_knots()[30:35]
    (0.0, 0.001, 0.002, 0.005, 0.01)
    >>> len(default_knots())
    61
    """
    positive = [float(f"{digit}e{exponent}") for exponent in range(-3, 7) for digit in (1, 2, 5)]
    return (*(-knot for knot in reversed(positive)), 0.0, *positive)


def encode_numeric(values: Floats, knots: Sequence[float]) -> tuple[Ids, Weights]:
    """Writes each number as a point between two neighbouring knots, so that it can be read back.

    Args:
        values: Shape [N]; NaN is missing. Numbers beyond the outer knots count as the outer knot.
        knots: Strictly increasing, public, at least two.

    Returns:
        Lower ids, shape [N], and weights of the next id, shape [N], in [0, 1]; the lower id weighs the
        rest. Knot k has id k + 1. A missing value is ``MISSING_ID`` with weight 0.
    """
    grid = np.asarray(knots, dtype=np.float64)
    missing = np.isnan(values)
    inside = np.clip(np.where(missing, grid[0], values), grid[0], grid[-1])
    lower = np.clip(np.searchsorted(grid, inside, side="right") - 1, 0, len(grid) - 2)
    weights = ((inside - grid[lower]) / (grid[lower + 1] - grid[lower])).astype(np.float32)
    weights[missing] = 0.0
    return np.where(missing, MISSING_ID, lower + 1).astype(np.int32), weights


@cache
def hashed_bucket(text: str, num_buckets: int) -> int:
    """Returns the public bucket of a category: BLAKE2b of its UTF-8 bytes, modulo ``num_buckets``.

    The hash is fixed, so a category has the same bucket in every run and data set.

    >>> hashed_bucket("teacher", 64) == hashed_bucket("teacher", 64)
    True
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"dpfa.category")
    return int.from_bytes(digest.digest(), "little") % num_buckets


def encode_category(text: str, categories: Sequence[str], num_buckets: int) -> int:
    """Returns the local id of one category: its place in the public list, else its hashed bucket."""
    if text in MISSING_TEXTS:
        return MISSING_ID
    if text in categories:
        return 1 + categories.index(text)
    return 1 + len(categories) + hashed_bucket(text, num_buckets)
