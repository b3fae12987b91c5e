"""Bundles: a signed run's certificate, signature and files in one sealed file.

Sealed inside: an 8-byte length, a JSON index of names and sizes, then the files' bytes in that order. A bundle opens
into a new directory, all of it or nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from dp_flash_attention.core.durable import sync_directory
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.certificates import (
    CERTIFICATE_FILE,
    SIGNATURE_FILE,
    certificate_digest,
)
from dp_flash_attention.crypto.documents import parse, read_bytes
from dp_flash_attention.crypto.errors import AuthenticationError
from dp_flash_attention.crypto.keys import DecapsulationKey, EncapsulationKey
from dp_flash_attention.crypto.sealed import seal_stream, unseal_stream
from dp_flash_attention.crypto.shared_files import check_name, fingerprint, is_plain_file

_LENGTH_BYTES = 8
_MAX_INDEX_BYTES = 1 << 20
_COPY_BYTES = 1 << 20
_FOREIGN = "what was sealed is no signed run. Ask its sender for one that dpfa certificate seal made."


def seal_run(directory: Path, target: Path, recipients: Sequence[EncapsulationKey]) -> tuple[str, ...]:
    """Seals a signed run to recipients; returns the names of the files in it.

    In it are the certificate, its signature and the files that the signature covers, nothing else; private data are never
    among them, whatever a signature says. Each has to be what
    was signed: a run from someone else could otherwise name a link to any file of this machine.

    Raises:
        InvalidInputError: If the run is not signed, a covered file is missing or altered, the target exists, or the
            recipients are not 1 to 256 different keys.
        DependencyMissingError: If ``cryptography`` has no ML-KEM.
    """
    names, signed = _signed_names(directory)
    for name in names:
        if not is_plain_file(directory, name):
            raise InvalidInputError(
                "directory",
                str(directory),
                bound=f"one that holds {name}, and no link in its place",
                remedy="Put back what was signed.",
            )
        if name != SIGNATURE_FILE and not _is_signed(directory, name, signed):
            raise InvalidInputError(
                "directory",
                str(directory),
                bound=f"one whose {name} is as it was signed",
                remedy="Sign again.",
            )
    with _new_file(target) as file:
        seal_stream(cast(BinaryIO, _Reader(directory, names, signed["files"])), file, recipients)
    return tuple(names)


def open_run(sealed: Path, target: Path, key: DecapsulationKey) -> tuple[str, ...]:
    """Opens a bundle into a new directory; returns the names of the files in it. Verify the certificate then.

    Raises:
        InvalidInputError: If the target exists.
        AuthenticationError: If the bundle is foreign, damaged, altered or sealed to others; nothing is kept.
        OSError: If the file system refuses.
    """
    if target.exists():
        raise InvalidInputError("directory", str(target), bound="a new one", remedy="Choose another name.")
    # Beside the target, so that what was opened moves into its place at once; mode 700, since it was sealed.
    workplace = Path(tempfile.mkdtemp(prefix=".tmp-open-", dir=target.parent))
    try:
        with open(sealed, "rb") as source, open(workplace / "bundle", "w+b") as file:
            unseal_stream(source, file, key)
            file.seek(0)
            (workplace / "run").mkdir(mode=0o700)
            names = _unpack(file, workplace / "run")
        os.rename(workplace / "run", target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return names


def _signed_names(directory: Path) -> tuple[list[str], dict[str, Any]]:
    where = directory / SIGNATURE_FILE
    if not where.is_file():
        raise InvalidInputError(
            "directory",
            str(directory),
            bound=f"a signed run, with {SIGNATURE_FILE}",
            remedy="Sign it first with dpfa certificate sign: sealing says nothing about who sealed.",
        )
    try:
        signed = parse(read_bytes(where))
        names = [CERTIFICATE_FILE, SIGNATURE_FILE, *dict(signed["files"])]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            "signature", str(where), bound="one that dpfa certificate sign wrote", remedy="Sign again."
        ) from error
    for name in names:
        check_name(name)
    return names, signed


def _is_signed(directory: Path, name: str, signed: dict[str, Any]) -> bool:
    if name != CERTIFICATE_FILE:
        return bool(fingerprint(directory / name) == signed["files"][name])
    try:
        return certificate_digest(directory) == signed.get("certificate_sha256")
    except InvalidInputError:
        return False


class _Reader:
    """The bundle's plaintext as a stream, read from the files as it goes and held against what was signed."""

    def __init__(
        self, directory: Path, names: Sequence[str], signed: Mapping[str, Any] | None = None
    ) -> None:
        index = [{"name": name, "size": (directory / name).stat().st_size} for name in names]
        self._signed = {} if signed is None else signed
        text = json.dumps(index).encode()
        self._parts = self._all(len(text).to_bytes(_LENGTH_BYTES, "big") + text, directory, index)
        self._rest = b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (part := next(self._parts, b"")):
            self._rest += part
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def _all(self, start: bytes, directory: Path, index: Sequence[dict[str, Any]]) -> Iterator[bytes]:
        yield start
        for entry in index:
            left, digest = entry["size"], hashlib.sha256()
            with open(directory / entry["name"], "rb") as file:
                while left > 0 and (part := file.read(min(left, 1 << 16))):
                    left -= len(part)
                    digest.update(part)
                    yield part
            expected = self._signed.get(entry["name"], {"sha256": digest.hexdigest()})["sha256"]
            # The file was looked at before; what counts is what was read now.
            if left or digest.hexdigest() != expected:
                raise InvalidInputError(
                    "file", entry["name"], bound="left alone while it is sealed", remedy="Seal again."
                )


def _unpack(bundle: BinaryIO, target: Path) -> tuple[str, ...]:
    try:
        length = int.from_bytes(bundle.read(_LENGTH_BYTES), "big")
        index = parse(bundle.read(min(length, _MAX_INDEX_BYTES)))
        sizes = {str(entry["name"]): int(entry["size"]) for entry in index}
        if len(sizes) != len(index):
            raise ValueError("a name stands there twice")
        for name in sizes:
            check_name(name)
            (target / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            (target / name).touch(exist_ok=False)
    except (ValueError, KeyError, TypeError, FileExistsError, NotADirectoryError) as error:
        raise AuthenticationError(_FOREIGN) from error
    for name, size in sizes.items():
        with open(target / name, "wb") as file:
            left = size
            while left > 0 and (part := bundle.read(min(left, _COPY_BYTES))):
                file.write(part)
                left -= len(part)
        if left:
            raise AuthenticationError(_FOREIGN)
    if bundle.read(1):
        raise AuthenticationError(_FOREIGN)
    return tuple(sizes)


@contextmanager
def _new_file(target: Path) -> Iterator[BinaryIO]:
    """Yields a new file that is removed if the body raises."""
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise InvalidInputError(
            "sealed file", str(target), bound="a new one", remedy="Choose another name."
        ) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        sync_directory(target.parent)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
