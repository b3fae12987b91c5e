"""``dpfa verify``: recomputes what the noise and the cryptography rest on, and shows the evidence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dp_flash_attention.quantum.evidence import NamedCheck
    from dp_flash_attention.quantum.verification import VerificationReport

FAILED = 1


def verify(
    only: Annotated[
        list[str] | None, typer.Option(help="A subject, such as tables; can be given several times.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Add what takes minutes: 10^8 samples, 10^6 timed calls.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Recompute what privacy rests on here: tables, ciphers, entropy, statistics, timing.

    What is printed is evidence and no proof: each row is a check that could have failed on this machine and did
    not. The exit code is 1 if one of them fails. Without --deep it takes less than a minute.

    Example: dpfa verify --only tables --only ciphers
    """
    from dp_flash_attention.quantum.verification import VerificationReport, checks_of

    checks = checks_of(only, deep=deep)
    report = _run_quietly(checks, deep=deep) if as_json else _run_with_progress(checks, deep=deep)
    assert isinstance(report, VerificationReport)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        _print_table(report)
    if not report.holds:
        raise typer.Exit(FAILED)


def _run_quietly(checks: Sequence[NamedCheck], *, deep: bool) -> VerificationReport:
    from dp_flash_attention.quantum.evidence import run_checks
    from dp_flash_attention.quantum.verification import VerificationReport

    return VerificationReport(results=tuple(run_checks(checks)), deep=deep)


def _run_with_progress(checks: Sequence[NamedCheck], *, deep: bool) -> VerificationReport:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from dp_flash_attention.quantum.evidence import run_checks
    from dp_flash_attention.quantum.verification import VerificationReport

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=len(checks))
        for result in run_checks(checks, on_start=lambda name: progress.update(task, description=name)):
            results.append(result)
            progress.advance(task)
    return VerificationReport(results=tuple(results), deep=deep)


def _print_table(report: VerificationReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("", "what", "found", "bound", "basis", box=box.SIMPLE_HEAD, show_edge=False)
    for result in report.results:
        for row in result.rows:
            mark = "[green]ok[/green]" if row.holds else "[bold red]FAILS[/bold red]"
            table.add_row(mark, row.name, row.measured, row.bound, row.basis)
    console = Console()
    console.print(table)
    rows = [row for result in report.results for row in result.rows]
    for row in rows:
        if not row.holds:
            console.print(f"[bold red]FAILS[/bold red] {row.name}: {row.claim} Found: {row.measured}.")
    seconds = sum(result.seconds for result in report.results)
    good = sum(row.holds for row in rows)
    console.print(
        f"\n{good} of {len(rows)} rows hold, {seconds:.1f} s. This is evidence, not proof: checks that"
    )
    console.print("could have failed on this machine and did not.")
