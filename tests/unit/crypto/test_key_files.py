"""Key files: what they hold, who may read them, and that nothing damaged or foreign gets through."""

import json
import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto import (
    DecapsulationKey,
    KeyFileError,
    ScryptCost,
    SigningKey,
    read_public_key,
    read_secret_key,
    write_public_key,
    write_secret_key,
)
from dp_flash_attention.crypto.documents import write_document
from dp_flash_attention.crypto.key_files import needs_passphrase
from dp_flash_attention.crypto.keys import KEMS, SIGNATURES

PASSPHRASE = "four quite random words"
CHEAP = ScryptCost(n=2)
ALGORITHMS = [*SIGNATURES, *KEMS]


def make(algorithm="ed25519_ml_dsa_65"):
    return (SigningKey if algorithm in SIGNATURES else DecapsulationKey).generate(algorithm)


def altered_document(path, **changes):
    """Rewrites a document with other fields and a checksum that fits, as an attacker would."""
    found = json.loads(path.read_text())
    kind = found.pop("format")
    del found["version"], found["checksum"]
    path.write_bytes(write_document(found | changes, kind=kind))


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE], ids=["plain", "passphrase"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_key_reads_back(tmp_path, algorithm, passphrase):
    key, path = make(algorithm), tmp_path / "a.key"
    write_secret_key(path, key, passphrase=passphrase, cost=CHEAP)
    again = read_secret_key(path, passphrase=passphrase)
    assert type(again) is type(key)
    assert again.export() == key.export()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert needs_passphrase(path) is (passphrase is not None)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_public_key_reads_back(tmp_path, algorithm):
    key = make(algorithm).public
    write_public_key(tmp_path / "a.pub", key)
    assert read_public_key(tmp_path / "a.pub") == key


def test_a_file_says_what_it_is(tmp_path):
    key, path = make(), tmp_path / "a.key"
    write_secret_key(path, key)
    found = json.loads(path.read_text())
    assert (found["format"], found["version"]) == ("dpfa-secret-key", 1)
    assert (found["algorithm"], found["key_id"]) == (key.algorithm, key.key_id)
    assert found["created"].endswith("Z")


def test_a_passphrase_hides_the_secret_and_the_default_cost_is_high(tmp_path):
    from dp_flash_attention.crypto.documents import to_text

    key, path = make(), tmp_path / "a.key"
    write_secret_key(path, key, passphrase=PASSPHRASE)
    assert to_text(key.export()) not in path.read_text()
    protection = json.loads(path.read_text())["protection"]
    assert (protection["n"], protection["r"], protection["p"]) == (1 << 17, 8, 1)
    assert read_secret_key(path, passphrase=PASSPHRASE).key_id == key.key_id


def test_nothing_is_written_over(tmp_path):
    key, path = make(), tmp_path / "a.key"
    path.write_text("precious")
    for write in (lambda: write_secret_key(path, key), lambda: write_public_key(path, key.public)):
        with pytest.raises(KeyFileError, match="nothing is written over"):
            write()
    assert path.read_text() == "precious"


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(KeyFileError, match="cannot be written"):
        write_secret_key(tmp_path / "missing" / "a.key", make())


@pytest.mark.skipif(os.name != "posix", reason="a file that is open can be replaced on POSIX alone")
@pytest.mark.parametrize("late", [0o600, 0o644])
def test_the_mode_that_is_checked_is_that_of_the_file_that_was_read(tmp_path, monkeypatch, late):
    """A second look-up of the name could find another file's mode."""
    key, path, other = make(), tmp_path / "a.key", tmp_path / "other"
    write_secret_key(path, key)
    path.chmod(0o600 if late == 0o644 else 0o644)
    other.touch()
    other.chmod(late)
    real = os.open

    def open_and_replace(*arguments, **options):
        descriptor = real(*arguments, **options)
        os.replace(other, path)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_replace)
    if late == 0o644:
        assert read_secret_key(path).public == key.public
    else:
        with pytest.raises(KeyFileError, match="chmod 600"):
            read_secret_key(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_may_read_is_refused(tmp_path, mode):
    path = tmp_path / "a.key"
    write_secret_key(path, make())
    path.chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        read_secret_key(path)


def test_a_wrong_missing_or_needless_passphrase_is_refused(tmp_path):
    path, plain = tmp_path / "a.key", tmp_path / "plain.key"
    write_secret_key(path, make(), passphrase=PASSPHRASE, cost=CHEAP)
    write_secret_key(plain, make())
    with pytest.raises(KeyFileError, match="passphrase is wrong"):
        read_secret_key(path, passphrase=PASSPHRASE + " ")
    with pytest.raises(KeyFileError, match="none was given"):
        read_secret_key(path)
    with pytest.raises(KeyFileError, match="Leave it out"):
        read_secret_key(plain, passphrase=PASSPHRASE)
    with pytest.raises(InvalidInputError, match="at least 12"):
        write_secret_key(tmp_path / "b.key", make(), passphrase="short")
    assert not (tmp_path / "b.key").exists()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_altered_byte_of_a_file_is_noticed(tmp_path, data):
    passphrase = data.draw(st.sampled_from([None, PASSPHRASE]))
    path = tmp_path / f"{passphrase is None}.key"
    if not path.exists():
        write_secret_key(path, make(), passphrase=passphrase, cost=CHEAP)
        (tmp_path / "altered.key").touch(mode=0o600)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "altered.key").write_bytes(bytes(content))
    with pytest.raises(KeyFileError) as caught:
        read_secret_key(tmp_path / "altered.key", passphrase=passphrase)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("created", "1999-01-01T00:00:00Z"),
        ("key_id", "0" * 32),
        ("algorithm", "ed25519_ml_dsa_87"),
        ("algorithm", "rsa"),
        ("algorithm", ["list"]),
        ("public_key", "AAAA"),
        ("public_key", 3),
        ("secret", "AAAA"),
        ("secret", None),
        ("protection", {"kind": "none"}),
        ("protection", {"kind": "rot13"}),
        ("protection", "none"),
        ("protection", {"kind": "scrypt+aes-256-gcm", "n": 1 << 40, "r": 8, "p": 1, "salt": "", "nonce": ""}),
        ("protection", {"kind": "scrypt+aes-256-gcm", "n": 3, "r": 8, "p": 1, "salt": "", "nonce": ""}),
        ("protection", {"kind": "scrypt+aes-256-gcm", "n": 2, "r": "8", "p": 1, "salt": "", "nonce": ""}),
        ("protection", {"kind": "scrypt+aes-256-gcm", "n": 2, "r": 8, "p": 1, "salt": "", "nonce": ""}),
    ],
)
def test_an_attackers_change_with_a_fitting_checksum_is_noticed(tmp_path, field, value):
    path = tmp_path / "a.key"
    write_secret_key(path, make(), passphrase=PASSPHRASE, cost=CHEAP)
    altered_document(path, **{field: value})
    with pytest.raises(KeyFileError):
        read_secret_key(path, passphrase=PASSPHRASE)


@pytest.mark.parametrize(
    ("field", "value"),
    [("key_id", "0" * 32), ("algorithm", "x25519_ml_kem_768"), ("algorithm", "rsa"), ("public_key", "AAAA")],
)
def test_a_public_key_file_that_contradicts_itself_is_refused(tmp_path, field, value):
    write_public_key(tmp_path / "a.pub", make().public)
    altered_document(tmp_path / "a.pub", **{field: value})
    with pytest.raises(KeyFileError):
        read_public_key(tmp_path / "a.pub")


def test_another_keys_public_half_is_noticed(tmp_path):
    one, other = make(), make()
    write_secret_key(tmp_path / "a.key", one)
    write_public_key(tmp_path / "b.pub", other.public)
    found = json.loads((tmp_path / "b.pub").read_text())
    altered_document(tmp_path / "a.key", public_key=found["public_key"], key_id=found["key_id"])
    with pytest.raises(KeyFileError, match="belongs to another public key"):
        read_secret_key(tmp_path / "a.key")


def test_a_secret_of_another_length_is_noticed(tmp_path):
    write_secret_key(tmp_path / "a.key", make())
    altered_document(tmp_path / "a.key", secret="AAAA")
    with pytest.raises(KeyFileError, match="damaged"):
        read_secret_key(tmp_path / "a.key")


def test_a_passphrase_is_the_same_however_its_letters_are_composed(tmp_path):
    path = tmp_path / "a.key"
    write_secret_key(path, make(), passphrase="gr\u00fcne w\u00f6rter", cost=CHEAP)
    read_secret_key(path, passphrase="gru\u0308ne wo\u0308rter")


def test_foreign_files_are_named(tmp_path):
    key = make()
    write_secret_key(tmp_path / "a.key", key)
    write_public_key(tmp_path / "a.pub", key.public)
    (tmp_path / "x.pem").write_text("-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2Vw\n")
    with pytest.raises(KeyFileError, match="is a dpfa-public-key file"):
        read_secret_key(tmp_path / "a.pub")
    with pytest.raises(KeyFileError, match="is a dpfa-secret-key file"):
        read_public_key(tmp_path / "a.key")
    for read in (read_secret_key, read_public_key):
        with pytest.raises(KeyFileError, match=r"x\.pem is not a dpfa"):
            read(tmp_path / "x.pem")
        with pytest.raises(KeyFileError, match="cannot be read"):
            read(tmp_path / "missing")


@pytest.mark.parametrize("cost", [{"n": 1}, {"n": 3}, {"n": 1 << 24}, {"p": 17}, {"r": 0}, {"n": 2.0}])
def test_costs_out_of_bounds_are_refused(cost):
    with pytest.raises(InvalidInputError, match="scrypt cost"):
        ScryptCost(**cost)
