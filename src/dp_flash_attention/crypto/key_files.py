"""Key files: one secret key, mode 600, optionally under a passphrase; and its public key for others.

A secret key file is a document (see ``documents``) of kind ``dpfa-secret-key``: algorithm, key id, creation time,
public key, protection, secret. Under a passphrase the secret is encrypted by AES-256-GCM under a key from scrypt
(RFC 7914), with everything else in the file authenticated; without one it is plain, and mode 600 is what protects it.
Nothing is ever written over.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dp_flash_attention.core.durable import sync_directory, write_new_file
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.documents import (
    canonical,
    from_text,
    now,
    read_bytes,
    read_document,
    read_once,
    to_text,
    write_document,
)
from dp_flash_attention.crypto.errors import AuthenticationError, KeyFileError
from dp_flash_attention.crypto.keys import (
    KEMS,
    SIGNATURES,
    DecapsulationKey,
    EncapsulationKey,
    SigningKey,
    VerifyingKey,
)
from dp_flash_attention.crypto.library import NONCE_BYTES, aead_decrypt, aead_encrypt, fresh_secret

SECRET_KIND = "dpfa-secret-key"
PUBLIC_KIND = "dpfa-public-key"
_PUBLIC_FIELDS = frozenset({"algorithm", "key_id", "created", "public_key"})
_SECRET_FIELDS = _PUBLIC_FIELDS | {"protection", "secret"}
_SALT_BYTES = 32
_MIN_PASSPHRASE = 12
# A file may ask for at most 1 GiB (128·n·r bytes) and 16 passes: more would be an attack on its reader.
_MAX_SCRYPT_BYTES, _MAX_SCRYPT_PASSES = 1 << 30, 16

SecretKey = SigningKey | DecapsulationKey
PublicKey = VerifyingKey | EncapsulationKey


@dataclass(frozen=True, kw_only=True)
class ScryptCost:
    """What one guess at a passphrase costs. The default takes 128 MiB and a good part of a second.

    Attributes:
        n: Steps, a power of two.
        r: Block size.
        p: Passes.
    """

    n: int = 1 << 17
    r: int = 8
    p: int = 1

    def __post_init__(self) -> None:
        whole = all(isinstance(value, int) and value >= 1 for value in (self.n, self.r, self.p))
        within = whole and 128 * self.n * self.r <= _MAX_SCRYPT_BYTES and self.p <= _MAX_SCRYPT_PASSES
        if not within or self.n < 2 or self.n & (self.n - 1):
            raise InvalidInputError(
                "scrypt cost",
                (self.n, self.r, self.p),
                bound="n a power of two, 128·n·r at most 2^30 and p at most 16",
                remedy="The default is n = 2^17, r = 8, p = 1.",
            )


def write_secret_key(
    path: Path, key: SecretKey, *, passphrase: str | None = None, cost: ScryptCost | None = None
) -> None:
    """Writes a new file of mode 600, durably.

    Raises:
        InvalidInputError: If the passphrase has fewer than 12 characters.
        KeyFileError: If the path exists or cannot be written.
    """
    fields = _public_fields(key.public, now())
    if passphrase is None:
        fields |= {"protection": {"kind": "none"}, "secret": to_text(key.export())}
    else:
        if len(passphrase) < _MIN_PASSPHRASE:
            raise InvalidInputError(
                "passphrase",
                f"{len(passphrase)} characters",
                bound=f"at least {_MIN_PASSPHRASE} characters",
                remedy="Use several random words.",
            )
        cost = ScryptCost() if cost is None else cost
        salt, nonce = fresh_secret(_SALT_BYTES), fresh_secret(NONCE_BYTES)
        fields["protection"] = {
            "kind": "scrypt+aes-256-gcm",
            **asdict(cost),
            "salt": to_text(salt),
            "nonce": to_text(nonce),
        }
        sealed = aead_encrypt(_stretched(passphrase, salt, cost), nonce, key.export(), canonical(fields))
        fields["secret"] = to_text(sealed)
    _write_new(path, write_document(fields, kind=SECRET_KIND), mode=0o600)


def write_public_key(path: Path, key: PublicKey) -> None:
    """Writes a public key to a new file, durably.

    Raises:
        KeyFileError: If the path exists or cannot be written.
    """
    _write_new(path, write_document(_public_fields(key, now()), kind=PUBLIC_KIND), mode=0o644)


def read_public_key(path: Path) -> PublicKey:
    """Reads what ``write_public_key`` wrote.

    Raises:
        KeyFileError: If the file is missing, foreign or damaged.
    """
    return _public(read_document(read_bytes(path), kind=PUBLIC_KIND, fields=_PUBLIC_FIELDS, where=path), path)


def read_secret_key(path: Path, *, passphrase: str | None = None) -> SecretKey:
    """Reads what ``write_secret_key`` wrote.

    Raises:
        KeyFileError: If the file is missing, foreign, damaged or open to other users, or if the passphrase is
            missing, wrong or not called for.
    """
    found = read_once(path)
    fields = read_document(found.content, kind=SECRET_KIND, fields=_SECRET_FIELDS, where=path)
    if found.open_to_others:
        raise KeyFileError(
            f"{path} is open to other users, but a secret key must have mode 600. Run: chmod 600 {path}"
        )
    public = _public(fields, path)
    secret = _secret(fields, passphrase, path)
    try:
        key: SecretKey = (
            SigningKey(public.algorithm, secret)
            if isinstance(public, VerifyingKey)
            else DecapsulationKey(public.algorithm, secret)
        )
    except InvalidInputError as error:
        raise _damaged(path, error.name) from error
    if key.public != public:
        raise KeyFileError(
            f"{path} is damaged: its secret belongs to another public key. Restore it from a copy."
        )
    return key


def needs_passphrase(path: Path) -> bool:
    """Returns whether a secret key file is under a passphrase.

    Raises:
        KeyFileError: If the file is missing, foreign or damaged.
    """
    fields = read_document(read_bytes(path), kind=SECRET_KIND, fields=_SECRET_FIELDS, where=path)
    return _protection(fields, path).get("kind") != "none"


def _public_fields(key: PublicKey, created: str) -> dict[str, Any]:
    return {
        "algorithm": key.algorithm,
        "key_id": key.key_id,
        "created": created,
        "public_key": to_text(key.public),
    }


def _public(fields: Mapping[str, Any], where: Path) -> PublicKey:
    algorithm, public = fields["algorithm"], from_text(fields["public_key"], where=where)
    try:
        key: PublicKey
        if algorithm in SIGNATURES:
            key = VerifyingKey(algorithm=algorithm, public=public)
        elif algorithm in KEMS:
            key = EncapsulationKey(algorithm=algorithm, public=public)
        else:
            raise KeyFileError(
                f"{where} holds a key of {str(algorithm)[:40]!r}, which is unknown here. Known are "
                f"{', '.join([*SIGNATURES, *KEMS])}."
            )
    except (InvalidInputError, TypeError) as error:
        raise _damaged(where, str(error)) from error
    if key.key_id != fields["key_id"]:
        raise KeyFileError(f"{where} is damaged: its key id belongs to another key. Restore it from a copy.")
    return key


def _secret(fields: Mapping[str, Any], passphrase: str | None, where: Path) -> bytes:
    protection, sealed = _protection(fields, where), from_text(fields["secret"], where=where)
    if protection["kind"] == "none":
        if passphrase is not None:
            raise KeyFileError(f"{where} has no passphrase, but one was given. Leave it out.")
        return sealed
    if passphrase is None:
        raise KeyFileError(f"{where} is under a passphrase, but none was given. Give it.")
    try:
        cost = ScryptCost(n=protection["n"], r=protection["r"], p=protection["p"])
    except InvalidInputError as error:
        raise _damaged(where, "its scrypt cost is out of bounds") from error
    key = _stretched(passphrase, from_text(protection["salt"], where=where), cost)
    bound = {name: value for name, value in fields.items() if name != "secret"}
    nonce = from_text(protection["nonce"], where=where)
    try:
        return aead_decrypt(key, nonce, sealed, canonical(bound), otherwise="")
    except AuthenticationError:
        raise KeyFileError(
            f"{where} does not open: the passphrase is wrong, or the file was altered. Try again, or restore it "
            "from a copy."
        ) from None


def _protection(fields: Mapping[str, Any], where: Path) -> dict[str, Any]:
    protection = fields["protection"]
    kinds = {"none": {"kind"}, "scrypt+aes-256-gcm": {"kind", "n", "r", "p", "salt", "nonce"}}
    if not isinstance(protection, dict) or kinds.get(str(protection.get("kind"))) != set(protection):
        raise _damaged(where, "its protection is unknown")
    return protection


def _stretched(passphrase: str, salt: bytes, cost: ScryptCost) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    # Keyboards and systems compose the same letter differently; NFKC makes it one (as in RFC 8265, section 4.2.1).
    prepared = unicodedata.normalize("NFKC", passphrase).encode("utf-8")
    return Scrypt(salt=salt, length=32, n=cost.n, r=cost.r, p=cost.p).derive(prepared)


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    try:
        write_new_file(path, data, mode=mode)
        sync_directory(path.parent)
    except FileExistsError:
        raise KeyFileError(f"{path} exists, and nothing is written over. Choose another name.") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written ({error.strerror}). Choose another place.") from error


def _damaged(where: Path, what: str) -> KeyFileError:
    return KeyFileError(f"{where} is damaged ({what}). Restore it from a copy.")
