"""Keys and passphrases as the options of ``dpfa certificate`` name them."""

from __future__ import annotations

import warnings
from getpass import GetPassWarning
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
        passphrase = _asked(f"Passphrase of {path}")
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
    return _asked("New passphrase", confirmation_prompt=True)


def _first_line(path: Path) -> str:
    # Not read as a private file, so that a pipe will do: --passphrase-file <(password-manager show alice)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InvalidInputError(
            "passphrase file", str(path), bound="text in UTF-8", remedy="Write it on its first line."
        ) from None
    if not lines:
        raise InvalidInputError(
            "passphrase file", str(path), bound="not empty", remedy="Write it on its first line."
        )
    return lines[0]


def _asked(question: str, *, confirmation_prompt: bool = False) -> str:
    with warnings.catch_warnings():
        # Without a terminal the answer would be shown on the screen, or taken from whatever is piped in.
        warnings.simplefilter("error", GetPassWarning)
        try:
            answer: str = typer.prompt(
                question, hide_input=True, confirmation_prompt=confirmation_prompt, err=True
            )
        except GetPassWarning:
            raise InvalidInputError(
                "passphrase",
                "not given",
                bound="given by --passphrase-file where there is no terminal to ask at",
                remedy="A new key can do without, under mode 600: --no-passphrase.",
            ) from None
    return answer


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

    if key is None and trust_file is None:
        raise InvalidInputError(
            "--key",
            None,
            bound="given, or --trust",
            remedy="Say whose signature counts. To compute the certificate's numbers again without one: dpfa certificate check",
        )
    if key is not None and trust_file is not None:
        raise InvalidInputError(
            "--key", str(key), bound="left out with --trust", remedy="Give one of them, not both."
        )
    if trust_file is not None:
        return TrustFile.read(trust_file)
    assert key is not None, "one of the two is there"
    trusted = TrustFile()
    trusted.add(verifying_key(key), name=str(key))
    return trusted
