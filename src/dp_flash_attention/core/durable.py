"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY_PREFIX = ".tmp-"


@contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on leaving it durably takes the place of ``path``.

    If the body raises, the temporary file is removed and ``path`` stays as it was.

    Raises:
        OSError: If the file system refuses.
    """
    temporary = path.with_name(_TEMPORARY_PREFIX + path.name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself is durable only once the directory is.
    sync_directory(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Durably replaces ``path`` with ``data``.

    Raises:
        OSError: If the file system refuses.
    """
    with replaced_atomically(path) as temporary:
        temporary.write_bytes(data)


def write_new_file(path: Path, data: bytes, *, mode: int) -> None:
    """Creates a file that must not exist yet, with ``mode`` from its first moment, and makes it durable.

    Raises:
        FileExistsError: If it exists.
        OSError: If the file system refuses.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes creations, renames and removals in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(directory: Path) -> None:
    """Removes what an interrupted ``replaced_atomically`` left behind."""
    for path in directory.glob(_TEMPORARY_PREFIX + "*"):
        path.unlink(missing_ok=True)


def is_disk_error(error: Exception) -> bool:
    """Whether an exception says that a file could not be written; safetensors has a type of its own for it."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
