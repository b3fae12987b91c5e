"""Evidence that noise has the scale that is charged for."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.privacy import NeighboringRelation, Sensitivity
from dp_flash_attention.quantum.evidence import Evidence

FALSE_ALARM: Final = 1e-9
"""Of each statistical row, over all its statistics."""


def scale_row(name: str, values: npt.NDArray[Any], stddev: float) -> Evidence:
    """Returns how the mean square of ``values`` compares with ``stddev``²; normal values fail with probability 1e-9."""
    scaled = values.astype(np.float64) / stddev
    found = float(np.mean(scaled**2))
    low, high = mean_square_bounds(scaled.size, FALSE_ALARM)
    return Evidence(
        name=name,
        claim="The noise has the standard deviation that is charged for.",
        measured=f"variance {found:.5f} of the stated one ({scaled.size} numbers)",
        bound=f"from {low:.5f} to {high:.5f} (χ², false alarm {FALSE_ALARM:g})",
        holds=low <= found <= high,
    )


def sensitivity(l2: float) -> Sensitivity:
    """Returns an add/remove sensitivity."""
    return Sensitivity(l2=l2, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)


def mean_square_bounds(num: int, false_alarm: float) -> tuple[float, float]:
    """Returns what the mean square of ``num`` standard normals leaves with that probability, half on either side.

    By the law itself, χ²: its upper tail is heavier than the normal's, several times so where alarms are this rare.
    """
    from scipy.stats import chi2

    return float(chi2.ppf(false_alarm / 2.0, num) / num), float(chi2.isf(false_alarm / 2.0, num) / num)
