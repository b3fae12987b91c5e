"""Keys and passphrases as the options of ``dpfa certificate`` name them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dp_flash_attention.core.errors import InvalidInputError

if TYPE_CHECKING:
    from dp_flash_attention.crypto import (
        DecapsulationKey,
        EncapsulationKey,
        SigningKey,
        TrustFile,
        VerifyingKey,
    )
    from dp_flash_attention.crypto.key_files import SecretKey


def secret_key(path: Path, passphrase_file: Path | None) -> SecretKey:
    """Reads a secret key; asks for the passphrase if the file is under one and none is given."""
    from dp_flash_attention.crypto import read_secret_key
    from dp_flash_attention.crypto.key_files import needs_passphrase

    passphrase = None
    if passphrase_file is not None:
        passphrase = _first_line(passphrase_file)
    elif needs_passphrase(path):
        passphrase = typer.prompt(f"Passphrase of {path}", hide_input=True, err=True)
    return read_secret_key(path, passphrase=passphrase)


def new_passphrase(passphrase_file: Path | None, *, without: bool) -> str | None:
    """Returns the passphrase of a new key file, asked for if none is given; None without one."""
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


def signing_key(path: Path, passphrase_file: Path | None) -> SigningKey:
    """Reads a secret key to sign with."""
    from dp_flash_attention.crypto import SigningKey

    key = secret_key(path, passphrase_file)
    if not isinstance(key, SigningKey):
        raise _wrong_kind(path, key.algorithm, "sign")
    return key


def decapsulation_key(path: Path, passphrase_file: Path | None) -> DecapsulationKey:
    """Reads a secret key to open with."""
    from dp_flash_attention.crypto import DecapsulationKey

    key = secret_key(path, passphrase_file)
    if not isinstance(key, DecapsulationKey):
        raise _wrong_kind(path, key.algorithm, "seal")
    return key


def verifying_key(path: Path) -> VerifyingKey:
    """Reads a public key to verify with."""
    from dp_flash_attention.crypto import VerifyingKey, read_public_key

    key = read_public_key(path)
    if not isinstance(key, VerifyingKey):
        raise _wrong_kind(path, key.algorithm, "sign")
    return key


def encapsulation_key(path: Path) -> EncapsulationKey:
    """Reads a public key to seal to."""
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


def trusted(key: Path | None, trust_file: Path | None) -> TrustFile:
    """Returns whose signatures count: one key's, or those of a trust file."""
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
    trusted.add(verifying_key(key), name=str(key))
    return trusted
