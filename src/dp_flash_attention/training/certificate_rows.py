"""Rows of a checked certificate, and where two statements differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SAME = 1e-6
"""Relative difference below which figures of an accountant are the same. It composes thousands of distributions by Fourier
transforms, where the last digits of other processors and mathematical libraries add up."""


class Standing(StrEnum):
    """What a row of a certificate is: only ``certified`` and ``file`` can be computed again."""

    CERTIFIED = "certified"
    ASSUMED = "assumed"
    ESTIMATED = "estimated"
    FILE = "file"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that a certificate states, and what came out when it was computed again.

    Attributes:
        name: What it is.
        stated: What the certificate says.
        recomputed: What follows from its numbers, or from the file that it names.
        holds: Whether the one agrees with the other.
        standing: What the statement is.
        remark: How it was computed, or what is wrong.
    """

    name: str
    stated: str
    recomputed: str
    holds: bool
    standing: Standing
    remark: str = ""


def differences(stated: Any, again: Any, where: str) -> Iterator[str]:
    """Yields where two JSON values differ; numbers may differ in their last digits.

    Args:
        stated: One of them.
        again: The other.
        where: What to call the whole.
    """
    if isinstance(stated, dict) and isinstance(again, dict):
        for key in sorted(stated.keys() | again.keys()):
            path = f"{where}.{key}" if where else key
            if key not in stated or key not in again:
                yield path
            else:
                yield from differences(stated[key], again[key], path)
    elif isinstance(stated, list) and isinstance(again, list) and len(stated) == len(again):
        for index, (one, other) in enumerate(zip(stated, again, strict=True)):
            yield from differences(one, other, f"{where}[{index}]")
    elif _is_number(stated) and _is_number(again):
        if not math.isclose(stated, again, rel_tol=SAME):
            yield where
    elif type(stated) is not type(again) or stated != again:
        yield where


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
