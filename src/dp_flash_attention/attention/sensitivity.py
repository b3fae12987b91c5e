"""How far one record moves an attention output. The proofs are in docs/attention.md, under the same names.

One query sees rows with scores in [−S, S] and values of norm at most R, and m null rows of score 0 and value 0:
``o = Σ e^{s_i} v_i / (m + Σ e^{s_i})``. One record owns at most r of the rows; the others are "the rest".

Relations:
    replace-one       the record's rows get other keys and values; at least ``rest`` rows are not its own.
    add-or-remove-one the record's rows disappear; nothing is known of how many rows there are.

Everything here is plain arithmetic on public numbers, in double precision, and never smaller than the
formula's value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dp_flash_attention.attention.interface import Rounding
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import non_negative_int, positive_finite, positive_int

# Each formula below takes a dozen operations and two exponentials of arguments up to 2·MAX_SCORE_BOUND, whose
# rounding is at most 2·MAX_SCORE_BOUND units in the last place.
_UPWARD = 1.0 + 1e-12
MAX_SCORE_BOUND = 40.0
"""Beyond this the weight of a row spans e^80 and float32 kernels lose rows; no sensitivity would be useful."""

_FEWEST_BLOCK_ROWS = 64
"""Fewest rows that a flash kernel takes before it looks for a new running maximum."""

_SMALLEST_NORM = 2.0**-40
"""Below about 2^-60 squares and factors leave float32's normal range, and a row ten times too long has norm 0."""

_HIGHER_ORDER = 1.0 + 2.0**-6
"""Covers products of the errors below, each of which is under 2^-7."""


def score_bound(*, query_norm: float, key_norm: float, scale: float) -> float:
    """Returns S = scale·R_q·R_k, which no score exceeds in magnitude (Cauchy & Schwarz).

    Raises:
        InvalidInputError: If a number is not positive and finite, or S is above ``MAX_SCORE_BOUND``.
    """
    norms = {"query_norm": query_norm, "key_norm": key_norm, "scale": scale}
    factors = [positive_finite(name, value, remedy="Bound the rows.") for name, value in norms.items()]
    bound = math.prod(factors) * _UPWARD
    if not 0.0 < bound <= MAX_SCORE_BOUND:
        raise InvalidInputError(
            "scale * query_norm * key_norm",
            bound,
            bound=f"at most {MAX_SCORE_BOUND:g} (and above 0)",
            remedy="Use a smaller scale or smaller norms; the noise grows like e^(2S)/n.",
        )
    return bound


def replace_one_sensitivity(
    *, value_norm: float, score_bound: float, rest: int, record_rows: int = 1, null_rows: float = 0.0
) -> float:
    """Returns Δ for one query under replace-one.

    Args:
        value_norm: R.
        score_bound: S.
        rest: Fewest visible rows that are not the record's.
        record_rows: r, the most visible rows that are the record's. 0 gives 0.
        null_rows: m.

    Raises:
        InvalidInputError: If a number is out of range.

    Guarantees:
        ``Δ = 2R / (1 + (rest·e^{−2S} + m·e^{−S})/r)``; with r = 1, m = 0 and n = rest + 1 rows this is
        ``2R / (1 + (n−1)·e^{−2S})``. Attained, by values ±R·u against a rest at −R·u. Theorem 1.

    Example:
        >>> round(replace_one_sensitivity(value_norm=1.0, score_bound=0.5, rest=999), 6)
        0.005427
    """
    radius, s = _checked(value_norm, score_bound)
    others = non_negative_int("rest", rest, remedy="Count the rows of all other records.")
    own = non_negative_int("record_rows", record_rows, remedy="A record owns at least one row.")
    mass = _null_mass(null_rows)
    return float(replace_one_curve(radius, s, np.array([others]), np.array([own]), mass)[0])


def replace_one_curve(
    value_norm: float,
    score_bound: float,
    rest: npt.NDArray[np.int64],
    record_rows: npt.NDArray[np.int64],
    null_rows: float,
) -> npt.NDArray[np.float64]:
    """Returns ``replace_one_sensitivity`` for many queries at once; its arguments are not checked."""
    floor = rest * math.exp(-2.0 * score_bound) + null_rows * math.exp(-score_bound)
    own = np.maximum(record_rows, 1)
    curve: npt.NDArray[np.float64] = 2.0 * value_norm * own / (own + floor / _UPWARD) * _UPWARD
    return np.where(record_rows > 0, curve, 0.0)


def add_or_remove_sensitivity(
    *,
    value_norm: float,
    score_bound: float,
    null_rows: float,
    record_rows: int = 1,
    max_rest: int | None = None,
) -> float:
    """Returns Δ for one query under add-or-remove-one, whatever the number of rows.

    Args:
        value_norm: R.
        score_bound: S.
        null_rows: m > 0.
        record_rows: r, the most visible rows that are the record's. 0 gives 0.
        max_rest: Most rows besides the record's that there is room for; None if that is not known.

    Raises:
        InvalidInputError: If a number is out of range.

    Guarantees:
        ``Δ = R · max over A of  x(2A + m) / ((x + A + m)(A + m))`` with x = r·e^S and A, the rest's
        mass, over {0} and the intervals [c·e^{−S}, c·e^{S}], c = 1 … max_rest. Its free maximum, at
        ``A* = (q − m)/2`` with ``q = sqrt(m² + 2mx)``, is ``2R·(q − m)/(q + m)``; about R·x/m for large m.
        The bound is attained. Theorem 2.

    Example:
        >>> round(add_or_remove_sensitivity(value_norm=1.0, score_bound=0.5, null_rows=1000.0), 6)
        0.001646
    """
    radius, s = _checked(value_norm, score_bound)
    mass = positive_finite(
        "null_rows", null_rows, remedy="Add/remove hides the number of rows; only null rows bound its effect."
    )
    own = non_negative_int("record_rows", record_rows, remedy="A record owns at least one row.")
    room = None if max_rest is None else non_negative_int("max_rest", max_rest, remedy="Count the slots.")
    if own == 0:
        return 0.0
    x = own * math.exp(s)

    def change(rest_mass: float) -> float:
        return x * (2.0 * rest_mass + mass) / ((x + rest_mass + mass) * (rest_mass + mass))

    return radius * max(change(a) for a in _candidate_masses(x, mass, s, room)) * _UPWARD


def _candidate_masses(x: float, mass: float, s: float, room: int | None) -> list[float]:
    """Returns masses of the rest among which the worst one is: ``change`` rises up to A* and falls after it."""
    # q − m loses digits for m ≫ x; this form does not.
    best = mass * x / (math.sqrt(mass * mass + 2.0 * mass * x) + mass)
    count = math.ceil(best * math.exp(-s))  # fewest rows that can weigh as much as A*
    if room is not None and count > room:
        return [room * math.exp(s)]
    if count * math.exp(-s) <= best:
        return [best]
    # A* falls between what count − 1 rows can weigh at most and what count rows weigh at least.
    return [(count - 1) * math.exp(s), count * math.exp(-s)]


def clip_threshold(norm: float, dtype: torch.dtype, width: int) -> float:
    """Returns what rows are scaled down to, so that they obey ``norm`` as the kernel reads them.

    A row x of ``width`` numbers becomes ``x·min(1, threshold/‖x‖)``, rounded to ``dtype``, with norm and factor in
    float32 (float64 for float64 rows).

    Raises:
        InvalidInputError: If ``norm`` is not positive and finite, or too small for the dtype's resolution.

    Guarantees:
        The rounded row has norm at most ``norm``, in exact arithmetic: the computed norm is at most a share η below
        the true one, factor and product are each rounded once, and the cast multiplies every number by at
        most 1 + u or, below the normal range, adds at most half a subnormal step. Theorem 4.
    """
    bound = positive_finite("norm", norm, remedy="State the largest norm of a row.")
    count = positive_int("width", width, remedy="Rows have at least one number.")
    working = unit_roundoff(torch.float64 if dtype is torch.float64 else torch.float32)
    # (width + 1) roundings in the sum of squares, halved by the root; 16 more cover the root, the
    # quotient, the product and an approximate reciprocal root of a GPU.
    relative = (1.0 + (count + 16) * working) * (1.0 + unit_roundoff(dtype))
    absolute = math.sqrt(count) * 0.5 * subnormal_step(dtype)
    threshold = (bound - absolute) / relative / _UPWARD
    if threshold < _SMALLEST_NORM:
        raise InvalidInputError(
            "norm",
            norm,
            bound=f"well above {max(absolute, _SMALLEST_NORM):.3g} for {dtype}",
            remedy="Rescale the rows.",
        )
    return threshold


@dataclass(frozen=True, kw_only=True)
class RoundingSlack:
    """What a kernel's rounding may add to the sensitivity of one output row.

    Attributes:
        score: To be added to S.
        output: Share of R to be added to Δ.
    """

    score: float
    output: float


def rounding_slack(
    *,
    rounding: Rounding,
    dtype: torch.dtype,
    width: int,
    num_rows: int,
    num_passes: int,
    score_bound: float,
) -> RoundingSlack:
    """Returns the worst case, over all data, of the error model of Theorem 5.

    Args:
        rounding: Which model the kernel obeys.
        dtype: Compute dtype: what rows, weights and (under ``RUNNING_MAX``) outputs are rounded to.
        width: Numbers of a query.
        num_rows: Most rows that one pass of the kernel runs over.
        num_passes: Most passes that are merged.
        score_bound: S.

    Guarantees:
        If kernel outputs differ from an exact softmax over scores in [−S′, S′] by at most e·R in norm,
        neighbours differ by at most Δ(S′) + 2e·R. That a kernel obeys the model is *assumed*; tests
        measure its error against float64.
    """
    own = unit_roundoff(dtype)
    working = unit_roundoff(torch.float64 if dtype is torch.float64 else torch.float32)
    rows = non_negative_int("num_rows", num_rows, remedy="Count the rows.")
    passes = non_negative_int("num_passes", num_passes, remedy="Count the passes.")
    # A matrix product may add a block's rows one by one to the sum of the blocks before: equal rows whose every
    # addition rounds the same way lose a quarter of this, measured. Then passes are merged.
    sums = (8 + 2 * passes + rows) * working
    # The error of a score is a relative error of its weight; CPU kernels take a 20-bit exponential. The last
    # term is the rounding of a pass's log-sum-exp, which is below S + ln(rows) < 64 in magnitude.
    weight = (
        (width + 4) * working * score_bound + (2.0**-20 if working > 2.0**-30 else 2.0**-48) + 64.0 * working
    )
    if rounding is Rounding.FIXED_SHIFT:
        # A row's weight is off by a factor of that row alone, the same in both neighbours.
        return RoundingSlack(score=(weight + own) * _UPWARD, output=2.0 * (2.0 * sums) * _HIGHER_ORDER)
    # Sums are rescaled whenever the running maximum grows: at most once a block, by a factor within four
    # units that numerator and denominator share, and a rounding of each product.
    weight += 4.0 * -(-rows // _FEWEST_BLOCK_ROWS) * working
    error = 2.0 * (weight + sums)
    if dtype is torch.float64:
        error += unit_roundoff(torch.float32)  # the output is float32 before the noise is in
    if own > working:
        # The rounded weight enters the numerator alone, and the output is rounded too.
        error += 2.0 * own + 0.5 * subnormal_step(dtype) * min(rows, math.exp(2.0 * score_bound))
    return RoundingSlack(score=0.0, output=2.0 * error * _HIGHER_ORDER)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Returns u: rounding to ``dtype`` multiplies a number of its normal range by at most 1 + u."""
    return float(torch.finfo(dtype).eps) / 2.0


def subnormal_step(dtype: torch.dtype) -> float:
    """Returns the distance of numbers below the normal range, the most that flushing or rounding them changes."""
    info = torch.finfo(dtype)
    return float(info.smallest_normal) * float(info.eps)


def _checked(value_norm: float, score_bound: float) -> tuple[float, float]:
    radius = positive_finite("value_norm", value_norm, remedy="State the largest norm of a value row.")
    s = positive_finite("score_bound", score_bound, remedy="Use score_bound().")
    if s > MAX_SCORE_BOUND * _UPWARD:
        raise InvalidInputError(
            "score_bound", s, bound=f"at most {MAX_SCORE_BOUND:g}", remedy="Use a smaller scale or norms."
        )
    return radius, s


def _null_mass(null_rows: float) -> float:
    if null_rows == 0:
        return 0.0
    return positive_finite("null_rows", null_rows, remedy="Use 0 for none.")
