"""Reading files that only their owner may read: what is checked is the file that is read."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class PrivateFile:
    """A small file, as it was at one moment.

    Attributes:
        content: Its bytes; one more than were allowed if it is longer. Not shown by ``repr``.
        mode: Its permission bits.
    """

    content: bytes
    mode: int

    @property
    def open_to_others(self) -> bool:
        """Whether anybody but its owner may read, write or run it; False where modes mean nothing."""
        return os.name == "posix" and bool(self.mode & 0o077)

    def __repr__(self) -> str:
        """Shows no bytes."""
        return f"PrivateFile({len(self.content)} bytes, mode={oct(self.mode)})"


def read_private_file(path: Path, *, max_bytes: int, follow_links: bool) -> PrivateFile:
    """Opens a file once and returns its mode and its bytes, both of what was opened.

    Args:
        path: The file.
        max_bytes: At most one byte more than that is read, whatever the file's size.
        follow_links: Whether ``path`` itself may be a link. Let it be one where a user names the file, for secrets are
            often mounted as links; a file that a program keeps for itself is none.

    Raises:
        OSError: If it cannot be opened, is a link though it must not be, or is no regular file; a pipe does not block.
    """
    flags = (
        os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    )
    if not follow_links:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise OSError(errno.ELOOP, "it is a link, not the file itself", str(path)) from error
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return PrivateFile(content=file.read(max_bytes + 1), mode=stat.S_IMODE(mode))
    finally:
        os.close(descriptor)
