from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import (
    non_negative_int,
    open_unit,
    positive_finite,
    positive_int,
    probability,
)

NEVER: tuple[Any, ...] = (None, "1", True, False, math.nan, math.inf, -math.inf, -1, -(10**400), 1j, [1])


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (positive_finite, (5e-324, 1, Fraction(1, 4), np.float32(2.0), 1e308), (0, 0.0, 10**400)),
        (open_unit, (1e-300, 0.5, np.nextafter(1.0, 0.0)), (0, 1, 0.0, 1.0, 1.5, 10**400)),
        (probability, (1e-300, 0.5, 1, 1.0), (0, 0.0, np.nextafter(1.0, 2.0))),
        (positive_int, (1, np.int64(7), 2**70), (0, 1.0, 1.5, np.float64(2.0))),
        (non_negative_int, (0, 1, np.uint8(3)), (0.0, 1.5)),
    ],
)
def test_what_each_check_lets_pass(
    check: Callable[..., float], good: tuple[Any, ...], bad: tuple[Any, ...]
) -> None:
    for value in good:
        checked = check("share", value, remedy="Change it.")
        assert checked == value
        assert type(checked) is (int if "int" in check.__name__ else float)
    for value in (*bad, *NEVER):
        with pytest.raises(InvalidInputError, match=r"^share is .*, but it must be .*Change it"):
            check("share", value, remedy="Change it.")
