"""What a check of ``dpfa verify`` returns, and how checks are run.

A row is *evidence*: a check that could have failed and did not. It is no proof. A check therefore fails, and
never passes in silence, when it raises or when it returns no row at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from dp_flash_attention.core.errors import InvalidInputError

Basis = Literal["computed", "measured"]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One claim, what was found, and whether the two agree.

    Attributes:
        name: What was looked at, short: ``"table, σ=4: total variation"``.
        claim: What is claimed, one sentence a user understands.
        measured: What was found, with its unit.
        bound: What the finding is held against, in words or figures; for a statistical test with its
            false-alarm rate.
        holds: Whether the finding lies within the bound.
        basis: ``"computed"`` if the finding follows from exact or rigorously rounded arithmetic or from a
            published test vector, ``"measured"`` if it is a sample or a clock.
    """

    name: str
    claim: str
    measured: str
    bound: str
    holds: bool
    basis: Basis = "measured"

    def __post_init__(self) -> None:
        # A comparison of NumPy's numbers gives NumPy's bool, which JSON does not know.
        object.__setattr__(self, "holds", bool(self.holds))


class Check(Protocol):
    """Looks at one thing and says what it found, as at least one row."""

    def __call__(self) -> Iterable[Evidence]:
        """Returns the rows. What it raises is shown as a row that does not hold."""


NamedCheck = tuple[str, Check]
"""The name that the progress display shows while the check runs, and the check."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """A finished check: its rows (never none) and how long it took."""

    name: str
    rows: tuple[Evidence, ...]
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every row holds."""
        return all(row.holds for row in self.rows)


def run_checks(
    checks: Sequence[NamedCheck], *, on_start: Callable[[str], None] = lambda name: None
) -> Iterator[CheckResult]:
    """Runs ``checks`` in order and yields each one's result when it is done.

    Args:
        checks: What to run; names must differ.
        on_start: Called with a check's name before it runs.

    Raises:
        InvalidInputError: If two checks have one name, or there are none.
    """
    names = [name for name, _ in checks]
    if not names or len(set(names)) != len(names):
        raise InvalidInputError(
            "checks", names, bound="at least one, with different names", remedy="Rename one of them."
        )
    for name, check in checks:
        on_start(name)
        began = time.perf_counter()
        rows = _rows(name, check)
        yield CheckResult(name=name, rows=rows, seconds=time.perf_counter() - began)


def _rows(name: str, check: Check) -> tuple[Evidence, ...]:
    rows: list[Evidence] = []
    try:
        rows.extend(check())
    # A check that breaks has shown nothing; hiding that would turn a broken verifier into a passing one.
    except Exception as error:
        rows.append(_failure(name, f"{type(error).__name__}: {error}"))
    return tuple(rows) or (_failure(name, "the check returned no evidence"),)


def _failure(name: str, found: str) -> Evidence:
    return Evidence(
        name=name,
        claim="The check runs to its end and finds something.",
        measured=" ".join(found.split()),
        bound="no error, at least one row",
        holds=False,
    )
