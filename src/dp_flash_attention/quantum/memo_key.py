"""The key of memoised noise, in a file: the same file gives the same answers after a restart."""

from __future__ import annotations

import errno
import hashlib
import hmac
from pathlib import Path

from dp_flash_attention.core.durable import sync_directory, write_new_file
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.private_files import read_private_file
from dp_flash_attention.noise import SecretKey

_MAGIC = b"dpfa-memo-key-v1\n"
_CHECK_BYTES = 16
_KEY_BYTES = 32


def create_memo_key(path: Path) -> SecretKey:
    """Writes a fresh key to ``path`` with mode 600 and returns it. Never overwrites.

    Raises:
        FileExistsError: If ``path`` exists.
        NoiseUnavailableError: If the system gives no secure entropy.
    """
    key = SecretKey.from_os()
    content = _MAGIC + key.export() + _check(key.export())
    write_new_file(path, content, mode=0o600)
    sync_directory(path.parent)  # a key that a crash loses would answer old queries anew
    return key


def load_memo_key(path: Path) -> SecretKey:
    """Returns the key that ``create_memo_key`` wrote.

    Raises:
        FileNotFoundError: If there is none. A new key would answer old queries with new noise, so none is made.
        InvalidInputError: If the file is foreign, cut off, altered, a link, or readable by other users.
    """
    remedy = (
        "Restore the file from its backup; create_memo_key starts anew, at the price of every answer so far."
    )
    content = _read_private(path)
    key = content[len(_MAGIC) : len(_MAGIC) + _KEY_BYTES]
    whole = len(content) == len(_MAGIC) + _KEY_BYTES + _CHECK_BYTES and content.startswith(_MAGIC)
    if not whole or not hmac.compare_digest(_check(key), content[-_CHECK_BYTES:]):
        raise InvalidInputError(
            "memo key file", str(path), bound="a memo key as create_memo_key writes it", remedy=remedy
        )
    return SecretKey.from_bytes(
        key, vouched=("all bits of the memo key, whose file create_memo_key wrote and nobody else read",)
    )


def _check(key: bytes) -> bytes:
    return hashlib.sha3_256(_MAGIC + key).digest()[:_CHECK_BYTES]


def _read_private(path: Path) -> bytes:
    """Returns the start of a regular file that only its owner may read."""
    try:
        found = read_private_file(path, max_bytes=len(_MAGIC) + _KEY_BYTES + _CHECK_BYTES, follow_links=False)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EINVAL):
            raise
        raise InvalidInputError(
            "memo key file", str(path), bound="a regular file and no link", remedy="Name the file itself."
        ) from error
    if found.open_to_others:
        raise InvalidInputError(
            "memo key file",
            str(path),
            bound="readable by its owner alone",
            remedy=f"Run: chmod 600 {path}",
        )
    return found.content
