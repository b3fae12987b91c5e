"""Checks of what a caller passes; each raises ``InvalidInputError`` with a remedy."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from dp_flash_attention.core.errors import InvalidInputError


def positive_finite(name: str, value: object, *, remedy: str) -> float:
    """Returns ``value`` as a float if it is a finite real number above 0.

    Raises:
        InvalidInputError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidInputError(name, value, bound="a finite number above 0", remedy=remedy)
    number = _as_float(value)
    if not math.isfinite(number) or number <= 0.0:
        raise InvalidInputError(name, value, bound="a finite number above 0", remedy=remedy)
    return number


def open_unit(name: str, value: object, *, remedy: str) -> float:
    """Returns ``value`` as a float if it lies strictly between 0 and 1.

    Raises:
        InvalidInputError: If it does not.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < _as_float(value) < 1.0:
        raise InvalidInputError(name, value, bound="strictly between 0 and 1", remedy=remedy)
    return float(value)


def probability(name: str, value: object, *, remedy: str) -> float:
    """Returns ``value`` as a float if it lies in (0, 1].

    Raises:
        InvalidInputError: If it does not.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < _as_float(value) <= 1.0:
        raise InvalidInputError(name, value, bound="above 0 and at most 1", remedy=remedy)
    return float(value)


def positive_int(name: str, value: object, *, remedy: str) -> int:
    """Returns ``value`` as an int if it is a whole number of at least 1.

    Raises:
        InvalidInputError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise InvalidInputError(name, value, bound="a whole number of at least 1", remedy=remedy)
    return int(value)


def non_negative_int(name: str, value: object, *, remedy: str) -> int:
    """Returns ``value`` as an int if it is a whole number of at least 0.

    Raises:
        InvalidInputError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise InvalidInputError(name, value, bound="a whole number of at least 0", remedy=remedy)
    return int(value)


def _as_float(value: Any) -> float:
    """Returns the nearest float, infinite where there is none."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
