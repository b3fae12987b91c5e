"""The public promises that the noise of an attention call is computed from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from dp_flash_attention.attention.interface import Rounding
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation
from dp_flash_attention.core.validation import positive_finite, positive_int


class Contexts(StrEnum):
    """How the entries of a batch relate.

    Attributes:
        SHARED: A record may have rows in every batch entry; all of their outputs are charged. The safe default.
        DISJOINT: A record has rows in one entry only, so an output says nothing of records of other entries
            (parallel composition).
    """

    SHARED = "shared"
    DISJOINT = "disjoint"


@dataclass(frozen=True, kw_only=True)
class AttentionBounds:
    """What holds of the rows of every context that this release might be asked about. All of it is public.

    Attributes:
        query_norm: R_q: each head's query is clipped to this L2 norm.
        key_norm: R_k: likewise keys.
        value_norm: R_v: likewise values.
        num_rows: Fewest rows that every query may see, one number or one for each batch entry; a causal query t
            sees at least min(t + 1, num_rows). A call that shows a query fewer is refused. Needed under
            replace-one; under add-or-remove-one the number of rows is private and must be left out.
        max_rows_per_record: r: most rows of one record in one batch entry. Checked where ``record_ids`` are given,
            and otherwise assumed (with r = 1: every row is a record of its own).
        null_rows: m >= 0: weight of public rows of score 0 and value 0. Needed under add-or-remove-one.
        neighboring_relation: Replace-one (a record's rows get other contents; how many rows there are, where, and
            whose they are stays) or add-or-remove-one (a record's rows become hidden or absent; under a causal mask
            hidden only, for where rows are absent all later ones move up).
        contexts: How batch entries relate.
        rounding: Which arithmetic the sensitivity is charged for, in its worst case. Only back ends that obey it
            are used; ``RUNNING_MAX`` is obeyed by all, ``FIXED_SHIFT`` costs far less noise in bfloat16. None assumes
            exact arithmetic, as most analyses do.

    Raises:
        InvalidInputError: If a number is out of range, or what the relation needs is missing.
    """

    query_norm: float
    key_norm: float
    value_norm: float
    num_rows: int | tuple[int, ...] | None = None
    max_rows_per_record: int = 1
    null_rows: float = 0.0
    neighboring_relation: NeighboringRelation = NeighboringRelation.REPLACE_ONE
    contexts: Contexts = Contexts.SHARED
    rounding: Rounding | None = Rounding.RUNNING_MAX

    def __post_init__(self) -> None:
        for name in ("query_norm", "key_norm", "value_norm"):
            positive_finite(
                name, getattr(self, name), remedy="State a finite L2 norm; longer rows are scaled down to it."
            )
        positive_int(
            "max_rows_per_record", self.max_rows_per_record, remedy="1 if every row is its own record."
        )
        if self.null_rows != 0:
            positive_finite("null_rows", self.null_rows, remedy="0 for none, or a public weight such as 100.")
        if not isinstance(self.neighboring_relation, NeighboringRelation):
            raise InvalidInputError(
                "neighboring_relation",
                self.neighboring_relation,
                bound="a NeighboringRelation",
                remedy="Use NeighboringRelation.REPLACE_ONE or ADD_OR_REMOVE_ONE.",
            )
        if not isinstance(self.contexts, Contexts):
            raise InvalidInputError(
                "contexts", self.contexts, bound="a Contexts", remedy="Use Contexts.SHARED if in doubt."
            )
        if self.rounding is not None and not isinstance(self.rounding, Rounding):
            raise InvalidInputError(
                "rounding", self.rounding, bound="a Rounding or None", remedy="Leave it at its default."
            )
        if self.neighboring_relation is NeighboringRelation.REPLACE_ONE:
            self._check_num_rows()
        else:
            self._check_hidden_number()

    def rows_of(self, entry: int) -> int:
        """Returns ``num_rows`` of one batch entry."""
        assert self.num_rows is not None
        return self.num_rows[entry] if isinstance(self.num_rows, tuple) else self.num_rows

    def _check_num_rows(self) -> None:
        if self.num_rows is None:
            raise InvalidInputError(
                "num_rows",
                None,
                bound="a public number of rows under replace-one",
                remedy="State the fewest rows that a query may see; the noise shrinks with it.",
            )
        counts = self.num_rows if isinstance(self.num_rows, tuple) else (self.num_rows,)
        if not counts:
            raise InvalidInputError("num_rows", (), bound="one number for each entry", remedy="State them.")
        for count in counts:
            positive_int("num_rows", count, remedy="State the fewest rows that a query may see.")

    def _check_hidden_number(self) -> None:
        if self.num_rows is not None:
            raise InvalidInputError(
                "num_rows",
                self.num_rows,
                bound="None under add-or-remove-one, where the number of rows is private",
                remedy="Leave it out and use null_rows, or state the guarantee for replace-one.",
            )
        if self.null_rows == 0 or not math.isfinite(self.null_rows):
            raise InvalidInputError(
                "null_rows",
                self.null_rows,
                bound="above 0 under add-or-remove-one",
                remedy="Choose about the number of rows you expect; they alone bound the effect of one record.",
            )
