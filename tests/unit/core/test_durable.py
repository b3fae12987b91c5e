from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dp_flash_attention.core import durable


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    durable.write_atomically(path, b"old")

    def breaks_off() -> None:
        with durable.replaced_atomically(path) as temporary:
            temporary.write_bytes(b"half of the n")
            raise KeyError

    with pytest.raises(KeyError):
        breaks_off()
    assert path.read_bytes() == b"old"
    durable.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_content_is_durable_before_the_name_and_the_name_before_returning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_sync(descriptor: int) -> None:
        events.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names)))
    durable.write_atomically(tmp_path / "x", b"data")
    assert events == ["file", "rename", "directory"]


def test_a_secret_file_is_closed_from_its_first_moment_and_written_once(tmp_path: Path) -> None:
    path = tmp_path / "run.key"
    before = os.umask(0)
    try:
        durable.write_new_file(path, b"secret", mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        durable.write_new_file(path, b"other", mode=0o600)
    assert path.read_bytes() == b"secret"


def test_only_our_own_leavings_are_removed(tmp_path: Path) -> None:
    for name in (".tmp-run.json", "run.json", ".hidden"):
        (tmp_path / name).write_text("x")
    durable.remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "run.json"]


def test_what_counts_as_a_disk_error() -> None:
    assert durable.is_disk_error(PermissionError())
    assert durable.is_disk_error(type("SafetensorError", (Exception,), {})())
    assert not durable.is_disk_error(ValueError())
