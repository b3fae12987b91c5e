"""Signed certificates: unsigned, altered and foreign ones are noticed, and so is an altered model."""

import json

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto import (
    AuthenticationError,
    SigningKey,
    TrustFile,
    UnlistedFilesError,
    make_succession,
    sign_certificate,
    verify_certificate,
)
from dp_flash_attention.crypto.documents import canonical, to_text, write_document

ALICE, MALLORY = (SigningKey("ed25519_ml_dsa_65", bytes([number]) * 64) for number in (1, 2))
CERTIFICATE = {
    "format": 1,
    "claim": {"holds": True, "statement": "It is (1, 1e-06)-DP.", "epsilon": 1.0, "delta": 1e-06},
    "mechanisms": [{"name": "training", "parameters": {"noise_multiplier": 1.25, "num_steps": 100}}],
    "assumed": ["ε is what it is"],
}


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    (directory / "diagnostics").mkdir(parents=True)
    (directory / "certificate.json").write_text(json.dumps(CERTIFICATE, indent=2, ensure_ascii=False))
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    (directory / "report.html").write_text("<html>")
    (directory / "diagnostics" / "losses.json").write_text("private")
    (directory / ".lock").touch()
    return directory


@pytest.fixture
def trust():
    made = TrustFile()
    made.add(ALICE.public, name="Alice")
    return made


@pytest.fixture
def signed(run):
    sign_certificate(run, ALICE)
    return run


def paths(value, path=()):
    """Every leaf of JSON values, and how to get there."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*path, key))
    else:
        yield path


def replaced(value, path, new):
    value = json.loads(json.dumps(value))
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return value


def changed(leaf):
    if isinstance(leaf, bool):
        return not leaf
    return leaf + "x" if isinstance(leaf, str) else leaf * 0.5


def test_a_signed_run_verifies(signed, trust):
    found = verify_certificate(signed, trust)
    assert found.certificate == CERTIFICATE
    assert found.signer.key == ALICE.public
    assert found.files == ("model.safetensors", "report.html")
    assert found.unsigned == ("diagnostics/",)
    assert found.signed_at.endswith("Z")


def test_neither_private_folders_nor_hidden_files_are_covered(signed):
    covered = json.loads((signed / "certificate.json.sig").read_text())["files"]
    assert set(covered) == {"model.safetensors", "report.html"}


def test_an_unsigned_certificate_is_said_to_be(run, trust):
    with pytest.raises(AuthenticationError, match="is not signed"):
        verify_certificate(run, trust)


@pytest.mark.parametrize("path", list(paths(CERTIFICATE)), ids=lambda path: ".".join(map(str, path)))
def test_a_change_of_any_value_is_noticed(signed, trust, path):
    leaf = CERTIFICATE
    for key in path:
        leaf = leaf[key]
    altered = replaced(CERTIFICATE, path, changed(leaf))
    (signed / "certificate.json").write_text(json.dumps(altered))
    with pytest.raises(AuthenticationError, match=r"certificate\.json was altered.*Alice"):
        verify_certificate(signed, trust)


@pytest.mark.parametrize(
    "altered",
    [
        CERTIFICATE | {"added": 1},
        {name: value for name, value in CERTIFICATE.items() if name != "assumed"},
        CERTIFICATE | {"format": 1.0},
        CERTIFICATE | {"format": True},
    ],
    ids=["added", "removed", "whole number as fraction", "number as truth"],
)
def test_a_change_of_structure_or_type_is_noticed(signed, trust, altered):
    (signed / "certificate.json").write_text(json.dumps(altered))
    with pytest.raises(AuthenticationError, match="altered"):
        verify_certificate(signed, trust)


def test_a_new_layout_of_the_same_statement_still_verifies(signed, trust):
    (signed / "certificate.json").write_text(json.dumps(CERTIFICATE, sort_keys=True))
    assert verify_certificate(signed, trust).certificate == CERTIFICATE


def test_saying_one_thing_twice_is_refused(signed, trust):
    text = json.dumps(CERTIFICATE)
    (signed / "certificate.json").write_text(text[:-1] + ', "format": 1}')
    with pytest.raises(InvalidInputError, match="twice"):
        verify_certificate(signed, trust)


@pytest.mark.parametrize("name", ["model.safetensors", "report.html"])
def test_an_altered_or_missing_file_is_noticed(signed, trust, name):
    content = bytearray((signed / name).read_bytes())
    content[-1] ^= 1
    (signed / name).write_bytes(bytes(content))
    with pytest.raises(AuthenticationError, match=f"{name} was altered"):
        verify_certificate(signed, trust)
    (signed / name).unlink()
    with pytest.raises(AuthenticationError, match=f"{name} is signed but missing"):
        verify_certificate(signed, trust)
    found = verify_certificate(signed, trust, certificate_only=True)
    assert found.files == ()


def test_a_file_that_became_a_folder_is_missing(signed, trust):
    (signed / "report.html").unlink()
    (signed / "report.html").mkdir()
    with pytest.raises(AuthenticationError, match="missing"):
        verify_certificate(signed, trust)


NESTED = "checkpoints/step-2/state.safetensors"


def nested(run, name=NESTED, content=b"state"):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_bytes(content)
    return run / name


@pytest.fixture
def signed_deeply(run):
    nested(run)
    nested(run, "checkpoints/index.json")
    sign_certificate(run, ALICE)
    return run


def test_files_in_folders_are_covered(signed_deeply, trust):
    found = verify_certificate(signed_deeply, trust)
    assert found.files == ("checkpoints/index.json", NESTED, "model.safetensors", "report.html")
    assert found.unsigned == ("diagnostics/",)


def test_a_nested_file_that_is_altered_removed_or_renamed_is_noticed(signed_deeply, trust):
    path = signed_deeply / NESTED
    path.write_bytes(b"State")
    with pytest.raises(AuthenticationError, match=r"state\.safetensors was altered"):
        verify_certificate(signed_deeply, trust)
    path.write_bytes(b"state")
    verify_certificate(signed_deeply, trust)
    path.rename(path.with_name("other.safetensors"))
    with pytest.raises(AuthenticationError, match="signed but missing"):
        verify_certificate(signed_deeply, trust)
    path.with_name("other.safetensors").rename(path)
    path.parent.rename(path.parent.with_name("step-3"))
    with pytest.raises(AuthenticationError, match="signed but missing"):
        verify_certificate(signed_deeply, trust)


@pytest.mark.parametrize(
    "name",
    [
        "better-model.safetensors",
        "checkpoints/step-3/state.safetensors",
        "checkpoints/.hidden",
        ".hidden",
        "a/diagnostics/b",
    ],
)
def test_a_file_that_came_later_is_refused_unless_it_is_allowed(signed_deeply, trust, name):
    nested(signed_deeply, name)
    with pytest.raises(UnlistedFilesError, match="did not sign") as error:
        verify_certificate(signed_deeply, trust)
    assert error.value.names == (name,)
    for other in ("", "/", ".", "checkpoint", f"{name}x", f"{name}/x"):
        with pytest.raises(UnlistedFilesError):
            verify_certificate(signed_deeply, trust, public_extra=[other])
    assert name in verify_certificate(signed_deeply, trust, public_extra=[name]).unsigned
    assert name in verify_certificate(signed_deeply, trust, certificate_only=True).unsigned


def test_a_folder_that_is_allowed_allows_what_lies_in_it_and_no_alteration(signed_deeply, trust):
    nested(signed_deeply, "checkpoints/step-3/state.safetensors")
    verify_certificate(signed_deeply, trust, public_extra=["checkpoints/"])
    (signed_deeply / NESTED).write_bytes(b"State")
    with pytest.raises(AuthenticationError, match="altered"):
        verify_certificate(signed_deeply, trust, public_extra=["checkpoints"])


def test_no_link_passes_for_a_signed_file(signed_deeply, trust, tmp_path):
    """Not even one to the very same bytes: they may change later, and a link may lead to anything."""
    path = signed_deeply / NESTED
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(AuthenticationError, match="missing"):
        verify_certificate(signed_deeply, trust)
    path.unlink()
    (tmp_path / "outside").rename(path)
    path.parent.rename(tmp_path / "step-2")
    path.parent.symlink_to(tmp_path / "step-2")
    with pytest.raises(AuthenticationError, match="missing"):
        verify_certificate(signed_deeply, trust)


def test_an_added_link_is_unlisted_and_not_followed(signed_deeply, trust, tmp_path):
    (signed_deeply / "more").symlink_to(tmp_path)
    with pytest.raises(UnlistedFilesError) as error:
        verify_certificate(signed_deeply, trust)
    assert error.value.names == ("more",)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "diagnostics/losses.json", ".secrets/key", "a/../b", "a//b", ""]
)
def test_a_trusted_signature_of_what_is_never_signed_is_refused(signed, trust, name):
    """A signer whose program is another one must not make this one read elsewhere, or vouch for private data."""
    fields = rewrite_signature(signed)
    body = {key: value for key, value in fields.items() if key != "signature"}
    body["files"] = {**body["files"], name: {"sha256": "0" * 64, "size": 7}}
    rewrite_signature(
        signed,
        files=body["files"],
        signature=to_text(ALICE.sign(canonical(body), context=b"dpfa.certificate.v1")),
    )
    with pytest.raises(AuthenticationError, match="lists what is never signed"):
        verify_certificate(signed, trust)


def test_a_foreign_signature_is_refused(run, trust):
    sign_certificate(run, MALLORY)
    with pytest.raises(AuthenticationError, match=f"{MALLORY.key_id}, a key that is not trusted"):
        verify_certificate(run, trust)


def rewrite_signature(run, **changes):
    path = run / "certificate.json.sig"
    found = json.loads(path.read_text())
    kind = found.pop("format")
    del found["version"], found["checksum"]
    path.write_bytes(write_document(found | changes, kind=kind))
    return found


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("algorithm", "ed25519_ml_dsa_87"),
        ("key_id", "0" * 32),
        ("signed_at", "2020-01-01T00:00:00Z"),
        ("subject", "other.json"),
        ("canonicalization", "none"),
        ("certificate_sha256", "0" * 64),
        ("files", {}),
        ("signature", "AAAA"),
        ("signature", to_text(bytes(3373))),
        ("signature", 7),
    ],
)
def test_a_change_of_any_field_of_the_signature_is_noticed(signed, trust, field, value):
    rewrite_signature(signed, **{field: value})
    with pytest.raises(AuthenticationError):
        verify_certificate(signed, trust)


def test_a_signature_over_something_else_is_none_of_a_certificate(signed, trust):
    fields = rewrite_signature(signed)
    body = {name: value for name, value in fields.items() if name != "signature"}
    for context in (b"dpfa.succession.v1", b""):
        rewrite_signature(signed, signature=to_text(ALICE.sign(canonical(body), context=context)))
        with pytest.raises(AuthenticationError, match="altered"):
            verify_certificate(signed, trust)


def test_another_runs_signature_does_not_fit(signed, trust, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "certificate.json").write_text(json.dumps(CERTIFICATE | {"run": 2}))
    sign_certificate(other, ALICE)
    (signed / "certificate.json.sig").write_bytes((other / "certificate.json.sig").read_bytes())
    with pytest.raises(AuthenticationError, match="altered"):
        verify_certificate(signed, trust)


def test_every_altered_byte_of_the_signature_file_is_noticed(signed, trust):
    path = signed / "certificate.json.sig"
    content = path.read_bytes()
    for position in range(0, len(content), 61):
        altered = bytearray(content)
        altered[position] ^= 2
        path.write_bytes(bytes(altered))
        with pytest.raises(AuthenticationError):
            verify_certificate(signed, trust)


def test_after_a_rotation_the_old_signature_still_counts_until_it_is_revoked(signed, trust, tmp_path):
    new = SigningKey.generate()
    trust.succeed(make_succession(ALICE, new), where=tmp_path)
    assert verify_certificate(signed, trust).signer.state == "retired"
    trust.revoke(ALICE.key_id)
    with pytest.raises(AuthenticationError, match="revoked"):
        verify_certificate(signed, trust)


def test_a_signature_is_not_written_over(signed):
    before = (signed / "certificate.json.sig").read_bytes()
    with pytest.raises(InvalidInputError, match="not there yet"):
        sign_certificate(signed, MALLORY)
    assert (signed / "certificate.json.sig").read_bytes() == before


@pytest.mark.parametrize("content", [None, "", "text", "[1]", '{"claim": 1}', "{}"])
def test_a_directory_without_a_certificate_is_named(tmp_path, content, trust):
    if content is not None:
        (tmp_path / "certificate.json").write_text(content)
    with pytest.raises(InvalidInputError, match="finished run"):
        sign_certificate(tmp_path, ALICE)
    with pytest.raises(InvalidInputError, match="finished run"):
        verify_certificate(tmp_path, trust)
    assert not (tmp_path / "certificate.json.sig").exists()
