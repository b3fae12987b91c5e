"""Trust and rotation: who may appoint whom, and what the old keys are still good for."""

import json
from pathlib import Path

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto import (
    AuthenticationError,
    KeyFileError,
    KeyState,
    SigningKey,
    TrustFile,
    make_succession,
)
from dp_flash_attention.crypto.documents import canonical, to_text, write_document

OLD, NEW, OTHER = (SigningKey("ed25519_ml_dsa_65", bytes([number]) * 64) for number in (1, 2, 3))
WHERE = Path("new.succession")


@pytest.fixture
def trust():
    made = TrustFile()
    made.add(OLD.public, name="Alice")
    return made


def rewritten(statement, **changes):
    found = json.loads(statement)
    kind = found.pop("format")
    del found["version"], found["checksum"]
    return write_document(found | changes, kind=kind)


def test_a_trust_file_reads_back(tmp_path, trust):
    trust.succeed(make_succession(OLD, NEW), where=WHERE)
    trust.add(OTHER.public, name="Bob")
    trust.revoke(OTHER.key_id)
    trust.write(tmp_path / "trusted.json")
    assert TrustFile.read(tmp_path / "trusted.json").keys == trust.keys


def test_a_succession_retires_the_old_key_and_trusts_the_new_one(trust):
    entry = trust.succeed(make_succession(OLD, NEW), where=WHERE)
    assert (entry.key, entry.name, entry.state) == (NEW.public, "Alice", KeyState.ACTIVE)
    old = trust.find(OLD.key_id)
    assert (old.state, old.successor) == (KeyState.RETIRED, NEW.key_id)


def test_a_key_appoints_one_successor(trust):
    trust.succeed(make_succession(OLD, NEW), where=WHERE)
    with pytest.raises(AuthenticationError, match="retired"):
        trust.succeed(make_succession(OLD, OTHER), where=WHERE)
    assert len(trust.keys) == 2


def test_successions_chain(trust):
    trust.succeed(make_succession(OLD, NEW), where=WHERE)
    trust.succeed(make_succession(NEW, OTHER), where=WHERE)
    assert [entry.state for entry in trust.keys] == ["retired", "retired", "active"]


def test_an_unknown_or_revoked_key_appoints_nobody(trust):
    with pytest.raises(AuthenticationError, match="not in the trust file"):
        trust.succeed(make_succession(OTHER, NEW), where=WHERE)
    trust.revoke(OLD.key_id)
    with pytest.raises(AuthenticationError, match="revoked"):
        trust.succeed(make_succession(OLD, NEW), where=WHERE)
    assert len(trust.keys) == 1


def test_a_retired_key_does_not_come_back(trust):
    trust.succeed(make_succession(OLD, NEW), where=WHERE)
    with pytest.raises(AuthenticationError, match="known already"):
        trust.succeed(make_succession(NEW, OLD), where=WHERE)
    with pytest.raises(InvalidInputError, match="retired here"):
        trust.add(OLD.public, name="Alice")


def described(key):
    return {
        "algorithm": key.algorithm,
        "key_id": key.key_id,
        "public_key": to_text(key.public.public),
    }


@pytest.mark.parametrize("forged", ["old", "new"])
def test_both_keys_have_to_sign(trust, forged):
    # Mallory wants her key in (and cannot sign for the old one), or binds a key that she does not hold.
    body = {"old": described(OLD), "new": described(NEW), "created": "2026-01-01T00:00:00Z"}
    signers = {"old": OLD, "new": NEW} | {forged: OTHER}
    signed = canonical(body)
    signatures = {
        f"{role}_signature": to_text(key.sign(signed, context=b"dpfa.succession.v1"))
        for role, key in signers.items()
    }
    with pytest.raises(AuthenticationError, match="signature"):
        trust.succeed(write_document({**body, **signatures}, kind="dpfa-succession"), where=WHERE)
    assert [entry.state for entry in trust.keys] == ["active"]


@pytest.mark.parametrize("field", ["old", "new", "created", "old_signature", "new_signature"])
def test_any_altered_field_is_noticed(trust, field):
    statement = make_succession(OLD, NEW)
    changes = {
        "old": described(OTHER),
        "new": described(OTHER),
        "created": "2020-01-01T00:00:00Z",
        "old_signature": to_text(bytes(3373)),
        "new_signature": to_text(bytes(3373)),
    }
    with pytest.raises(AuthenticationError):
        trust.succeed(rewritten(statement, **{field: changes[field]}), where=WHERE)
    assert [entry.state for entry in trust.keys] == ["active"]


@pytest.mark.parametrize(
    "key",
    [
        {},
        "text",
        described(NEW) | {"key_id": "0" * 32},
        described(NEW) | {"algorithm": "rsa"},
        described(NEW) | {"x": 1},
    ],
)
def test_a_key_that_is_not_whole_is_damage(trust, key):
    with pytest.raises(KeyFileError, match="damaged"):
        trust.succeed(rewritten(make_succession(OLD, NEW), new=key), where=WHERE)


def test_a_key_does_not_succeed_itself():
    with pytest.raises(InvalidInputError, match="another key"):
        make_succession(OLD, OLD)


def test_unknown_keys_and_revoked_keys_do_not_count(trust):
    with pytest.raises(AuthenticationError, match="not trusted"):
        trust.find(NEW.key_id)
    trust.revoke(OLD.key_id)
    with pytest.raises(AuthenticationError, match="revoked"):
        trust.find(OLD.key_id)
    with pytest.raises(InvalidInputError, match="32 digits"):
        trust.revoke("1234")


def test_damaged_and_foreign_trust_files_are_named(tmp_path, trust):
    path = tmp_path / "trusted.json"
    trust.write(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Alice", b"Alicf"))
    with pytest.raises(KeyFileError, match="damaged"):
        TrustFile.read(path)
    path.write_bytes(make_succession(OLD, NEW))
    with pytest.raises(KeyFileError, match="dpfa-succession file"):
        TrustFile.read(path)
    for keys in ("text", [1], [{"key": described(OLD)}], [{"key": {"key_id": 1}}], None):
        path.write_bytes(write_document({"keys": keys}, kind="dpfa-trust"))
        with pytest.raises(KeyFileError, match="damaged"):
            TrustFile.read(path)
