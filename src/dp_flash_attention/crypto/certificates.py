"""Signed certificates: who vouches for a run's statement, and for which files.

The signature lives beside the certificate, in ``certificate.json.sig``: a document (see ``documents``) that names the
SHA-256 of the certificate's canonical form and the SHA-256 and size of every file beside it, and is signed as a
whole. Training knows nothing of it: an unsigned certificate is as true as a signed one, only less attributable.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_flash_attention.core.durable import sync_directory, write_new_file
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.documents import (
    canonical,
    from_text,
    now,
    parse,
    read_bytes,
    read_document,
    to_text,
    write_document,
)
from dp_flash_attention.crypto.errors import AuthenticationError, KeyFileError
from dp_flash_attention.crypto.keys import SigningKey
from dp_flash_attention.crypto.trust import TrustedKey, TrustFile

CERTIFICATE_FILE = "certificate.json"
SIGNATURE_FILE = "certificate.json.sig"
SIGNATURE_KIND = "dpfa-signature"
_CONTEXT = b"dpfa.certificate.v1"
_CANONICALIZATION = "dpfa-canonical-json-1"
_SIGNED_FIELDS = frozenset(
    {"algorithm", "key_id", "signed_at", "subject", "canonicalization", "certificate_sha256", "files"}
)
_FIELDS = _SIGNED_FIELDS | {"signature"}


@dataclass(frozen=True, kw_only=True)
class VerifiedCertificate:
    """What a good signature vouches for.

    Attributes:
        certificate: The statement, as JSON values.
        signer: The key that signed, as the trust file knows it.
        signed_at: When, by the signer's own clock.
        files: Names of the files that are as they were signed; empty if they were not looked at.
        unsigned: Names of files and folders beside the certificate that the signature says nothing about, folders (which
            are never signed) with a slash; hidden ones are left out.
    """

    certificate: dict[str, Any]
    signer: TrustedKey
    signed_at: str
    files: tuple[str, ...]
    unsigned: tuple[str, ...]


def sign_certificate(directory: Path, key: SigningKey) -> Path:
    """Signs the certificate of a run and the files beside it; returns the signature's path.

    Covered are the regular files directly in the directory whose names do not begin with a dot. Folders are not:
    ``diagnostics/`` is private data and ``checkpoints/`` are the run's working state.

    Args:
        directory: The run's directory.
        key: The signer's.

    Raises:
        InvalidInputError: If there is no certificate, or a signature is there already.
        DependencyMissingError: If ``cryptography`` has no ML-DSA.
    """
    content = _certificate(directory)
    body = {
        "algorithm": key.algorithm,
        "key_id": key.key_id,
        "signed_at": now(),
        "subject": CERTIFICATE_FILE,
        "canonicalization": _CANONICALIZATION,
        "certificate_sha256": hashlib.sha256(canonical(content)).hexdigest(),
        "files": {name: fingerprint(directory / name) for name in _beside(directory)},
    }
    signature = key.sign(canonical(body), context=_CONTEXT)
    target = directory / SIGNATURE_FILE
    document = write_document({**body, "signature": to_text(signature)}, kind=SIGNATURE_KIND)
    try:
        write_new_file(target, document, mode=0o644)
    except FileExistsError:
        raise InvalidInputError(
            "signature",
            str(target),
            bound="not there yet",
            remedy="Move the old signature away to sign anew.",
        ) from None
    sync_directory(directory)
    return target


def verify_certificate(
    directory: Path, trust: TrustFile, *, certificate_only: bool = False
) -> VerifiedCertificate:
    """Checks a certificate against its signature.

    Args:
        directory: Where certificate, signature and files are.
        trust: Whose signatures count.
        certificate_only: Whether to leave the other files aside, for one who has only the certificate.

    Raises:
        InvalidInputError: If there is no certificate.
        AuthenticationError: If it is unsigned, altered or signed by a key that does not count, or if a covered
            file is missing or altered.
    """
    content = _certificate(directory)
    where = directory / SIGNATURE_FILE
    if not where.is_file():
        raise AuthenticationError(
            f"{directory / CERTIFICATE_FILE} is not signed: there is no {SIGNATURE_FILE} beside it. Ask for it, or "
            "sign with dpfa certificate sign."
        )
    try:
        fields = read_document(read_bytes(where), kind=SIGNATURE_KIND, fields=_FIELDS, where=where)
        signature = from_text(fields["signature"], where=where)
        body = {name: fields[name] for name in _SIGNED_FIELDS}
        signer = trust.find(str(fields["key_id"]))
    except (KeyFileError, AuthenticationError) as error:
        raise AuthenticationError(f"{directory / CERTIFICATE_FILE} is not verified: {error}") from error
    if (body["subject"], body["canonicalization"]) != (CERTIFICATE_FILE, _CANONICALIZATION):
        raise AuthenticationError(
            f"{where} is a signature of another kind. Use the program that wrote it, or ask for the original."
        )
    try:
        signer.key.verify(canonical(body), signature, context=_CONTEXT)
    except AuthenticationError as error:
        raise AuthenticationError(f"{where} was altered: {error}") from error
    if hashlib.sha256(canonical(content)).hexdigest() != body["certificate_sha256"]:
        raise AuthenticationError(
            f"{directory / CERTIFICATE_FILE} was altered after it was signed. Ask {signer.name} for the original."
        )
    if not certificate_only:
        _check_files(directory, body["files"], signer)
    covered = () if certificate_only else tuple(body["files"])
    return VerifiedCertificate(
        certificate=content,
        signer=signer,
        signed_at=str(body["signed_at"]),
        files=covered,
        unsigned=_unsigned(directory, body["files"]),
    )


def _certificate(directory: Path) -> dict[str, Any]:
    path = directory / CERTIFICATE_FILE
    remedy = "Pass the directory of a finished run."
    try:
        content = parse(path.read_bytes())
    except OSError as error:
        raise InvalidInputError(
            "directory",
            str(directory),
            bound=f"one that holds {CERTIFICATE_FILE} ({error.strerror})",
            remedy=remedy,
        ) from error
    except ValueError as error:
        raise InvalidInputError(
            "certificate", str(path), bound=f"a JSON statement ({error})", remedy=remedy
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("claim"), dict):
        raise InvalidInputError("certificate", str(path), bound="one with a claim", remedy=remedy)
    return content


def _beside(directory: Path) -> Iterable[str]:
    own = (CERTIFICATE_FILE, SIGNATURE_FILE)
    return sorted(
        path.name
        for path in directory.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name not in own
    )


def _unsigned(directory: Path, files: Container[str]) -> tuple[str, ...]:
    names = sorted(directory.iterdir(), key=lambda path: path.name)
    return tuple(
        f"{path.name}/" if path.is_dir() else path.name
        for path in names
        if not path.name.startswith(".")
        and path.name not in (CERTIFICATE_FILE, SIGNATURE_FILE)
        and (path.is_dir() or path.name not in files)
    )


def certificate_digest(directory: Path) -> str:
    """Returns the SHA-256 of the certificate's canonical form.

    Raises:
        InvalidInputError: If there is no certificate.
    """
    return hashlib.sha256(canonical(_certificate(directory))).hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """Returns what a signature says of a file: its SHA-256 and its size."""
    with open(path, "rb") as file:
        size = path.stat().st_size
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": size}


def _check_files(directory: Path, files: dict[str, Any], signer: TrustedKey) -> None:
    for name, expected in files.items():
        path = directory / name
        # The signer is trusted, yet a name that leads elsewhere is none that signing wrote.
        if Path(name).name != name or not path.exists() or not stat.S_ISREG(path.stat().st_mode):
            raise AuthenticationError(
                f"{path} is signed but missing. Ask {signer.name} for it, or verify the certificate alone with "
                "--certificate-only."
            )
        if fingerprint(path) != expected:
            raise AuthenticationError(
                f"{path} was altered after it was signed. Ask {signer.name} for the original."
            )
