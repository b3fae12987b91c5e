"""``dpfa certificate``: keys, signatures and sealing for what a run states about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dp_flash_attention.cli.certificate_check import check, listed, verify
from dp_flash_attention.cli.certificate_keys import (
    decapsulation_key,
    encapsulation_key,
    new_passphrase,
    signing_key,
    verifying_key,
)
from dp_flash_attention.core.errors import InvalidInputError

if TYPE_CHECKING:
    from dp_flash_attention.crypto.key_files import SecretKey

_ALGORITHMS = {
    "sign": ("ed25519_ml_dsa_65", "ed25519_ml_dsa_87"),
    "seal": ("x25519_ml_kem_768", "x25519_ml_kem_1024"),
}

certificate = typer.Typer(
    help="Check, sign, verify, seal and open the certificates of runs, with classical and lattice keys together.",
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
    passphrase = new_passphrase(passphrase_file, without=no_passphrase)
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

    old = signing_key(key, passphrase_file)
    paths = [new, new.with_name(new.name + ".pub"), new.with_name(new.name + ".succession")]
    for path in paths:
        if path.exists():
            raise InvalidInputError("new key", str(path), bound="a new file", remedy="Choose another name.")
    passphrase = new_passphrase(new_passphrase_file, without=no_passphrase)
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
        known.add(verifying_key(add), name=name)
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

    secret = signing_key(key, passphrase_file)
    path = sign_certificate(directory, secret)
    covered = json.loads(path.read_text(encoding="utf-8"))["files"]
    typer.echo(f"{path}: signed by {secret.key_id}; covers certificate.json{listed(covered)}")


certificate.command("check")(check)
certificate.command("verify")(verify)


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

    recipients = [encapsulation_key(path) for path in to]
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

    names = open_run(sealed, out, decapsulation_key(key, passphrase_file))
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
