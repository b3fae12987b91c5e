import os

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum import memo_key
from dp_flash_attention.quantum.memo_key import create_memo_key, load_memo_key


def test_the_same_file_gives_the_same_key(tmp_path):
    path = tmp_path / "memo.key"
    key = create_memo_key(path)
    assert load_memo_key(path) == key
    assert key.vouched == ()
    assert "nobody else read" in load_memo_key(path).vouched[0]
    assert path.stat().st_mode & 0o777 == 0o600
    assert create_memo_key(tmp_path / "other.key") != key


def test_nothing_is_ever_overwritten_or_made_up(tmp_path):
    path = tmp_path / "memo.key"
    create_memo_key(path)
    with pytest.raises(FileExistsError):
        create_memo_key(path)
    with pytest.raises(FileNotFoundError):
        load_memo_key(tmp_path / "missing.key")


@pytest.mark.parametrize("change", ["flip", "cut", "grow", "foreign", "empty"])
def test_a_corrupt_or_foreign_file_is_refused(tmp_path, change):
    path = tmp_path / "memo.key"
    create_memo_key(path)
    content = bytearray(path.read_bytes())
    if change == "flip":
        content[25] ^= 1
    path.write_bytes(
        {
            "flip": bytes(content),
            "cut": bytes(content[:-1]),
            "grow": bytes(content) + b"x",
            "foreign": b"-----BEGIN PRIVATE KEY-----" + bytes(60),
            "empty": b"",
        }[change]
    )
    with pytest.raises(InvalidInputError, match="memo key file") as error:
        load_memo_key(path)
    assert bytes(content[20:30]).hex() not in str(error.value)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_key_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "memo.key"
    create_memo_key(path)
    path.chmod(0o640)
    with pytest.raises(InvalidInputError, match="chmod 600"):
        load_memo_key(path)


def test_a_new_key_is_durable_before_it_is_used(tmp_path, monkeypatch):
    """A crash that loses the file would answer old queries with new noise."""
    synced = []
    monkeypatch.setattr(memo_key, "sync_directory", synced.append, raising=False)
    create_memo_key(tmp_path / "memo.key")
    assert synced == [tmp_path]


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system follows links")
def test_links_and_what_is_no_file_are_refused(tmp_path):
    create_memo_key(tmp_path / "memo.key")
    (tmp_path / "link").symlink_to(tmp_path / "memo.key")
    os.mkfifo(tmp_path / "pipe", mode=0o600)
    for name, said in (("link", "no link"), ("pipe", "regular file"), ("", "regular file")):
        with pytest.raises(InvalidInputError, match=said):
            load_memo_key(tmp_path / name)


def test_the_file_whose_mode_is_checked_is_the_file_that_is_read(tmp_path, monkeypatch):
    """Between two look-ups of the name another file could take its place."""
    path = tmp_path / "memo.key"
    key = create_memo_key(path)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    for lookup in ("stat", "read_bytes", "open"):
        monkeypatch.delattr(type(path).__mro__[1], lookup)
    assert load_memo_key(path) == key
    assert opened == [path]
