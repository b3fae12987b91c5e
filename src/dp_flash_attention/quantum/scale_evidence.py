"""Evidence that noise has the scale that is charged for."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.privacy import NeighboringRelation, Sensitivity
from dp_flash_attention.quantum.evidence import Evidence

FALSE_ALARM: Final = 1e-9
"""Of each statistical row, over all its statistics."""


def scale_row(name: str, values: npt.NDArray[Any], stddev: float) -> Evidence:
    """Returns the standard score of the mean square of ``values`` against ``stddev``²."""
    scaled = values.astype(np.float64) / stddev
    score = float((np.mean(scaled**2) - 1.0) / math.sqrt(2.0 / scaled.size))
    bound = two_sided(FALSE_ALARM)
    return Evidence(
        name=name,
        claim="The noise has the standard deviation that is charged for.",
        measured=f"variance {np.mean(scaled**2):.5f} of the stated one, standard score {score:+.2f} ({scaled.size} numbers)",
        bound=f"within ±{bound:.2f} (false alarm {FALSE_ALARM:g})",
        holds=abs(score) <= bound,
    )


def sensitivity(l2: float) -> Sensitivity:
    """Returns an add/remove sensitivity."""
    return Sensitivity(l2=l2, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)


def two_sided(false_alarm: float) -> float:
    """Returns how many standard deviations a normal exceeds with that probability, on either side."""
    from scipy.special import ndtri

    return float(-ndtri(false_alarm / 2.0))


def mean_square_bounds(num: int, false_alarm: float) -> tuple[float, float]:
    """Returns what the mean square of ``num`` standard normals leaves with that probability, half on either side.

    By the law itself, χ²: its upper tail is heavier than the normal's, several times so where alarms are this rare.
    """
    from scipy.stats import chi2

    return float(chi2.ppf(false_alarm / 2.0, num) / num), float(chi2.isf(false_alarm / 2.0, num) / num)
