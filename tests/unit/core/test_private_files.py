"""Private files: one look-up of the name, whatever happens to the name meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dp_flash_attention.core.private_files import read_private_file


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    path.write_bytes(b"0123456789")
    return path


def test_content_and_mode(secret: Path) -> None:
    found = read_private_file(secret, max_bytes=10, follow_links=False)
    assert (found.content, found.mode, found.open_to_others) == (b"0123456789", 0o600, False)
    assert "0123" not in repr(found)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_file_that_is_open_to_others_says_so(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    assert read_private_file(secret, max_bytes=10, follow_links=False).open_to_others


def test_no_more_than_one_byte_beyond_the_bound_is_read(secret: Path) -> None:
    assert read_private_file(secret, max_bytes=3, follow_links=False).content == b"0123"


def test_a_file_that_grows_while_it_is_read_is_still_bounded() -> None:
    """An endless device is no regular file, and is not read at all."""
    with pytest.raises(OSError, match="no regular file"):
        read_private_file(Path("/dev/zero"), max_bytes=10, follow_links=True)


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system follows links")
def test_a_link_is_followed_only_where_it_may_be(secret: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(secret)
    assert read_private_file(link, max_bytes=10, follow_links=True).content == b"0123456789"
    with pytest.raises(OSError, match="a link"):
        read_private_file(link, max_bytes=10, follow_links=False)


@pytest.mark.skipif(os.name != "posix", reason="pipes with names are POSIX")
@pytest.mark.parametrize("name", ["pipe", ""])
def test_what_is_no_file_neither_blocks_nor_passes(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe", mode=0o600)
    with pytest.raises(OSError, match="no regular file"):
        read_private_file(tmp_path / name, max_bytes=10, follow_links=True)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_private_file(tmp_path / "none", max_bytes=10, follow_links=True)


@pytest.mark.skipif(os.name != "posix", reason="a file that is open can be replaced on POSIX alone")
def test_a_file_that_takes_its_place_after_opening_changes_nothing(
    secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked with one look-up and read with the next, the content would be another file's than the mode."""
    other = tmp_path / "other"
    other.write_bytes(b"somebody else's")
    other.chmod(0o644)
    real = os.open

    def open_and_replace(*arguments: object, **options: object) -> int:
        descriptor = real(*arguments, **options)  # type: ignore[arg-type]
        os.replace(other, secret)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_replace)
    found = read_private_file(secret, max_bytes=10, follow_links=False)
    assert (found.content, found.mode) == (b"0123456789", 0o600)
    assert secret.read_bytes() == b"somebody else's"
