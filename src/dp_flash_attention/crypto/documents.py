"""JSON documents that notice any change: keys, trust, successions, signatures.

Canonical form, which is what is hashed and signed: ``json.dumps`` with keys sorted by code point, no white space,
text as it is (UTF-8, no escapes but those JSON demands, no Unicode normalisation), whole numbers in full, other
numbers as the shortest decimal that reads back as the same double. Not allowed: a repeated key, NaN, infinity, a
number too large for a double, a lone surrogate. Two texts of the same values have the same canonical form.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from dp_flash_attention.core.private_files import PrivateFile, read_private_file
from dp_flash_attention.crypto.errors import KeyFileError

VERSION = 1
_MAX_BYTES = 1 << 20
_RESTORE = "Restore it from a copy, or make a new one under another name."


def canonical(value: object) -> bytes:
    """Returns the canonical form of JSON values.

    >>> canonical({"b": 1.50, "a": ["ε", True]}).decode()
    '{"a":["ε",true],"b":1.5}'

    Raises:
        ValueError: If a number is not finite or a text has no UTF-8 form.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def parse(data: bytes) -> Any:
    """Returns JSON values; refuses what has no canonical form.

    Raises:
        ValueError: If the bytes are no JSON text, or one that is not allowed (see above).
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_repeats,
            parse_constant=_refuse_constant,
        )
        canonical(value)  # refuses what json reads and no double or UTF-8 text holds
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def write_document(fields: Mapping[str, Any], *, kind: str) -> bytes:
    """Returns a document's bytes: its fields, its kind, its version and a checksum over all of them."""
    body = {**fields, "format": kind, "version": VERSION}
    return _rendered({**body, "checksum": _checksum(body)})


def read_document(data: bytes, *, kind: str, fields: frozenset[str], where: Path) -> dict[str, Any]:
    """Returns a document's fields.

    The checksum finds damage, not forgery: that is what signatures and encryption are for.

    Raises:
        KeyFileError: If it is no document, one of another kind or version, or not byte for byte as written.
    """
    try:
        found = parse(data)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("format"), str):
        raise KeyFileError(f"{where} is not a {kind} file. Pass the one that dpfa certificate wrote.")
    if found["format"] != kind:
        shown = str(found["format"])[:40]
        raise KeyFileError(f"{where} is a {shown} file, but a {kind} file is needed. Pass that one.")
    if found.get("version") != VERSION:
        raise KeyFileError(
            f"{where} has version {found.get('version')!r}, but this program reads {VERSION}. Use the program that "
            "wrote it."
        )
    body = {name: value for name, value in found.items() if name != "checksum"}
    if found.get("checksum") != _checksum(body) or _rendered(found) != data or set(body) != fields | _COMMON:
        raise KeyFileError(f"{where} is damaged: it is not as it was written. {_RESTORE}")
    return {name: found[name] for name in fields}


def is_document(path: Path, *, kind: str) -> bool:
    """Returns whether a file is a document of that kind, damaged or not."""
    with open(path, "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        found = parse(data) if len(data) <= _MAX_BYTES else None
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("format") == kind


def read_bytes(path: Path) -> bytes:
    """Returns the bytes of a small file; see ``read_once``."""
    return read_once(path).content


def read_once(path: Path) -> PrivateFile:
    """Returns a small file with its mode, both of what was opened; a link is followed.

    Raises:
        KeyFileError: If it cannot be read, is no regular file, or is too large to be a document.
    """
    try:
        found = read_private_file(path, max_bytes=_MAX_BYTES, follow_links=True)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read ({error.strerror}). Check the file's name.") from error
    if len(found.content) > _MAX_BYTES:
        raise KeyFileError(
            f"{path} has more than {_MAX_BYTES} bytes, so it is none of ours. Check the file's name."
        )
    return found


def to_text(data: bytes) -> str:
    """Returns bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")


def from_text(text: object, *, where: Path) -> bytes:
    """Returns the bytes of base64 text.

    Raises:
        KeyFileError: If it is not the one text that stands for some bytes.
    """
    try:
        data = base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if to_text(data) != text:
        raise KeyFileError(f"{where} is damaged: a value in it is not base64. {_RESTORE}")
    return data


def now() -> str:
    """Returns this moment in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_COMMON = frozenset({"format", "version"})


def _rendered(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha3_256(canonical(body)).hexdigest()


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("it says one thing twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")
