"""What of a run's directory is shared: every file in it at any depth, but the run's private data and secrets.

A shared file has a *name*: its path within the directory, parts joined by "/". Names are portable and lead nowhere
else: no part is empty, "." or "..", begins with a dot, or holds a slash, a backslash, a colon or what cannot be printed.
No link is ever followed below the directory, and no part may be called like the folder of private data.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.documents import is_document
from dp_flash_attention.crypto.key_files import SECRET_KIND

PRIVATE_FOLDER = "diagnostics"
"""Holds data that the run's guarantee does not cover; see ``training.run_directory``."""

_PEM_SECRET, _PEM_BYTES = b"PRIVATE KEY-----", 1 << 14
_OWN = frozenset({PRIVATE_FOLDER, ".secrets", ".lock"})


def shared_files(directory: Path, *, leave_out: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the names of the files to sign, in order.

    Args:
        directory: The run's.
        leave_out: Names that need no signature.

    Raises:
        InvalidInputError: If something there must not be shared or cannot be: a secret key, a hidden file that is none of
            a run's, a link or device, private data outside their folder, or a name that is not portable. Nothing is left
            out in silence.
    """
    names = [name for name in names_below(directory) if name not in leave_out]
    for name in names:
        check_name(name)
        if not is_plain_file(directory, name):
            raise InvalidInputError(
                "file",
                str(directory / name),
                bound="a plain file, not a link or a device",
                remedy="Put the file itself there, or remove it.",
            )
        if _is_secret_key(directory / name):
            raise InvalidInputError(
                "file",
                str(directory / name),
                bound="nothing secret, and it is a secret key",
                remedy="Keep keys outside the run, and sign then.",
            )
    return tuple(names)


def names_below(directory: Path) -> Iterator[str]:
    """Yields the name of all that is no folder, in order, but what a run keeps for itself; names are not checked.

    A link to a folder is yielded like a file. What a run keeps for itself are ``diagnostics/``, ``.secrets/`` and
    ``.lock``, at the top only.
    """
    yield from sorted(_walk(directory, ""))


def check_name(name: str) -> None:
    """Checks that a name is portable, stays within its directory and is none of private data.

    Raises:
        InvalidInputError: If it is not, does not, or is.
    """
    parts = name.split("/")
    if not name.isprintable() or any(not part or set(part) & set("\\:") or part[0] == "." for part in parts):
        raise InvalidInputError(
            "file name",
            name,
            bound="plain and printable, with no part that begins with a dot",
            remedy="Rename or remove the file.",
        )
    if any(part.casefold() == PRIVATE_FOLDER for part in parts):
        raise InvalidInputError(
            "file name",
            name,
            bound=f"without '{PRIVATE_FOLDER}', which is private data and never shared",
            remedy="Rename it if it is none, or move it out of the run.",
        )


def is_plain_file(directory: Path, name: str) -> bool:
    """Returns whether a name is that of a regular file that is reached through no link."""
    path = directory
    *folders, _ = parts = name.split("/")
    for depth, part in enumerate(parts):
        path = path / part
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            return False
        if not (stat.S_ISDIR(mode) if depth < len(folders) else stat.S_ISREG(mode)):
            return False
    return True


def fingerprint(path: Path) -> dict[str, Any]:
    """Returns what a signature says of a file: its SHA-256 and its size. A link in its place is not followed."""
    with open(path, "rb", opener=_without_links) as file:
        size = os.fstat(file.fileno()).st_size
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": size}


def is_among(name: str, chosen: Sequence[str]) -> bool:
    """Returns whether a name, or a folder that it lies in, is one of those chosen."""
    return any(name == one or name.startswith(one.rstrip("/") + "/") for one in chosen)


def _walk(directory: Path, prefix: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if not prefix and entry.name in _OWN:
                continue
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(directory / entry.name, name + "/")
            else:
                yield name


def _is_secret_key(path: Path) -> bool:
    with open(path, "rb") as file:
        is_pem = _PEM_SECRET in file.read(_PEM_BYTES)
    return is_pem or is_document(path, kind=SECRET_KIND)


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))
