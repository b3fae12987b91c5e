"""What is shared, what stops sharing, and what is never looked at."""

import os

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto import SigningKey, sign_certificate, write_secret_key
from dp_flash_attention.crypto.shared_files import (
    check_name,
    is_among,
    is_plain_file,
    names_below,
    shared_files,
)


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    for name in (
        "certificate.json",
        "model",
        "checkpoints/7/state",
        "diagnostics/losses",
        ".secrets/key",
        ".lock",
    ):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text('{"claim": {}}')
    return directory


def test_all_but_what_a_run_keeps_for_itself_is_shared(run):
    (run / "empty").mkdir()
    assert shared_files(run) == ("certificate.json", "checkpoints/7/state", "model")
    assert shared_files(run, leave_out=["model"]) == ("certificate.json", "checkpoints/7/state")


@pytest.mark.parametrize(
    "name", [".env", "checkpoints/.tmp-7", ".git/config", "Diagnostics/a", "b/diagnostics/a", "b/diagnostics"]
)
def test_what_may_be_private_stops_signing(run, name):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("private?")
    with pytest.raises(InvalidInputError, match=r"Rename"):
        sign_certificate(run, SigningKey.generate())
    assert not (run / "certificate.json.sig").exists()


def test_a_secret_key_in_the_run_stops_signing(run):
    key = SigningKey.generate()
    write_secret_key(run / "checkpoints" / "alice.key", key)
    with pytest.raises(InvalidInputError, match="it is a secret key"):
        sign_certificate(run, key)
    (run / "checkpoints" / "alice.key").unlink()
    (run / "server.pem").write_text("-----BEGIN EC PRIVATE KEY-----")
    with pytest.raises(InvalidInputError, match="it is a secret key"):
        sign_certificate(run, key)


def test_links_and_devices_stop_signing(run, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    for target in (tmp_path / "outside", tmp_path / "outside" / "file", run / "model", tmp_path / "nothing"):
        (run / "link").symlink_to(target)
        with pytest.raises(InvalidInputError, match="a plain file, not a link"):
            shared_files(run)
        (run / "link").unlink()
    os.mkfifo(run / "pipe")  # reading it would never end
    with pytest.raises(InvalidInputError, match="a plain file"):
        shared_files(run)


def test_a_link_to_a_folder_is_a_name_and_not_a_way(run):
    (run / "loop").symlink_to(run)
    assert [name for name in names_below(run) if name.startswith("loop")] == ["loop"]
    assert not is_plain_file(run, "loop/model")
    assert not is_plain_file(run, "loop")
    assert not is_plain_file(run, "checkpoints")
    assert not is_plain_file(run, "model/x")
    assert is_plain_file(run, "checkpoints/7/state")


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "..", "a/../b", ".", "a/.", "a\\b", "c:a", "a\nb", "\udcff", "DIAGNOSTICS/a"]
)
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(InvalidInputError, match="file name"):
        check_name(name)


def test_a_folder_stands_for_what_is_in_it():
    assert is_among("a/b", ["a"])
    assert is_among("a/b", ["x", "a/"])
    assert is_among("a", ["a"])
    assert not is_among("ab", ["a"])
    assert not is_among("a", [])
