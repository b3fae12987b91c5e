"""A budget for many releases about one data set, in zero-concentrated DP, held in memory.

What survives restarts, crashes and several processes is a ledger's work; this is the same interface for one process.
"""

from __future__ import annotations

import math
import os
import threading
from typing import Protocol

from dp_flash_attention.accounting import concentrated_delta
from dp_flash_attention.core.errors import BudgetExhaustedError, InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget

MICRO = 1_000_000
# Share of δ that all terms of finite precision may take together; they are 1e-20 and less in practice.
_DISTANCE_SHARE = 0.01


class ChargeBook(Protocol):
    """Where a mechanism pays before it looks at the data."""

    def charge(self, *, rho: float, distance: float) -> None:
        """Books one release.

        Args:
            rho: Its zCDP parameter, above 0.
            distance: Total variation plus advantage between its real and its ideal noise.

        Raises:
            BudgetExhaustedError: If it does not fit. Nothing is booked then.
        """


class ConcentratedBudget:
    """An (ε, δ) for everything released about one data set, spent in millionths of ρ, each price rounded up.

    Args:
        total: What all releases together may cost.

    Guarantees:
        * Neighbouring relation, unit: those of the releases, which must all be the same. Public: every price.
        * Sensitivity: each release's own.
        * Theorem: ρ adds up, adaptively (Bun & Steinke 2016, Lemma 2.3); the sum is converted to (ε, δ) by Canonne,
          Kamath & Steinke 2020, Proposition 12; distances add up and cost (1+e^ε) times their sum.
        * Nothing is refunded, and a charge is booked before the data are looked at. A forked process cannot charge: its
          copy of the sum would be a second budget.
    """

    def __init__(self, total: PrivacyBudget) -> None:
        self.total = total
        self._limit_micro_rho = _largest_micro_rho(total)
        self._limit_distance = _DISTANCE_SHARE * total.delta / (1.0 + math.exp(min(total.epsilon, 700.0)))
        self._micro_rho = 0
        self._distance = 0.0
        self._lock = threading.Lock()
        self._process = os.getpid()

    @property
    def spent_rho(self) -> float:
        """Σρ so far."""
        return self._micro_rho / MICRO

    @property
    def limit_rho(self) -> float:
        """The largest Σρ that keeps to the total."""
        return self._limit_micro_rho / MICRO

    def charge(self, *, rho: float, distance: float) -> None:
        """Books one release, or refuses it and books nothing.

        Raises:
            BudgetExhaustedError: If Σρ or Σdistance would exceed what the total allows, or this is a forked process.
            InvalidInputError: If ``rho`` is not a finite number above 0, or ``distance`` is negative or none.
        """
        if not (math.isfinite(rho) and rho > 0.0 and math.isfinite(distance) and distance >= 0.0):
            raise InvalidInputError(
                "charge",
                (rho, distance),
                bound="rho above 0, distance at least 0",
                remedy="Check the mechanism.",
            )
        if os.getpid() != self._process:
            raise BudgetExhaustedError(
                f"This budget belongs to process {self._process}, and this is a copy of it in process {os.getpid()}: "
                "what both spend would be counted apart. Ask there, or use a ledger; nothing was computed or spent."
            )
        price = math.ceil(rho * MICRO * (1.0 + 1e-12))
        with self._lock:
            if self._distance + distance > self._limit_distance:
                raise BudgetExhaustedError(
                    f"This query's noise is {distance:.3g} away from ideal noise, but only "
                    f"{self._limit_distance - self._distance:.3g} is left of what (1+e^epsilon) times all distances may "
                    f"take of delta = {self.total.delta:g}. Use a smaller total epsilon; nothing was computed or spent."
                )
            if self._micro_rho + price > self._limit_micro_rho:
                raise BudgetExhaustedError(
                    f"This query costs rho = {price / MICRO:g}, but only "
                    f"{(self._limit_micro_rho - self._micro_rho) / MICRO:g} of {self.limit_rho:g} is left. "
                    "Ask a query that was answered before, or stop; nothing was computed or spent."
                )
            self._micro_rho += price
            self._distance += distance


def _largest_micro_rho(total: PrivacyBudget) -> int:
    delta = (1.0 - _DISTANCE_SHARE) * total.delta

    def fits(micro_rho: int) -> bool:
        return micro_rho == 0 or concentrated_delta(epsilon=total.epsilon, rho=micro_rho / MICRO) <= delta

    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
