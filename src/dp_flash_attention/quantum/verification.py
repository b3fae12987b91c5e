"""The subjects of ``dpfa verify`` and the report of a run.

Every file under ``checks`` is a subject: ``checks/tables.py`` has ``tables_checks(*, deep)``. A file without that
function is an error, not a subject less.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum import checks as _checks
from dp_flash_attention.quantum.evidence import CheckResult, NamedCheck


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """The results of a run.

    Attributes:
        results: In the order in which they ran; never empty.
        deep: Whether the long checks were among them.
    """

    results: tuple[CheckResult, ...]
    deep: bool

    @property
    def holds(self) -> bool:
        """Whether there are results and every row of every one holds."""
        return bool(self.results) and all(result.holds for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Returns the form that ``dpfa verify --json`` prints."""
        return {
            "holds": self.holds,
            "deep": self.deep,
            "seconds": sum(result.seconds for result in self.results),
            "checks": [
                {
                    "name": result.name,
                    "holds": result.holds,
                    "seconds": result.seconds,
                    "evidence": [asdict(row) for row in result.rows],
                }
                for result in self.results
            ],
        }


def subjects() -> list[str]:
    """Returns the names of all subjects, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(_checks.__path__))


def checks_of(chosen: Sequence[str] | None = None, *, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of the chosen subjects.

    Args:
        chosen: Names of subjects; None for all.
        deep: Whether to add what takes long.

    Raises:
        InvalidInputError: If a subject is unknown, or none is chosen.
    """
    known = subjects()
    wanted = known if chosen is None else list(dict.fromkeys(chosen))
    for subject in wanted or [""]:
        if subject not in known:
            raise InvalidInputError(
                "subject", subject, bound=f"one of {', '.join(known)}", remedy="Leave it out to check all."
            )
    found: list[NamedCheck] = []
    for subject in wanted:
        module = import_module(f"{_checks.__name__}.{subject}")
        make = getattr(module, f"{subject}_checks")
        found += [(f"{subject}: {name}", check) for name, check in make(deep=deep)]
    return found
