"""``dpfa certificate check`` and ``verify``: does the claim follow, are these the files, and who says so?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dp_flash_attention.crypto import VerifiedCertificate
    from dp_flash_attention.training.run_check import RunCheck

FAILED = 1

_CertificateOnly = Annotated[
    bool, typer.Option("--certificate-only", help="Leave the files beside it aside.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def check(
    directory: Annotated[Path, typer.Argument(help="Directory of a run, signed or not.")],
    certificate_only: _CertificateOnly = False,
    as_json: _AsJson = False,
) -> None:
    """Compute everything again that follows from a certificate's numbers, and compare the files beside it.

    Needs no key and no data. It shows whether the claim follows from what the certificate lists; that this is what ran is
    the word of whoever ran it, and who that was is told by dpfa certificate verify. Exit code 1 if a row is wrong, 2 if
    there is no certificate that could be read.

    Example: dpfa certificate check runs/flights-1
    """
    from dp_flash_attention.training.run_check import check_run

    found = check_run(directory, certificate_only=certificate_only)
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), "signature": "not looked at"}, ensure_ascii=False))
    else:
        _print_check(found)
        typer.echo("Signature: not looked at. Who vouches for it is told by: dpfa certificate verify")
    if not found.holds:
        raise typer.Exit(FAILED)


def verify(
    directory: Annotated[Path, typer.Argument(help="Directory with certificate, signature and files.")],
    key: Annotated[Path | None, typer.Option("--key", help="Public key file of the expected signer.")] = None,
    trust_file: Annotated[Path | None, typer.Option("--trust", help="Trust file, instead of --key.")] = None,
    certificate_only: _CertificateOnly = False,
    public_extra: Annotated[
        list[str] | None,
        typer.Option("--public-extra", help="File or folder that may be there unsigned; may be repeated."),
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Do what check does, and find out who signed the certificate and whether the run holds the files that were signed.

    Exit code 1 if a row is wrong, whoever signed it, or if files lie there that the signature does not list and
    --public-extra does not allow; exit code 2 and one line if it is unsigned, altered, incomplete, or signed by a key
    that does not count.

    Example: dpfa certificate verify runs/flights-1 --key alice.key.pub
    """
    from dp_flash_attention.cli.certificate_keys import trusted
    from dp_flash_attention.crypto import UnlistedFilesError, verify_certificate
    from dp_flash_attention.training.run_check import check_run

    try:
        signers, extra = trusted(key, trust_file), public_extra or ()
        signed = verify_certificate(directory, signers, certificate_only=certificate_only, public_extra=extra)
    except UnlistedFilesError as error:
        if as_json:
            typer.echo(json.dumps({"verified": False, "unlisted": list(error.names)}))
        typer.echo(f"dpfa: error: {error}", err=True)
        raise typer.Exit(FAILED) from None
    found = check_run(directory, certificate=signed.certificate, certificate_only=certificate_only)
    if as_json:
        typer.echo(json.dumps(_as_json(signed, found), ensure_ascii=False))
    else:
        _print_check(found)
        _print_signature(signed)
    if not found.holds:
        raise typer.Exit(FAILED)


def listed(names: Any) -> str:
    """Returns names, each after a comma, so that nothing in them steers the terminal."""
    return "".join(f", {printable(name)}" for name in names)


def printable(text: object) -> str:
    """Returns a text that neither steers the terminal nor prints a line of its own, whoever wrote it."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))


def _as_json(signed: VerifiedCertificate, found: RunCheck) -> dict[str, Any]:
    return {
        **found.to_dict(),
        "verified": found.holds,
        "key_id": signed.signer.key.key_id,
        "algorithm": signed.signer.key.algorithm,
        "signer": signed.signer.name,
        "state": signed.signer.state.value,
        "signed_at": signed.signed_at,
        "files": list(signed.files),
        "unsigned": list(signed.unsigned),
    }


def _print_check(found: RunCheck) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("", "what", "stated", "computed again", "standing", box=box.SIMPLE_HEAD, show_edge=False)
    for row in found.rows:
        mark = "[green]ok[/green]" if row.holds else "[bold red]WRONG[/bold red]"
        cells = (row.name, row.stated, row.recomputed, row.standing.value)
        table.add_row(mark, *(Text(printable(cell)) for cell in cells))
    console.print(table)
    typer.echo()
    for row in found.rows:
        if not row.holds:
            typer.echo(
                f"WRONG {printable(row.name)}: stated {printable(row.stated)}, computed again "
                f"{printable(row.recomputed)} ({printable(row.remark)})"
            )
    typer.echo("Assumed, and yours to judge, for nothing here can compute it:")
    for line in found.certificate["assumed"]:
        typer.echo(f"  - {printable(line)}")
    wrong = sum(not row.holds for row in found.rows)
    claim = found.certificate["claim"]
    if wrong:
        for name, here in _other_versions(found.certificate["versions"]):
            typer.echo(
                f"It was written with another version of {name}; here is {here}. Check with that one too."
            )
        typer.echo(f"{wrong} of {len(found.rows)} rows are WRONG: do not rely on this certificate.")
    else:
        typer.echo(
            f"All {len(found.rows)} rows hold: the claim follows, if what is assumed is true and what is listed is all that ran."
        )
    typer.echo(f"It claims: {printable(claim['statement'])}")


def _other_versions(written_with: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields what computes the figures and is of another version here than where the certificate was written."""
    for name in ("dp-flash-attention", "dp-accounting"):
        if written_with.get(name) != version(name):
            yield name, version(name)


def _print_signature(signed: VerifiedCertificate) -> None:
    state = "" if signed.signer.state == "active" else f" ({signed.signer.state})"
    typer.echo(
        f"Signed by {printable(signed.signer.name)}{state}, key {signed.signer.key.key_id}, dated "
        f"{printable(signed.signed_at)}."
    )
    if signed.files:
        typer.echo(f"As signed: certificate.json{listed(signed.files)}")
    else:
        typer.echo("As signed: certificate.json. No other file was looked at.")
    if signed.unsigned:
        typer.echo(f"Not signed, so it may be anyone's: {listed(signed.unsigned)[2:]}")
