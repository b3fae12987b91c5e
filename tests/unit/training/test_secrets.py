from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from dp_flash_attention.core.errors import NoiseReuseError, NoiseUnavailableError, RunStateError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import RunKeys
from dp_flash_attention.training.secrets import (
    destroy_secrets,
    read_dataset_fingerprint,
    read_secrets,
    write_dataset_fingerprint,
    write_secrets,
)

KEY_FILE = Path(".secrets") / "run.key"


def test_purposes_have_keys_of_their_own_and_stored_ones_come_back(tmp_path: Path) -> None:
    keys = RunKeys.from_os()
    purposes = ("noise", "sampling", "dropout", "split", "count", "evaluation", "fingerprint")
    derived = {purpose: keys.derive(purpose).export() for purpose in purposes}
    assert len(set(derived.values())) == len(purposes)
    write_secrets(tmp_path, keys)
    again = read_secrets(tmp_path)
    assert not again.uses_test_key
    assert {purpose: again.derive(purpose).export() for purpose in purposes} == derived


def test_a_test_key_stays_one_when_it_is_stored(tmp_path: Path) -> None:
    write_secrets(tmp_path, RunKeys(TestKey("x")))
    again = read_secrets(tmp_path)
    assert again.uses_test_key
    assert again.derive("noise").export() == TestKey("x").derive("noise").export()


def test_secrets_are_closed_whatever_the_umask_and_written_once(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_secrets(tmp_path, RunKeys.from_os())
        write_dataset_fingerprint(tmp_path, "abc")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / ".secrets").stat().st_mode) == 0o700
    for path in (tmp_path / ".secrets").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(RunStateError, match="exists"):
        write_secrets(tmp_path, RunKeys.from_os())


@pytest.mark.parametrize("opened", [KEY_FILE, KEY_FILE.parent])
def test_secrets_open_to_others_are_not_used(tmp_path: Path, opened: Path) -> None:
    write_secrets(tmp_path, RunKeys.from_os())
    path = tmp_path / opened
    path.chmod(path.stat().st_mode | 0o040)
    with pytest.raises(RunStateError, match="chmod -R go="):
        read_secrets(tmp_path)


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system follows links")
def test_a_link_in_place_of_the_key_is_not_followed(tmp_path: Path) -> None:
    write_secrets(tmp_path, RunKeys.from_os())
    path = tmp_path / KEY_FILE
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunStateError, match="cannot be read"):
        read_secrets(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"kind": "secret", "key": "00"}', '{"kind": "secret", "key": 3}', "[]"]
)
def test_damaged_secrets_are_not_used_and_not_shown(tmp_path: Path, text: str) -> None:
    write_secrets(tmp_path, RunKeys.from_os())
    (tmp_path / KEY_FILE).write_text(text)
    with pytest.raises(RunStateError, match="damaged"):
        read_secrets(tmp_path)


def test_missing_secrets_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunStateError, match=r"run\.key cannot be read"):
        read_secrets(tmp_path)
    with pytest.raises(RunStateError, match=r"dataset\.fingerprint cannot be read"):
        read_dataset_fingerprint(tmp_path)


def test_the_fingerprint_can_be_written_again(tmp_path: Path) -> None:
    write_secrets(tmp_path, RunKeys.from_os())
    for value in ("first", "second"):
        write_dataset_fingerprint(tmp_path, value)
        assert read_dataset_fingerprint(tmp_path) == value


def test_secrets_are_overwritten_before_they_are_removed(tmp_path: Path) -> None:
    write_secrets(tmp_path, RunKeys.from_os())
    key = json.loads((tmp_path / KEY_FILE).read_text())["key"]
    os.link(tmp_path / KEY_FILE, tmp_path / "other name of the same blocks")
    destroy_secrets(tmp_path)
    left = (tmp_path / "other name of the same blocks").read_bytes()
    assert key.encode() not in left
    assert not any(left)
    assert not (tmp_path / ".secrets").exists()
    destroy_secrets(tmp_path)


def test_keys_are_claimed_once_destroyed_for_good_and_never_shown() -> None:
    keys = RunKeys.from_os()
    keys.claim()
    with pytest.raises(NoiseReuseError):
        keys.claim()
    shown = keys.derive("noise").export().hex()
    assert shown[:8] not in repr(keys)
    keys.destroy()
    with pytest.raises(NoiseUnavailableError):
        keys.derive("noise")
