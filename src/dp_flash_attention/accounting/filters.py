"""A privacy filter: adaptively chosen Gaussian releases until a budget is used up, and not one more."""

from __future__ import annotations

import os
from fractions import Fraction
from threading import Lock
from typing import NoReturn

from dp_flash_attention.accounting.gdp import gdp_epsilon, gdp_mu, root
from dp_flash_attention.accounting.near_gdp import distance_delta
from dp_flash_attention.core.errors import BudgetExhaustedError, InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.core.validation import positive_finite, positive_int


class GaussianFilter:
    """Admits μ_i-GDP releases as long as Σ μ_i² stays within μ² of an (ε, δ) budget.

    Sums are exact rationals: a budget cut into k parts by ``share`` admits k releases and refuses the next. One
    object belongs to one data set and one process; it may be used from several threads.

    Args:
        budget: (ε, δ) of everything that passes the filter together.
        neighboring_relation: The relation that every release must have been derived for.
        finite_precision_share: Share of δ, below 1, that is set apart for releases that are only *near* to a Gaussian mechanism
            (noise ``"exact"``), whose distances ``spend`` sums up; 0 admits none of these. 0.01 is plenty.

    Raises:
        InvalidInputError: If the share is out of range.

    Guarantees:
        neighbouring relation: the one given; a release for another one is refused by its caller's check.
        privacy unit: that of the releases.
        sensitivity: each release is within total variation η_i of post-processing of a Gaussian mechanism whose sensitivity
            over its noise is at most μ_i, and ``spend`` was called with both *before* it ran.
        public: the budget, and every μ_i and η_i, which may depend on earlier outputs.
        theorem: if mechanism i, its μ_i and whether there is an i-th are chosen from the outputs of those before it, and
            Σ μ_i² <= μ² always, then all outputs together are μ-GDP, hence (ε, δ)-DP. With Σ η_i <= η always, they are
            within η of that, which adds (1 + e^ε)·η to δ (docs/attention.md, Theorem 6).
        source: Smith & Thakurta 2022, "Fully Adaptive Composition for Gaussian Differential Privacy"; short
            proofs for Gaussian mechanisms, and those near to them, are in docs/attention.md.

    Example:
        >>> gate = GaussianFilter(PrivacyBudget(epsilon=1.0, delta=1e-6))
        >>> part = gate.share(4)
        >>> for _ in range(4):
        ...     gate.spend(part)
        >>> gate.admits(part)
        False
    """

    def __init__(
        self,
        budget: PrivacyBudget,
        *,
        neighboring_relation: NeighboringRelation = NeighboringRelation.REPLACE_ONE,
        finite_precision_share: float = 0.0,
    ) -> None:
        self.budget = budget
        self.neighboring_relation = neighboring_relation
        set_apart = _checked_share(finite_precision_share) * budget.delta
        self._ideal = PrivacyBudget(epsilon=budget.epsilon, delta=budget.delta - set_apart)
        self.mu = gdp_mu(self._ideal)
        self._limit = Fraction(self.mu) ** 2
        self._spent = Fraction(0)
        # (1 + e^ε)·η <= what is set apart, rounded down.
        self._distance_limit = Fraction(set_apart / distance_delta(distance=1.0, epsilon=budget.epsilon))
        self._distance_spent = Fraction(0)
        self._num_releases = 0
        self._process = os.getpid()
        self._lock = Lock()

    @property
    def num_releases(self) -> int:
        """How many releases were admitted."""
        return self._num_releases

    @property
    def mu_spent(self) -> float:
        """sqrt(Σ μ_i²) of what was admitted, rounded up."""
        return root(self._spent, up=True)

    @property
    def epsilon_spent(self) -> float:
        """ε at the budget's δ of what was admitted, as if the number of releases had been fixed beforehand.

        Of δ, all that was set apart for finite precision is counted as used.
        """
        spent = self.mu_spent
        return gdp_epsilon(mu=spent, delta=self._ideal.delta) if spent > 0.0 else 0.0

    @property
    def mu_left(self) -> float:
        """The largest μ that would still be admitted, rounded down."""
        return root(self._limit - self._spent, up=False)

    def share(self, count: int) -> float:
        """Returns the largest μ, in double precision, of which ``count`` fit into the whole budget.

        Raises:
            InvalidInputError: If ``count`` is not a whole number of at least 1.
        """
        parts = positive_int("count", count, remedy="Say how many releases are planned.")
        return root(self._limit / parts, up=False)

    def admits(self, mu: float, *, distance: float = 0.0) -> bool:
        """Returns whether ``spend(mu, distance=distance)`` would pass now."""
        price, apart = _checked_price(mu, distance)
        return self._spent + price <= self._limit and self._distance_spent + apart <= self._distance_limit

    def spend(self, mu: float, *, distance: float = 0.0) -> None:
        """Charges a release before it runs. There is no way back.

        Args:
            mu: Its μ.
            distance: Bound of the total variation to a mechanism of that μ; 0 if it is one.

        Raises:
            BudgetExhaustedError: If it does not fit, or this is a forked copy; then nothing is charged.
            InvalidInputError: If ``mu`` is not a positive finite number, or ``distance`` is negative or not finite.
        """
        price, apart = _checked_price(mu, distance)
        if os.getpid() != self._process:
            raise BudgetExhaustedError(
                f"This filter belongs to process {self._process}, but process {os.getpid()} uses a copy of it, and both would "
                "spend the same budget. Give each process a filter on its share: nothing was computed or spent."
            )
        with self._lock:
            if self._spent + price > self._limit:
                raise BudgetExhaustedError(
                    f"mu is {mu:.6g}, but the budget (epsilon={self.budget.epsilon:g}, delta={self.budget.delta:g}) "
                    f"has {self.mu_left:.6g} of {self.mu:.6g} left after {self._num_releases} releases. "
                    "Ask less of the data, with more noise, or stop: nothing was computed or spent."
                )
            if self._distance_spent + apart > self._distance_limit:
                left = float(self._distance_limit - self._distance_spent)
                raise BudgetExhaustedError(
                    f"The release is up to {distance:.3g} in total variation from a Gaussian mechanism, but {left:.3g} is left "
                    f"of what this filter sets apart of delta={self.budget.delta:g} for that. Make it with "
                    "finite_precision_share=0.01, or more: nothing was computed or spent."
                )
            self._spent += price
            self._distance_spent += apart
            self._num_releases += 1

    def __reduce__(self) -> NoReturn:
        """Refuses to be copied or pickled: two copies would spend the same budget."""
        raise TypeError("A GaussianFilter cannot be pickled or copied. Keep one for each data set.")

    def __deepcopy__(self, memo: object) -> GaussianFilter:
        """Returns the object itself, so that a copied module goes on spending with the original."""
        return self


def _checked_price(mu: object, distance: object) -> tuple[Fraction, Fraction]:
    price = Fraction(positive_finite("mu", mu, remedy="Pass the release's μ.")) ** 2
    if isinstance(distance, int | float) and not isinstance(distance, bool) and distance == 0:
        return price, Fraction(0)
    return price, Fraction(positive_finite("distance", distance, remedy="Pass the release's distance, or 0."))


def _checked_share(share: object) -> float:
    # Only a number between 0 and 1 leaves a budget on either side.
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share < 1.0:
        raise InvalidInputError(
            "finite_precision_share",
            share,
            bound="at least 0 and below 1",
            remedy="Use 0.01 with noise 'exact'.",
        )
    return float(share)
