"""Signed certificates: who vouches for a run's statement, and for which files.

The signature lives beside the certificate, in ``certificate.json.sig``: a document (see ``documents``) that names the
SHA-256 of the certificate's canonical form and the SHA-256 and size of every shared file of the run (see
``shared_files``), at any depth, and is signed as a whole. Training knows nothing of it: an unsigned certificate is as
true as a signed one, only less attributable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_flash_attention.core.durable import sync_directory, write_new_file
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.private_files import read_private_file
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
from dp_flash_attention.crypto.errors import AuthenticationError, KeyFileError, UnlistedFilesError
from dp_flash_attention.crypto.keys import SigningKey
from dp_flash_attention.crypto.shared_files import (
    PRIVATE_FOLDER,
    check_name,
    fingerprint,
    is_among,
    is_plain_file,
    names_below,
    shared_files,
)
from dp_flash_attention.crypto.trust import TrustedKey, TrustFile

CERTIFICATE_FILE = "certificate.json"
SIGNATURE_FILE = "certificate.json.sig"
SIGNATURE_KIND = "dpfa-signature"
_ITS_OWN = (CERTIFICATE_FILE, SIGNATURE_FILE)
_CONTEXT = b"dpfa.certificate.v1"
_CANONICALIZATION = "dpfa-canonical-json-1"
_SIGNED_FIELDS = frozenset(
    {"algorithm", "key_id", "signed_at", "subject", "canonicalization", "certificate_sha256", "files"}
)
_FIELDS = _SIGNED_FIELDS | {"signature"}
_MAX_SHOWN = 5
_MAX_CERTIFICATE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class VerifiedCertificate:
    """What a good signature vouches for.

    Attributes:
        certificate: The statement, as JSON values.
        signer: The key that signed, as the trust file knows it.
        signed_at: When, by the signer's own clock.
        files: Names of the files that are as they were signed; empty if they were not looked at.
        unsigned: What lies beside them and the signature says nothing about: ``diagnostics/``, which is never shared, and
            the files that the caller allows; with ``certificate_only`` every file that is not listed.
    """

    certificate: dict[str, Any]
    signer: TrustedKey
    signed_at: str
    files: tuple[str, ...]
    unsigned: tuple[str, ...]


def sign_certificate(directory: Path, key: SigningKey) -> Path:
    """Signs the certificate of a run and every shared file; returns the signature's path.

    Covered are all files at any depth. Not covered, and never shared, are ``diagnostics/``, ``.secrets/`` and ``.lock``.

    Args:
        directory: The run's directory.
        key: The signer's.

    Raises:
        InvalidInputError: If there is no certificate, a signature is there already, or something lies there that must not
            be shared (see ``shared_files``).
        DependencyMissingError: If ``cryptography`` has no ML-DSA.
    """
    content = read_certificate(directory)
    body = {
        "algorithm": key.algorithm,
        "key_id": key.key_id,
        "signed_at": now(),
        "subject": CERTIFICATE_FILE,
        "canonicalization": _CANONICALIZATION,
        "certificate_sha256": content_digest(content),
        "files": {
            name: fingerprint(directory / name) for name in shared_files(directory, leave_out=_ITS_OWN)
        },
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
    directory: Path,
    trust: TrustFile,
    *,
    certificate_only: bool = False,
    public_extra: Sequence[str] = (),
) -> VerifiedCertificate:
    """Checks a certificate against its signature.

    Args:
        directory: Where certificate, signature and files are.
        trust: Whose signatures count.
        certificate_only: Whether to leave the other files aside, for one who has only the certificate.
        public_extra: Names of files or folders that may lie there although the signature does not list them.

    Raises:
        InvalidInputError: If there is no certificate.
        UnlistedFilesError: If all that is signed is as it was, and other files lie beside it.
        AuthenticationError: If it is unsigned, altered or signed by a key that does not count, or if a covered
            file is missing or altered.
    """
    content = read_certificate(directory)
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
    if content_digest(content) != body["certificate_sha256"]:
        raise AuthenticationError(
            f"{directory / CERTIFICATE_FILE} was altered after it was signed. Ask {signer.name} for the original."
        )
    if not certificate_only:
        _check_files(directory, body["files"], signer)
    covered = () if certificate_only else tuple(body["files"])
    unlisted = tuple(name for name in names_below(directory) if name not in {*body["files"], *_ITS_OWN})
    refused = () if certificate_only else tuple(name for name in unlisted if not is_among(name, public_extra))
    if refused:
        raise _unlisted(directory, refused, signer)
    return VerifiedCertificate(
        certificate=content,
        signer=signer,
        signed_at=str(body["signed_at"]),
        files=covered,
        unsigned=(*unlisted, *([f"{PRIVATE_FOLDER}/"] if (directory / PRIVATE_FOLDER).exists() else ())),
    )


def read_certificate(directory: Path) -> dict[str, Any]:
    """Returns the certificate of a run as JSON values: no NaN or infinity, nothing said twice. Nothing of it is checked.

    Raises:
        InvalidInputError: If there is none, or it has no claim.
    """
    path = directory / CERTIFICATE_FILE
    remedy = "Pass the directory of a finished run."
    try:
        data = read_private_file(path, max_bytes=_MAX_CERTIFICATE_BYTES, follow_links=True).content
        if len(data) > _MAX_CERTIFICATE_BYTES:
            raise ValueError(f"it has more than {_MAX_CERTIFICATE_BYTES >> 20} MiB")
        content = parse(data)
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


def certificate_digest(directory: Path) -> str:
    """Returns the SHA-256 of the certificate's canonical form.

    Raises:
        InvalidInputError: If there is no certificate.
    """
    return content_digest(read_certificate(directory))


def content_digest(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the canonical form of a certificate's JSON values."""
    return hashlib.sha256(canonical(content)).hexdigest()


def _check_files(directory: Path, files: Mapping[str, Any], signer: TrustedKey) -> None:
    for name, expected in files.items():
        path = directory / name
        try:
            check_name(name)
        except InvalidInputError as error:
            # The signer is trusted, yet a name that leads elsewhere is none that signing wrote.
            raise AuthenticationError(
                f"{directory / SIGNATURE_FILE} lists what is never signed ({error}) Ask {signer.name} for another."
            ) from error
        if not is_plain_file(directory, name):
            raise AuthenticationError(
                f"{path} is signed but missing. Ask {signer.name} for it, or verify the certificate alone with "
                "--certificate-only."
            )
        if fingerprint(path) != expected:
            raise AuthenticationError(
                f"{path} was altered after it was signed. Ask {signer.name} for the original."
            )


def _unlisted(directory: Path, names: tuple[str, ...], signer: TrustedKey) -> UnlistedFilesError:
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:_MAX_SHOWN])
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return UnlistedFilesError(
        f"{directory} holds what {signer.name} did not sign, so it may be anyone's: {shown}{more}. Remove it, or allow "
        "it with --public-extra NAME.",
        names=names,
    )
