import io
import json

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto import (
    AuthenticationError,
    DecapsulationKey,
    SigningKey,
    TrustFile,
    open_run,
    seal,
    seal_run,
    sign_certificate,
    verify_certificate,
)
from dp_flash_attention.crypto.bundles import _Reader
from dp_flash_attention.crypto.shared_files import fingerprint

ALICE = SigningKey("ed25519_ml_dsa_65", bytes(range(64)))
BOB, EVE = (DecapsulationKey("x25519_ml_kem_768", bytes([number]) * 96) for number in (1, 2))


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    (directory / "diagnostics").mkdir(parents=True)
    (directory / "diagnostics" / "scores.json").write_text("private")
    (directory / "certificate.json").write_text('{"claim": {"epsilon": 1.0}}')
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (directory / "empty.txt").touch()
    (directory / "checkpoints" / "7").mkdir(parents=True)
    (directory / "checkpoints" / "7" / "state").write_bytes(b"state")
    sign_certificate(directory, ALICE)
    return directory


def bundled(index, content=b""):
    text = json.dumps(index).encode()
    return seal(len(text).to_bytes(8, "big") + text + content, [BOB.public])


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_sealed_run_opens_and_verifies(run, tmp_path):
    names = seal_run(run, tmp_path / "sealed", [BOB.public])
    assert set(names) == {
        "certificate.json", "certificate.json.sig", "empty.txt", "model.safetensors", "checkpoints/7/state"
    }  # fmt: skip
    assert open_run(tmp_path / "sealed", tmp_path / "opened", BOB) == names
    for name in names:
        assert (tmp_path / "opened" / name).read_bytes() == (run / name).read_bytes()
    assert (tmp_path / "opened").stat().st_mode & 0o777 == 0o700
    trust = TrustFile()
    trust.add(ALICE.public, name="Alice")
    assert verify_certificate(tmp_path / "opened", trust).unsigned == ()
    assert (tmp_path / "opened" / "checkpoints" / "7").stat().st_mode & 0o777 == 0o700
    assert left_behind(tmp_path) == ["opened", "run", "sealed"]


def test_private_data_and_unsigned_files_stay_out(run, tmp_path):
    (run / "later.txt").write_text("unsigned")
    assert "later.txt" not in seal_run(run, tmp_path / "sealed", [BOB.public])
    open_run(tmp_path / "sealed", tmp_path / "opened", BOB)
    assert not (tmp_path / "opened" / "diagnostics").exists()


def test_an_unsigned_run_is_not_sealed(run, tmp_path):
    (run / "certificate.json.sig").unlink()
    with pytest.raises(InvalidInputError, match="Sign it first"):
        seal_run(run, tmp_path / "sealed", [BOB.public])
    (run / "certificate.json.sig").write_text("{}")
    with pytest.raises(InvalidInputError, match="Sign again"):
        seal_run(run, tmp_path / "sealed", [BOB.public])
    assert not (tmp_path / "sealed").exists()


def test_a_missing_file_is_named(run, tmp_path):
    (run / "model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"model\.safetensors"):
        seal_run(run, tmp_path / "sealed", [BOB.public])


@pytest.mark.parametrize("content", [b"short", bytes(256_000), bytes(256_001)])
def test_a_file_that_changes_meanwhile_leaves_nothing(run, tmp_path, monkeypatch, content):
    """After it was checked and before it is read: what is sent has to be what was signed."""
    read = _Reader._all

    def change(self, start, directory, index):
        (run / "model.safetensors").write_bytes(content)
        return read(self, start, directory, index)

    monkeypatch.setattr(_Reader, "_all", change)
    with pytest.raises(InvalidInputError, match="left alone"):
        seal_run(run, tmp_path / "sealed", [BOB.public])
    assert not (tmp_path / "sealed").exists()


def test_nothing_is_written_over(run, tmp_path):
    (tmp_path / "sealed").write_text("precious")
    with pytest.raises(InvalidInputError, match="a new one"):
        seal_run(run, tmp_path / "sealed", [BOB.public])
    assert (tmp_path / "sealed").read_text() == "precious"
    seal_run(run, tmp_path / "other", [BOB.public])
    (tmp_path / "opened").mkdir()
    with pytest.raises(InvalidInputError, match="a new one"):
        open_run(tmp_path / "other", tmp_path / "opened", BOB)
    assert left_behind(tmp_path / "opened") == []


@pytest.mark.parametrize("position", [5, 600, -1, -100_000])
def test_an_altered_bundle_leaves_nothing(run, tmp_path, position):
    seal_run(run, tmp_path / "sealed", [BOB.public])
    content = bytearray((tmp_path / "sealed").read_bytes())
    content[position] ^= 1
    (tmp_path / "sealed").write_bytes(bytes(content))
    with pytest.raises(AuthenticationError):
        open_run(tmp_path / "sealed", tmp_path / "opened", BOB)
    assert left_behind(tmp_path) == ["run", "sealed"]


def test_others_do_not_open_it(run, tmp_path):
    seal_run(run, tmp_path / "sealed", [BOB.public])
    with pytest.raises(AuthenticationError, match="not sealed to key"):
        open_run(tmp_path / "sealed", tmp_path / "opened", EVE)
    assert left_behind(tmp_path) == ["run", "sealed"]


@pytest.mark.parametrize(
    "sealed",
    [
        seal(b"", [BOB.public]),
        seal(b"just some text", [BOB.public]),
        seal(b"\xff" * 100, [BOB.public]),
        bundled({"name": "a"}),
        bundled([{"name": "a"}]),
        bundled([{"name": "a", "size": "many"}]),
        bundled([{"name": "a", "size": 5}], b"1234"),
        bundled([{"name": "a", "size": 3}], b"1234"),
        bundled([{"name": "../a", "size": 0}]),
        bundled([{"name": "/tmp/a", "size": 0}]),
        bundled([{"name": "..", "size": 0}]),
        bundled([{"name": "", "size": 0}]),
        bundled([{"name": ".hidden", "size": 0}]),
        bundled([{"name": "a\\b", "size": 0}]),
        bundled([{"name": "a\x1b[2J", "size": 0}]),
        bundled([{"name": "c:a", "size": 0}]),
        bundled([{"name": "a/../../b", "size": 0}]),
        bundled([{"name": "a//b", "size": 0}]),
        bundled([{"name": "a/", "size": 0}]),
        bundled([{"name": "a/.b", "size": 0}]),
        bundled([{"name": "diagnostics/b", "size": 0}]),
        bundled([{"name": "a", "size": 0}, {"name": "a", "size": 0}]),
        bundled([{"name": "a", "size": 0}, {"name": "a/b", "size": 0}]),
        bundled([{"name": "a/b", "size": 0}, {"name": "a", "size": 0}]),
    ],
)
def test_a_sealed_file_of_another_kind_leaves_nothing(tmp_path, sealed):
    (tmp_path / "sealed").write_bytes(sealed)
    with pytest.raises(AuthenticationError, match="no signed run"):
        open_run(tmp_path / "sealed", tmp_path / "opened", BOB)
    assert left_behind(tmp_path) == ["sealed"]


def test_the_reader_gives_exactly_what_is_asked(run):
    whole = _Reader(run, ["empty.txt", "model.safetensors"]).read(1 << 30)
    reader, parts = _Reader(run, ["empty.txt", "model.safetensors"]), io.BytesIO()
    while part := reader.read(999):
        parts.write(part)
    assert parts.getvalue() == whole
    assert whole.endswith(bytes(range(256)))


def test_a_link_in_place_of_a_signed_file_gives_nothing_away(run, tmp_path):
    """A run from someone else must not make its sealer send a file of this machine."""
    secret = tmp_path / "secret"
    secret.write_text("nobody else's")
    (run / "empty.txt").unlink()
    (run / "empty.txt").symlink_to(secret)
    with pytest.raises(InvalidInputError, match=r"no link in its place"):
        seal_run(run, tmp_path / "sealed", [BOB.public])
    (run / "empty.txt").unlink()
    (run / "empty.txt").touch()
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInputError, match=r"no link in its place"):
        seal_run(run, tmp_path / "sealed", [BOB.public])
    assert not (tmp_path / "sealed").exists()


def test_private_data_stay_out_whatever_a_signature_says(run, tmp_path):
    """A signature file that someone else wrote must not make its sealer send what is private."""
    path = run / "certificate.json.sig"
    signed = json.loads(path.read_text())
    signed["files"]["diagnostics/scores.json"] = fingerprint(run / "diagnostics" / "scores.json")
    path.write_text(json.dumps(signed))
    with pytest.raises(InvalidInputError, match="private data and never shared"):
        seal_run(run, tmp_path / "sealed", [BOB.public])
    assert not (tmp_path / "sealed").exists()


def test_an_altered_certificate_is_not_sealed(run, tmp_path):
    for content in ('{"claim": {"epsilon": 0.1}}', "no JSON"):
        (run / "certificate.json").write_text(content)
        with pytest.raises(InvalidInputError, match="as it was signed"):
            seal_run(run, tmp_path / "sealed", [BOB.public])
