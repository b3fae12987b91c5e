"""A privacy filter: adaptively chosen Gaussian releases until a budget is used up, and not one more."""

from __future__ import annotations

import os
from fractions import Fraction
from threading import Lock
from typing import NoReturn

from dp_flash_attention.accounting.gdp import gdp_epsilon, gdp_mu, root
from dp_flash_attention.core.errors import BudgetExhaustedError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.core.validation import positive_finite, positive_int


class GaussianFilter:
    """Admits μ_i-GDP releases as long as Σ μ_i² stays within μ² of an (ε, δ) budget.

    Sums are exact rationals: a budget cut into k parts by ``share`` admits k releases and refuses the next. One
    object belongs to one data set and one process; it may be used from several threads.

    Args:
        budget: (ε, δ) of everything that passes the filter together.
        neighboring_relation: The relation that every release must have been derived for.

    Guarantees:
        neighbouring relation: the one given; a release for another one is refused by its caller's check.
        privacy unit: that of the releases.
        sensitivity: each release is a Gaussian mechanism whose sensitivity over its noise is at most the μ_i that
            ``spend`` was called with *before* it ran.
        public: the budget, and every μ_i, which may depend on earlier outputs.
        theorem: if mechanism i, its μ_i and whether there is an i-th are chosen from the outputs of those before it, and
            Σ μ_i² <= μ² always, then all outputs together are μ-GDP, hence (ε, δ)-DP.
        source: Smith & Thakurta 2022, "Fully Adaptive Composition for Gaussian Differential Privacy"; a short
            proof for Gaussian mechanisms is in docs/attention.md.

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
    ) -> None:
        self.budget = budget
        self.neighboring_relation = neighboring_relation
        self.mu = gdp_mu(budget)
        self._limit = Fraction(self.mu) ** 2
        self._spent = Fraction(0)
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
        """ε at the budget's δ of what was admitted, as if the number of releases had been fixed beforehand."""
        spent = self.mu_spent
        return gdp_epsilon(mu=spent, delta=self.budget.delta) if spent > 0.0 else 0.0

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

    def admits(self, mu: float) -> bool:
        """Returns whether ``spend(mu)`` would pass now."""
        return (
            self._spent + Fraction(positive_finite("mu", mu, remedy="Pass the release's μ.")) ** 2
            <= self._limit
        )

    def spend(self, mu: float) -> None:
        """Charges a release of ``mu`` before it runs. There is no way back.

        Raises:
            BudgetExhaustedError: If it does not fit, or this is a forked copy; then nothing is charged.
            InvalidInputError: If ``mu`` is not a positive finite number.
        """
        price = Fraction(positive_finite("mu", mu, remedy="Pass the release's μ.")) ** 2
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
            self._spent += price
            self._num_releases += 1

    def __reduce__(self) -> NoReturn:
        """Refuses to be copied or pickled: two copies would spend the same budget."""
        raise TypeError("A GaussianFilter cannot be pickled or copied. Keep one for each data set.")

    def __deepcopy__(self, memo: object) -> GaussianFilter:
        """Returns the object itself, so that a copied module goes on spending with the original."""
        return self
