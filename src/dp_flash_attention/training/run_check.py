"""Checking a run's directory against its certificate: the numbers again, and whether the files belong to it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_flash_attention.core.errors import DPFlashAttentionError
from dp_flash_attention.core.private_files import read_private_file
from dp_flash_attention.crypto.certificates import content_digest, read_certificate
from dp_flash_attention.crypto.documents import parse
from dp_flash_attention.crypto.shared_files import check_name, fingerprint, is_plain_file
from dp_flash_attention.training.certificate import EvaluationStatement
from dp_flash_attention.training.certificate_reading import Statement, read_statement
from dp_flash_attention.training.certificate_rows import Row, Standing, differences
from dp_flash_attention.training.evaluation import read_evaluation
from dp_flash_attention.training.recomputation import recompute
from dp_flash_attention.training.run_directory import RECORD_FILE

EVALUATION_FILE = "evaluation.json"
REPORT_FILE = "report.html"
_MAX_BYTES = 64 << 20
_DIGEST = re.compile(rb'<meta name="certificate-sha256" content="([0-9a-f]{64})">')
# Whatever stands in a file that somebody else wrote.
_UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, DPFlashAttentionError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunCheck:
    """What came out of checking a run.

    Attributes:
        certificate: The certificate, as JSON values.
        rows: A row for each thing that was computed again or compared.
    """

    certificate: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def holds(self) -> bool:
        """Whether all rows hold."""
        return all(row.holds for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns claim, rows, assumptions and estimates as JSON values."""
        return {
            "holds": self.holds,
            "claim": self.certificate["claim"],
            "rows": [
                {
                    "name": row.name,
                    "standing": row.standing.value,
                    "stated": row.stated,
                    "recomputed": row.recomputed,
                    "holds": row.holds,
                    "remark": row.remark,
                }
                for row in self.rows
            ],
            "assumed": list(self.certificate["assumed"]),
            "estimated": dict(self.certificate["estimated"]),
        }


def check_run(
    directory: Path, *, certificate: Mapping[str, Any] | None = None, certificate_only: bool = False
) -> RunCheck:
    """Computes a certificate's numbers again, and compares the files beside it with what it says of them.

    Who wrote certificate and files is another question, and a signature's answer (``crypto.verify_certificate``).

    Args:
        directory: Of a finished run, or of what somebody passed on of it.
        certificate: The certificate, where it was read already, as by ``crypto.verify_certificate``; None reads it.
        certificate_only: Whether to leave the files aside, for one who has only the certificate.

    Raises:
        InvalidInputError: If there is no certificate of this format there, or a number in it is out of bounds.
    """
    content = read_certificate(directory) if certificate is None else certificate
    rows = list(recompute(content))
    if not certificate_only:
        rows += _files(directory, read_statement(content))
    return RunCheck(certificate=content, rows=tuple(rows))


def _files(directory: Path, statement: Statement) -> Iterator[Row]:
    listed: Mapping[str, Any] = statement.content["files"]
    for name, expected in listed.items():
        yield _same_bytes(directory, name, expected)
    if statement.evaluation is not None:
        yield _figures(directory, statement)
    if (directory / RECORD_FILE).exists():
        yield _record(directory, statement)
    if (directory / REPORT_FILE).exists():
        yield _report(directory, statement)


def _same_bytes(directory: Path, name: str, expected: Mapping[str, Any]) -> Row:
    found, holds = "not there", False
    try:
        check_name(name)
        if is_plain_file(directory, name):
            there = fingerprint(directory / name)
            found, holds = _described(there), there == expected
    except (OSError, DPFlashAttentionError) as error:
        found = f"not read ({error})"
    remark = "SHA-256 and size" if holds else "altered, missing, or of another run"
    return _row(name, _described(expected), found, holds, remark)


def _described(entry: Mapping[str, Any]) -> str:
    return f"{entry['sha256'][:10]}…, {entry['size']:,} bytes"


def _figures(directory: Path, statement: Statement) -> Row:
    """The figures of the evaluation follow from what was released."""
    assert statement.evaluation is not None, "asked for where there is one"
    stated = statement.evaluation
    try:
        released = read_evaluation(parse(_read(directory / EVALUATION_FILE)))
        different = list(differences(_values(stated), _values(EvaluationStatement.of(released)), ""))
        found, remark = "the same" if not different else "others", ", ".join(different)
    except _UNREADABLE as error:
        found, remark = "not read", f"{type(error).__name__}: {error}"
    return Row(
        name="figures of the hold-out",
        stated=", ".join(f"{name} {value:.6g}" for name, value in stated.estimates.items()),
        recomputed=found,
        holds=found == "the same",
        standing=Standing.ESTIMATED,
        remark=remark
        or f"computed again from {EVALUATION_FILE}; the hold-out's sampling error is not in them",
    )


def _values(statement: EvaluationStatement) -> dict[str, Any]:
    return {**statement.to_dict(), "estimates": dict(statement.estimates)}


def _record(directory: Path, statement: Statement) -> Row:
    try:
        record = parse(_read(directory / RECORD_FILE))
        stated = next(e for e in statement.content["mechanisms"] if e["name"] == "training")["parameters"]
        different = list(differences(stated, record["facts"]["plan"], "plan"))
        if record["status"] != "finished":
            different.append("status")
        found = "the same plan" if not different else f"differs: {', '.join(different)}"
    except _UNREADABLE as error:
        found = f"not read ({type(error).__name__}: {error})"
    return _row(RECORD_FILE, "the plan above", found, found == "the same plan", "the run's own record")


def _report(directory: Path, statement: Statement) -> Row:
    digest = content_digest(statement.content)
    try:
        page = _read(directory / REPORT_FILE)
        named = _DIGEST.findall(page)
        claim = html.escape(str(statement.content["claim"]["statement"]), quote=False)
        found = ", ".join(f"page names {one.decode()[:10]}…" for one in named) or "page names none"
        holds = named == [digest.encode()] and claim.encode() in page
    except OSError as error:
        found, holds = f"not read ({error.strerror})", False
    remark = "names this certificate and shows its claim; who wrote the page only a signature shows"
    return _row(
        REPORT_FILE,
        f"certificate {digest[:10]}…",
        found,
        holds,
        remark if holds else "a page of another certificate",
    )


def _read(path: Path) -> bytes:
    data = read_private_file(path, max_bytes=_MAX_BYTES, follow_links=False).content
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB")
    return data


def _row(name: str, stated: str, found: str, holds: bool, remark: str) -> Row:
    return Row(name=name, stated=stated, recomputed=found, holds=holds, standing=Standing.FILE, remark=remark)
