"""``dpfa certificate``: keys, signatures and sealing for what a run states about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dp_flash_attention.core.errors import InvalidInputError

if TYPE_CHECKING:
    from dp_flash_attention.crypto import (
        DecapsulationKey,
        EncapsulationKey,
        SigningKey,
        TrustFile,
        VerifiedCertificate,
        VerifyingKey,
    )
    from dp_flash_attention.crypto.key_files import SecretKey

_ALGORITHMS = {
    "sign": ("ed25519_ml_dsa_65", "ed25519_ml_dsa_87"),
    "seal": ("x25519_ml_kem_768", "x25519_ml_kem_1024"),
}

certificate = typer.Typer(
    help="Sign, verify, seal and open the certificates of runs, with classical and lattice keys together.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_KeyOption = Annotated[Path, typer.Option("--key", help="Secret key file.")]
_PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file", help="File whose first line is the key's passphrase; left out: asked for."
    ),
]


@certificate.command("keygen")
def keygen(
    key: Annotated[
        Path, typer.Argument(help="New secret key file; the public key goes beside it, as KEY.pub.")
    ],
    purpose: Annotated[
        str, typer.Option("--for", help="'sign' certificates, or open what is 'seal'ed to you.")
    ] = ("sign"),
    algorithm: Annotated[
        str | None,
        typer.Option(help="Left out: ed25519_ml_dsa_65 or x25519_ml_kem_768; or their larger siblings."),
    ] = None,
    passphrase_file: _PassphraseOption = None,
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Let mode 600 alone protect the file.")
    ] = False,
) -> None:
    """Make a key to sign with, or one that others seal to.

    Example: dpfa certificate keygen alice.key
    """
    from dp_flash_attention import crypto

    chosen = _algorithm(purpose, algorithm)
    public_path = key.with_name(key.name + ".pub")
    for path in (key, public_path):
        if path.exists():
            raise InvalidInputError("key", str(path), bound="a new file", remedy="Choose another name.")
    passphrase = _new_passphrase(passphrase_file, without=no_passphrase)
    made: SecretKey = (
        crypto.SigningKey.generate(chosen) if purpose == "sign" else crypto.DecapsulationKey.generate(chosen)
    )
    crypto.write_secret_key(key, made, passphrase=passphrase)
    crypto.write_public_key(public_path, made.public)
    typer.echo(f"{key}: secret {chosen} key {made.key_id}. Keep it.\n{public_path}: public key. Hand it out.")


@certificate.command("rotate")
def rotate(
    new: Annotated[
        Path, typer.Argument(help="New secret key file; KEY.pub and KEY.succession go beside it.")
    ],
    key: _KeyOption,
    passphrase_file: _PassphraseOption = None,
    new_passphrase_file: Annotated[
        Path | None,
        typer.Option("--new-passphrase-file", help="The same for the new key; left out: asked for."),
    ] = None,
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Let mode 600 alone protect the new file.")
    ] = False,
) -> None:
    """Hand over from a signing key to a new one, with a statement that both sign.

    Whoever trusts the old key takes the statement up with dpfa certificate trust --succession.

    Example: dpfa certificate rotate alice-2027.key --key alice.key
    """
    from dp_flash_attention import crypto
    from dp_flash_attention.core.durable import write_new_file

    old = _signing_key(key, passphrase_file)
    paths = [new, new.with_name(new.name + ".pub"), new.with_name(new.name + ".succession")]
    for path in paths:
        if path.exists():
            raise InvalidInputError("new key", str(path), bound="a new file", remedy="Choose another name.")
    passphrase = _new_passphrase(new_passphrase_file, without=no_passphrase)
    made = crypto.SigningKey.generate(old.algorithm)
    crypto.write_secret_key(paths[0], made, passphrase=passphrase)
    crypto.write_public_key(paths[1], made.public)
    write_new_file(paths[2], crypto.make_succession(old, made), mode=0o644)
    typer.echo(
        f"{paths[0]}: secret {made.algorithm} key {made.key_id}. Keep it.\n{paths[1]}: public key.\n"
        f"{paths[2]}: {old.key_id} hands over to {made.key_id}. Hand it to whoever trusts the old key."
    )


@certificate.command("trust")
def trust(
    file: Annotated[Path, typer.Argument(help="Trust file; made if --add is given and it is not there.")],
    add: Annotated[Path | None, typer.Option(help="Public key file to trust from now on.")] = None,
    name: Annotated[str | None, typer.Option(help="With --add: who holds it.")] = None,
    succession: Annotated[Path | None, typer.Option(help="Statement of dpfa certificate rotate.")] = None,
    revoke: Annotated[str | None, typer.Option(help="Id of a key to trust no longer.")] = None,
) -> None:
    """Show or change whose signatures count.

    Example: dpfa certificate trust trusted.json --add alice.key.pub --name "Alice, privacy officer"
    """
    from dp_flash_attention.crypto import TrustFile
    from dp_flash_attention.crypto.documents import read_bytes

    if sum(option is not None for option in (add, succession, revoke)) > 1 or (add is None) != (name is None):
        raise InvalidInputError(
            "options",
            "given",
            bound="one of --add with --name, --succession and --revoke, or none to show the file",
            remedy="Run one change at a time.",
        )
    known = TrustFile() if add is not None and not file.exists() else TrustFile.read(file)
    if add is not None and name is not None:
        known.add(_verifying_key(add), name=name)
    if succession is not None:
        known.succeed(read_bytes(succession), where=succession)
    if revoke is not None:
        known.revoke(revoke)
    if add is not None or succession is not None or revoke is not None:
        known.write(file)
    for entry in known.keys:
        successor = "" if entry.successor is None else f", then {entry.successor}"
        typer.echo(f"{entry.key.key_id}  {entry.state:8}  {entry.name}{successor}")


@certificate.command("sign")
def sign(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    key: _KeyOption,
    passphrase_file: _PassphraseOption = None,
) -> None:
    """Sign a run's certificate together with every file that is shared with it, in folders too.

    Never signed: diagnostics/ and .secrets/. A link, a hidden file or a secret key in the run is an error.

    Example: dpfa certificate sign runs/flights-1 --key alice.key
    """
    from dp_flash_attention.crypto import sign_certificate

    secret = _signing_key(key, passphrase_file)
    path = sign_certificate(directory, secret)
    covered = json.loads(path.read_text(encoding="utf-8"))["files"]
    typer.echo(f"{path}: signed by {secret.key_id}; covers certificate.json{_listed(covered)}")


@certificate.command("verify")
def verify(
    directory: Annotated[Path, typer.Argument(help="Directory with certificate, signature and files.")],
    key: Annotated[Path | None, typer.Option("--key", help="Public key file of the expected signer.")] = None,
    trust_file: Annotated[Path | None, typer.Option("--trust", help="Trust file, instead of --key.")] = None,
    certificate_only: Annotated[
        bool, typer.Option("--certificate-only", help="Leave the covered files aside.")
    ] = False,
    public_extra: Annotated[
        list[str] | None,
        typer.Option("--public-extra", help="File or folder that may be there unsigned; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check who signed a certificate, and that the run holds the files that were signed, unaltered, and no others.

    Exit code 1 and one line if files lie there that the signature does not list and --public-extra does not allow;
    exit code 2 if it is unsigned, altered, incomplete, or signed by a key that does not count. What the
    certificate claims is the signer's word, not something that this command computes.

    Example: dpfa certificate verify runs/flights-1 --key alice.key.pub
    """
    from dp_flash_attention.crypto import UnlistedFilesError, verify_certificate

    try:
        trusted, extra = _trusted(key, trust_file), public_extra or ()
        found = verify_certificate(directory, trusted, certificate_only=certificate_only, public_extra=extra)
    except UnlistedFilesError as error:
        if as_json:
            typer.echo(json.dumps({"verified": False, "unlisted": list(error.names)}))
        typer.echo(f"dpfa: error: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(_as_json(found)))
    else:
        _print_verified(found)


@certificate.command("seal")
def seal(
    directory: Annotated[Path, typer.Argument(help="Directory of a signed run.")],
    to: Annotated[list[Path], typer.Option("--to", help="Public key file of a recipient; may be repeated.")],
    out: Annotated[Path, typer.Option(help="New file.")],
) -> None:
    """Seal a signed run, so that only the recipients can open it.

    Example: dpfa certificate seal runs/flights-1 --to bob.key.pub --out flights.sealed
    """
    from dp_flash_attention.crypto import seal_run

    recipients = [_encapsulation_key(path) for path in to]
    names = seal_run(directory, out, recipients)
    typer.echo(f"{out}: sealed to {', '.join(key.key_id for key in recipients)}; holds {', '.join(names)}")


@certificate.command("open")
def open_(
    sealed: Annotated[Path, typer.Argument(help="Sealed file.")],
    key: _KeyOption,
    out: Annotated[Path, typer.Option(help="New directory.")],
    passphrase_file: _PassphraseOption = None,
) -> None:
    """Open a sealed run. Who sealed it is unknown until its certificate is verified.

    Example: dpfa certificate open flights.sealed --key bob.key --out flights
    """
    from dp_flash_attention.crypto import open_run

    names = open_run(sealed, out, _decapsulation_key(key, passphrase_file))
    typer.echo(f"{out}: {', '.join(names)}. Not verified yet: run dpfa certificate verify {out}")


def _algorithm(purpose: str, algorithm: str | None) -> str:
    if purpose not in _ALGORITHMS:
        raise InvalidInputError(
            "--for", purpose, bound=f"one of {', '.join(_ALGORITHMS)}", remedy="Choose one of them."
        )
    known = _ALGORITHMS[purpose]
    if algorithm is not None and algorithm not in known:
        raise InvalidInputError(
            "--algorithm", algorithm, bound=f"{' or '.join(known)}, to {purpose}", remedy="Or leave it out."
        )
    return known[0] if algorithm is None else algorithm


def _secret_key(path: Path, passphrase_file: Path | None) -> SecretKey:
    from dp_flash_attention.crypto import read_secret_key
    from dp_flash_attention.crypto.key_files import needs_passphrase

    passphrase = None
    if passphrase_file is not None:
        passphrase = _first_line(passphrase_file)
    elif needs_passphrase(path):
        passphrase = typer.prompt(f"Passphrase of {path}", hide_input=True, err=True)
    return read_secret_key(path, passphrase=passphrase)


def _new_passphrase(passphrase_file: Path | None, *, without: bool) -> str | None:
    if without:
        if passphrase_file is not None:
            raise InvalidInputError(
                "--no-passphrase",
                True,
                bound="given without a passphrase file",
                remedy="Leave one of them out.",
            )
        return None
    if passphrase_file is not None:
        return _first_line(passphrase_file)
    answer: str = typer.prompt("New passphrase", hide_input=True, confirmation_prompt=True, err=True)
    return answer


def _first_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise InvalidInputError(
            "passphrase file", str(path), bound="not empty", remedy="Write it on its first line."
        )
    return lines[0]


def _signing_key(path: Path, passphrase_file: Path | None) -> SigningKey:
    from dp_flash_attention.crypto import SigningKey

    key = _secret_key(path, passphrase_file)
    if not isinstance(key, SigningKey):
        raise _wrong_kind(path, key.algorithm, "sign")
    return key


def _decapsulation_key(path: Path, passphrase_file: Path | None) -> DecapsulationKey:
    from dp_flash_attention.crypto import DecapsulationKey

    key = _secret_key(path, passphrase_file)
    if not isinstance(key, DecapsulationKey):
        raise _wrong_kind(path, key.algorithm, "seal")
    return key


def _verifying_key(path: Path) -> VerifyingKey:
    from dp_flash_attention.crypto import VerifyingKey, read_public_key

    key = read_public_key(path)
    if not isinstance(key, VerifyingKey):
        raise _wrong_kind(path, key.algorithm, "sign")
    return key


def _encapsulation_key(path: Path) -> EncapsulationKey:
    from dp_flash_attention.crypto import EncapsulationKey, read_public_key

    key = read_public_key(path)
    if not isinstance(key, EncapsulationKey):
        raise _wrong_kind(path, key.algorithm, "seal")
    return key


def _wrong_kind(path: Path, algorithm: str, purpose: str) -> InvalidInputError:
    return InvalidInputError(
        "key",
        str(path),
        bound=f"one made with keygen --for {purpose}, and it is for {algorithm}",
        remedy="Pass the other key.",
    )


def _trusted(key: Path | None, trust_file: Path | None) -> TrustFile:
    from dp_flash_attention.crypto import TrustFile

    if (key is None) == (trust_file is None):
        raise InvalidInputError(
            "options",
            "given",
            bound="--key or --trust, and not both",
            remedy="Say whose signature counts: a signature by anyone is worth nothing.",
        )
    if trust_file is not None:
        return TrustFile.read(trust_file)
    assert key is not None, "one of the two is there"
    trusted = TrustFile()
    trusted.add(_verifying_key(key), name=str(key))
    return trusted


def _as_json(found: VerifiedCertificate) -> dict[str, Any]:
    return {
        "verified": True,
        "key_id": found.signer.key.key_id,
        "algorithm": found.signer.key.algorithm,
        "signer": found.signer.name,
        "state": found.signer.state.value,
        "signed_at": found.signed_at,
        "files": list(found.files),
        "unsigned": list(found.unsigned),
        "claim": found.certificate["claim"],
    }


def _print_verified(found: VerifiedCertificate) -> None:
    state = "" if found.signer.state == "active" else f" ({found.signer.state})"
    typer.echo(
        f"Signed by {found.signer.name}{state}, key {found.signer.key.key_id}, dated {found.signed_at}."
    )
    if found.files:
        typer.echo(f"As signed: certificate.json{_listed(found.files)}")
    else:
        typer.echo("As signed: certificate.json. No other file was looked at.")
    if found.unsigned:
        typer.echo(f"Not signed, so it may be anyone's: {_listed(found.unsigned)[2:]}")
    claim = found.certificate["claim"]
    typer.echo(f"It claims: {_printable(claim.get('statement', claim))}")


def _listed(names: Any) -> str:
    return "".join(f", {_printable(name)}" for name in names)


def _printable(text: object) -> str:
    # What another machine wrote must not steer the terminal, or print a line of ours.
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))
