"""A budget for many releases about one data set, in zero-concentrated DP: what every book does, and one in memory.

The book that survives restarts and crashes and serves several processes is ``durable_charges``.
"""

from __future__ import annotations

import hmac
import math
import os
import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from dp_flash_attention.accounting import concentrated_delta
from dp_flash_attention.core.errors import BudgetExhaustedError, InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget

MICRO = 1_000_000
DISTANCE_UNITS = 2**61
"""All distances together may take so many units; two of them fit 64 bits."""
# Share of δ that all terms of finite precision may take together; they are 1e-20 and less in practice.
_DISTANCE_SHARE = 0.01


class ChargeBook(Protocol):
    """Where a mechanism pays before it looks at the data, and says what it is about to publish before it does."""

    @property
    def assumption(self) -> str:
        """What has to be true for the book to hold everything that was spent; certificates print it."""

    def charge(
        self,
        *,
        rho: float,
        distance: float,
        query: bytes | None = None,
        relation: NeighboringRelation | None = None,
    ) -> None:
        """Books one release; one that was booked before costs nothing.

        Args:
            rho: Its zCDP parameter, above 0.
            distance: Total variation plus advantage between its real and its ideal noise.
            query: Digest of everything that has to be the same for the answer to be the same (query, plan, data version,
                epoch), by a secret key. None for a release that is never repeated.
            relation: Neighbouring relation of the price; None if the caller keeps to one.

        Raises:
            BudgetExhaustedError: If it does not fit. Nothing is booked then.
            InvalidInputError: If the relation is another than that of the prices before. Nothing is booked then.
        """

    def bind(self, *, query: bytes, answer: bytes) -> bool:
        """Records, before publication, what a booked query is answered with: one query has one answer.

        Args:
            query: As it was charged.
            answer: Keyed digest of what is about to be published.

        Returns:
            Whether ``answer`` may be published: it is the first one, or the same as the first one. If not, it would be a
            second release that nobody paid for.

        Raises:
            InvalidInputError: If ``query`` was never charged.
        """


@dataclass(frozen=True, kw_only=True)
class Price:
    """What one release takes, in whole numbers, rounded up and never above one more than the limit.

    Attributes:
        micro_rho: Millionths of ρ, at least 1.
        distance: Units of the limit of all distances.
    """

    micro_rho: int
    distance: int


class Prices:
    """The limits that an (ε, δ) sets to Σρ and Σdistance, and prices against them.

    Args:
        total: What all releases together may cost.
    """

    def __init__(self, total: PrivacyBudget) -> None:
        self.total = total
        self.limit_micro_rho = _largest_micro_rho(total)
        share = _DISTANCE_SHARE * total.delta / (1.0 + math.exp(min(total.epsilon, 700.0)))
        self._unit = Fraction(share * (1.0 - 1e-12)) / DISTANCE_UNITS

    def price(self, *, rho: float, distance: float) -> Price:
        """Returns the price.

        Raises:
            InvalidInputError: If ``rho`` is not a finite number above 0, or ``distance`` is negative or none.
        """
        if not (math.isfinite(rho) and rho > 0.0 and math.isfinite(distance) and distance >= 0.0):
            raise InvalidInputError(
                "charge",
                (rho, distance),
                bound="rho above 0, distance at least 0",
                remedy="Check the mechanism.",
            )
        micro_rho = math.ceil(Fraction(rho) * MICRO)
        units = math.ceil(Fraction(distance) / self._unit)
        return Price(
            micro_rho=min(micro_rho, self.limit_micro_rho + 1), distance=min(units, DISTANCE_UNITS + 1)
        )

    def refusal(
        self, price: Price, *, spent_micro_rho: int, spent_distance: int
    ) -> BudgetExhaustedError | None:
        """Returns the error if ``price`` does not fit what is left, None if it does."""
        if spent_distance + price.distance > DISTANCE_UNITS:
            return BudgetExhaustedError(
                f"This query's noise is {float(price.distance * self._unit):.3g} away from ideal noise, but only "
                f"{float((DISTANCE_UNITS - spent_distance) * self._unit):.3g} is left of what (1+e^epsilon) times all "
                f"distances may take of delta = {self.total.delta:g}. Use a smaller total epsilon; nothing was computed or "
                "spent."
            )
        if spent_micro_rho + price.micro_rho > self.limit_micro_rho:
            return BudgetExhaustedError(
                f"This query costs rho = {price.micro_rho / MICRO:g}, but only "
                f"{(self.limit_micro_rho - spent_micro_rho) / MICRO:g} of {self.limit_micro_rho / MICRO:g} is left. "
                "Ask a query that was answered before, or stop; nothing was computed or spent."
            )
        return None


def checked_relation(relation: NeighboringRelation | None, before: str | None) -> str | None:
    """Returns the name of the relation of all prices so far, with ``relation`` among them.

    Raises:
        InvalidInputError: If they are two: prices under two relations do not add up to a guarantee under either.
    """
    if relation is None or before == relation.value:
        return before
    if before is None:
        return relation.value
    raise InvalidInputError(
        "neighboring_relation",
        relation.value,
        bound=f"that of the answers before, {before}",
        remedy="Derive every sensitivity for one relation.",
    )


class ConcentratedBudget:
    """An (ε, δ) for everything released about one data set, spent in millionths of ρ, each price rounded up.

    It is held in memory and ends with the process: the next one would have the whole budget again. See
    ``DurableChargeBook``.

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

    assumption = "The charge book is held in memory: no other process answers queries about these data, and none did before."

    def __init__(self, total: PrivacyBudget) -> None:
        self.total = total
        self._prices = Prices(total)
        self._micro_rho = 0
        self._distance = 0
        self._relation: str | None = None
        self._paid: dict[bytes, bytes | None] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()

    @property
    def spent_rho(self) -> float:
        """Σρ so far."""
        return self._micro_rho / MICRO

    @property
    def limit_rho(self) -> float:
        """The largest Σρ that keeps to the total."""
        return self._prices.limit_micro_rho / MICRO

    def charge(
        self,
        *,
        rho: float,
        distance: float,
        query: bytes | None = None,
        relation: NeighboringRelation | None = None,
    ) -> None:
        """Books one release, or refuses it and books nothing; a query that was booked before costs nothing.

        Raises:
            BudgetExhaustedError: If Σρ or Σdistance would exceed what the total allows, or this is a forked process.
            InvalidInputError: If ``rho`` is not a finite number above 0, ``distance`` is negative or none, or the relation
                is another than before.
        """
        price = self._prices.price(rho=rho, distance=distance)
        with self._lock:
            if query is not None and query in self._paid:
                return
            self._check_process()
            known = checked_relation(relation, self._relation)
            refused = self._prices.refusal(
                price, spent_micro_rho=self._micro_rho, spent_distance=self._distance
            )
            if refused is not None:
                raise refused
            self._relation = known
            self._micro_rho += price.micro_rho
            self._distance += price.distance
            if query is not None:
                self._paid[query] = None

    def bind(self, *, query: bytes, answer: bytes) -> bool:
        """Records what a booked query is answered with; see ``ChargeBook``.

        Raises:
            BudgetExhaustedError: If this is a forked process and the query has no answer yet: the two could differ.
            InvalidInputError: If ``query`` was never charged.
        """
        with self._lock:
            if query not in self._paid:
                raise never_charged()
            before = self._paid[query]
            if before is None:
                self._check_process()
                self._paid[query] = answer
                return True
            return hmac.compare_digest(before, answer)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise BudgetExhaustedError(
                f"This budget belongs to process {self._process}, and this is a copy of it in process {os.getpid()}: "
                "what both spend would be counted apart. Use a DurableChargeBook; nothing was released or spent."
            )


def never_charged() -> InvalidInputError:
    """Returns the error for an answer to what nobody paid for."""
    return InvalidInputError(
        "query", "not shown", bound="charged before it is bound", remedy="Call charge first."
    )


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
