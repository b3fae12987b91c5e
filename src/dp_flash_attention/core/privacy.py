"""The privacy types that every other room speaks in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dp_flash_attention.core.validation import open_unit, positive_finite


class NeighboringRelation(StrEnum):
    """Which pairs of data sets a guarantee compares."""

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    REPLACE_ONE = "replace_one"


class PrivacyUnit(StrEnum):
    """What one neighbouring step adds, removes or replaces."""

    EXAMPLE = "example"
    USER = "user"


@dataclass(frozen=True, kw_only=True)
class PrivacyBudget:
    """An (ε, δ) bound, both unitless.

    Raises:
        InvalidInputError: If ε is not a finite positive number or δ is not in (0, 1).
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        epsilon = positive_finite("epsilon", self.epsilon, remedy="Common values lie between 0.1 and 10.")
        delta = open_unit(
            "delta", self.delta, remedy="Choose well below 1 / (number of records), such as 1e-6."
        )
        # A float32 would carry its own rounding into every bound that is computed from it.
        object.__setattr__(self, "epsilon", epsilon)
        object.__setattr__(self, "delta", delta)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How far a bounded quantity can move in L2 norm between neighbours.

    Attributes:
        l2: Largest L2 distance between the quantity on two neighbouring data sets, in the
            quantity's own unit.
        neighboring_relation: The relation that the bound holds for.
    """

    l2: float
    neighboring_relation: NeighboringRelation

    def __post_init__(self) -> None:
        l2 = positive_finite(
            "l2 sensitivity", self.l2, remedy="Bound the quantity first, for example by clipping."
        )
        object.__setattr__(self, "l2", l2)  # see PrivacyBudget


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """The five statements that every mechanism makes about itself."""

    neighboring_relation: NeighboringRelation
    privacy_unit: PrivacyUnit
    sensitivity: str
    public: tuple[str, ...]
    theorem: str
    source: str
