"""``dpfa certificate``: what a user types, sees and gets back."""

import json
import warnings
from getpass import GetPassWarning

import pytest
import typer.main

from dp_flash_attention.cli.certificate import certificate
from dp_flash_attention.cli.main import main

# Options are a promise: a change here is one of the changelog's.
OPTIONS = {
    "check": ["as_json", "certificate_only", "directory"],
    "keygen": ["algorithm", "key", "no_passphrase", "passphrase_file", "purpose"],
    "rotate": ["key", "new", "new_passphrase_file", "no_passphrase", "passphrase_file"],
    "trust": ["add", "file", "name", "revoke", "succession"],
    "sign": ["directory", "key", "passphrase_file"],
    "verify": ["as_json", "certificate_only", "directory", "key", "public_extra", "trust_file"],
    "seal": ["directory", "out", "to"],
    "open": ["key", "out", "passphrase_file", "sealed"],
}
FLAGS = {
    "--for", "--algorithm", "--passphrase-file", "--no-passphrase", "--key", "--new-passphrase-file", "--add",
    "--name", "--succession", "--revoke", "--trust", "--certificate-only", "--json", "--to", "--out", "--public-extra",
}  # fmt: skip
STATEMENT = (
    "The covered files together are (4, 1e-05)-differentially private under adding or removing one record."
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def dpfa(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["certificate", *map(str, arguments)])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


@pytest.fixture
def run(certified_run, tmp_path):
    return certified_run(tmp_path / "run")


def alter(run, change):
    content = json.loads((run / "certificate.json").read_text())
    change(content)
    (run / "certificate.json").write_text(json.dumps(content))


@pytest.fixture
def alice(dpfa, tmp_path):
    assert dpfa("keygen", "alice.key", "--no-passphrase")[0] == 0
    return tmp_path / "alice.key"


def refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("dpfa: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    return True


def test_the_options_are_what_they_were():
    commands = typer.main.get_command(certificate).commands
    assert {
        name: sorted(option.name for option in command.params) for name, command in commands.items()
    } == OPTIONS
    given = {flag for command in commands.values() for option in command.params for flag in option.opts}
    assert {flag for flag in given if flag.startswith("--")} == FLAGS


def test_sign_and_verify(dpfa, run, alice):
    code, out, _ = dpfa("sign", run, "--key", alice)
    assert code == 0
    assert "covers certificate.json, evaluation.json, model.safetensors" in out
    code, out, err = dpfa("verify", run, "--key", "alice.key.pub")
    assert (code, err) == (0, "")
    assert "As signed: certificate.json, evaluation.json, model.safetensors" in out
    assert "rows hold" in out
    assert f"It claims: {STATEMENT}" in out


def test_verify_answers_in_json(dpfa, run, alice):
    dpfa("sign", run, "--key", alice)
    (run / "later.txt").touch()
    code, out, _ = dpfa("verify", run, "--key", "alice.key.pub", "--json", "--public-extra", "later.txt")
    found = json.loads(out)
    assert code == 0
    assert found["verified"] is True
    assert found["files"] == ["evaluation.json", "model.safetensors", "report.html", "run.json"]
    assert found["unsigned"] == ["later.txt"]
    assert found["claim"]["epsilon"] == 4.0
    assert all(row["holds"] for row in found["rows"])
    assert {row["standing"] for row in found["rows"]} == {"certified", "assumed", "estimated", "file"}


def test_check_needs_no_key_and_says_that_it_looked_at_no_signature(dpfa, run):
    code, out, err = dpfa("check", run)
    assert (code, err) == (0, "")
    for words in ("certified", "assumed", "estimated", "Signature: not looked at", f"It claims: {STATEMENT}"):
        assert words in out
    assert "Real numbers: the float32 rounding" in out
    found = json.loads(dpfa("check", run, "--json")[1])
    assert (found["holds"], found["signature"]) == (True, "not looked at")
    assert "verified" not in found


def test_check_shows_what_is_wrong_and_ends_with_one(dpfa, run):
    alter(run, lambda content: content["claim"].update(epsilon=3.96))
    code, out, _ = dpfa("check", run)
    assert code == 1
    assert "WRONG total: ε: stated 3.96, computed again 4" in out
    assert "do not rely on this certificate" in out
    assert "another version" not in out
    code, out, _ = dpfa("check", run, "--json")
    assert (code, json.loads(out)["holds"]) == (1, False)


def test_check_says_that_another_version_may_be_why_a_row_is_wrong(dpfa, run):
    alter(run, lambda content: content["versions"].update({"dp-accounting": "0.1"}))
    code, out, _ = dpfa("check", run, "--certificate-only")
    assert (code, "another version" in out) == (0, False)
    alter(run, lambda content: content["certified"].update(training_epsilon_by_pld=3.0))
    code, out, _ = dpfa("check", run, "--certificate-only")
    assert code == 1
    assert "another version of dp-accounting; here is" in out


def test_check_of_a_certificate_alone(dpfa, run):
    for path in run.iterdir():
        if path.name != "certificate.json":
            path.unlink()
    assert dpfa("check", run)[0] == 1
    assert dpfa("check", run, "--certificate-only")[0] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(format=9), "format is 9"),
        (lambda content: content.update(note="trust me"), "note"),
        (lambda content: content["mechanisms"][0]["parameters"].update(num_steps=10**308), "num_steps"),
        (lambda content: content["mechanisms"][0]["parameters"].update(noise_multiplier=-1), "noise_multiplier"),
    ],
)  # fmt: skip
def test_what_is_no_certificate_of_this_format_is_one_line_and_exit_code_two(dpfa, run, alice, change, words):
    alter(run, change)
    assert refused(dpfa("check", run), words)
    dpfa("sign", run, "--key", alice)
    assert refused(dpfa("verify", run, "--key", "alice.key.pub"), words)


@pytest.mark.parametrize(
    "lie",
    [
        lambda content: content["claim"].update(epsilon=3.96),
        lambda content: content["mechanisms"][0]["parameters"].update(num_steps=39),
        lambda content: content["mechanisms"][0]["parameters"].update(noise_multiplier=1.01),
        lambda content: content["mechanisms"][0]["parameters"].update(sampling_prob=0.0499),
        lambda content: content["claim"].update(delta=1e-6),
        lambda content: content["assumed"].pop(0),
    ],
    ids=["ε understated by 1 %", "steps", "noise", "sampling", "δ", "assumption"],
)
def test_a_lie_is_found_although_the_right_key_signed_it(dpfa, run, alice, lie):
    alter(run, lie)
    assert dpfa("sign", run, "--key", alice)[0] == 0
    code, out, _ = dpfa("verify", run, "--key", "alice.key.pub")
    assert code == 1
    assert "do not rely on this certificate" in out
    assert "Signed by alice.key.pub" in out, "who lied is told"
    code, out, _ = dpfa("verify", run, "--key", "alice.key.pub", "--json")
    assert (code, json.loads(out)["verified"]) == (1, False)


def test_unlisted_files_are_exit_code_one(dpfa, run, alice):
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "1").touch()
    assert "checkpoints/1" in dpfa("sign", run, "--key", alice)[1]
    (run / "checkpoints" / "2").touch()
    code, out, err = dpfa("verify", run, "--key", "alice.key.pub")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "did not sign, so it may be anyone's: checkpoints/2." in err
    code, out, err = dpfa("verify", run, "--key", "alice.key.pub", "--json")
    assert (code, json.loads(out)) == (1, {"verified": False, "unlisted": ["checkpoints/2"]})
    code, out, _ = dpfa("verify", run, "--key", "alice.key.pub", "--public-extra", "checkpoints")
    assert code == 0
    assert "Not signed, so it may be anyone's: checkpoints/2" in out


def test_an_unsigned_altered_or_foreign_certificate_is_one_line_and_exit_code_two(dpfa, run, alice):
    verify = ("verify", run, "--key", "alice.key.pub")
    assert refused(dpfa(*verify), "is not signed")
    dpfa("sign", run, "--key", alice)
    (run / "model.safetensors").write_bytes(bytes(999) + b"x")
    assert refused(dpfa(*verify), "model.safetensors was altered")
    assert dpfa(*verify, "--certificate-only")[0] == 0
    alter(run, lambda content: content["claim"].update(epsilon=0.5))
    assert refused(dpfa(*verify, "--certificate-only"), "certificate.json was altered")
    dpfa("keygen", "mallory.key", "--no-passphrase")
    assert refused(dpfa("verify", run, "--key", "mallory.key.pub"), "not trusted")


def test_a_run_travels_sealed(dpfa, run, alice, tmp_path):
    dpfa("keygen", "bob.key", "--for", "seal", "--no-passphrase")
    dpfa("keygen", "eve.key", "--for", "seal", "--algorithm", "x25519_ml_kem_1024", "--no-passphrase")
    assert refused(dpfa("seal", run, "--to", "bob.key.pub", "--out", "s"), "Sign it first")
    dpfa("sign", run, "--key", alice)
    assert dpfa("seal", run, "--to", "bob.key.pub", "--out", "s")[0] == 0
    assert refused(dpfa("open", "s", "--key", "eve.key", "--out", "o"), "not sealed to key")
    code, out, _ = dpfa("open", "s", "--key", "bob.key", "--out", "o")
    assert code == 0
    assert "Not verified yet" in out
    assert dpfa("verify", "o", "--key", "alice.key.pub")[0] == 0
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:-1])
    assert refused(dpfa("open", "s", "--key", "bob.key", "--out", "o2"), "damaged")
    assert not (tmp_path / "o2").exists()


def test_keys_rotate_and_trust_follows(dpfa, run, alice):
    dpfa("sign", run, "--key", alice)
    assert "active    Alice" in dpfa("trust", "t.json", "--add", "alice.key.pub", "--name", "Alice")[1]
    assert dpfa("rotate", "new.key", "--key", alice, "--no-passphrase")[0] == 0
    code, out, _ = dpfa("trust", "t.json", "--succession", "new.key.succession")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == ["retired", "active"]
    assert "Alice (retired)" in dpfa("verify", run, "--trust", "t.json")[1]
    old = out.split()[0]
    dpfa("trust", "t.json", "--revoke", old)
    assert refused(dpfa("verify", run, "--trust", "t.json"), "revoked")
    assert refused(dpfa("trust", "t.json", "--succession", "new.key.succession"), "revoked")
    (run / "certificate.json.sig").unlink()
    dpfa("sign", run, "--key", "new.key")
    assert dpfa("verify", run, "--trust", "t.json")[0] == 0


def test_a_passphrase_comes_from_a_file(dpfa, run, tmp_path):
    (tmp_path / "pass").write_text("several quite random words\nand a remark\n")
    (tmp_path / "wrong").write_text("several quite random worlds\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\n")
    assert refused(dpfa("keygen", "a.key", "--passphrase-file", "bytes"), "UTF-8")
    assert refused(dpfa("keygen", "a.key", "--passphrase-file", "short"), "at least 12")
    assert refused(dpfa("keygen", "a.key", "--passphrase-file", "empty"), "not empty")
    assert not (tmp_path / "a.key.pub").exists()
    assert dpfa("keygen", "a.key", "--passphrase-file", "pass")[0] == 0
    sign = ("sign", run, "--key", "a.key", "--passphrase-file")
    assert refused(dpfa(*sign, "wrong"), "passphrase is wrong")
    assert dpfa(*sign, "pass")[0] == 0


def test_a_passphrase_is_asked_for(dpfa, run, monkeypatch):
    asked = []

    def prompt(text, **options):
        asked.append((text, options["hide_input"]))
        return "several quite random words"

    monkeypatch.setattr(typer, "prompt", prompt)
    assert dpfa("keygen", "a.key")[0] == 0
    assert dpfa("sign", run, "--key", "a.key")[0] == 0
    assert asked == [("New passphrase", True), ("Passphrase of a.key", True)]


def test_without_a_terminal_no_passphrase_is_asked_for(dpfa, monkeypatch, tmp_path):
    """It would be shown on the screen, or be the first line of whatever is piped in."""

    def prompt(text, **options):
        warnings.warn("Can not control echo on the terminal.", GetPassWarning, stacklevel=1)

    monkeypatch.setattr(typer, "prompt", prompt)
    assert refused(dpfa("keygen", "a.key"), "--passphrase-file", "--no-passphrase")
    assert not (tmp_path / "a.key").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["keygen", "alice.key"], "a new file"),
        (["keygen", "b.key", "--for", "encrypt"], "one of sign, seal"),
        (["keygen", "b.key", "--algorithm", "rsa"], "ed25519_ml_dsa_65"),
        (["keygen", "b.key", "--for", "seal", "--algorithm", "ed25519_ml_dsa_65"], "x25519_ml_kem_768"),
        (["keygen", "b.key", "--no-passphrase", "--passphrase-file", "x"], "Leave one of them out"),
        (["keygen", "missing/b.key", "--no-passphrase"], "cannot be written"),
        (["rotate", "alice.key", "--key", "alice.key", "--no-passphrase"], "a new file"),
        (["sign", "run", "--key", "missing.key"], "missing.key cannot be read"),
        (["sign", "run", "--key", "alice.key.pub"], "dpfa-public-key"),
        (["sign", "run", "--key", "run/certificate.json"], "not a dpfa-secret-key file"),
        (["sign", "missing", "--key", "alice.key"], "finished run"),
        (["verify", "run"], "given, or --trust"),
        (["verify", "run"], "dpfa certificate check"),
        (["verify", "run", "--key", "alice.key.pub", "--trust", "t.json"], "not both"),
        (["verify", "run", "--key", "alice.key"], "dpfa-secret-key"),
        (["verify", "run", "--trust", "missing.json"], "cannot be read"),
        (["seal", "run", "--to", "alice.key.pub", "--out", "s"], "keygen --for seal"),
        (["open", "run/model.safetensors", "--key", "alice.key", "--out", "o"], "keygen --for seal"),
        (["trust", "t.json"], "cannot be read"),
        (["trust", "t.json", "--add", "alice.key.pub"], "--add with --name"),
        (["trust", "t.json", "--add", "a", "--name", "b", "--revoke", "c"], "one change at a time"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_made(dpfa, run, alice, tmp_path, arguments, words):
    before = sorted(tmp_path.iterdir())
    assert refused(dpfa(*arguments), words)
    assert sorted(tmp_path.iterdir()) == before


def test_a_trust_file_is_not_made_by_a_wrong_key(dpfa, tmp_path):
    dpfa("keygen", "bob.key", "--for", "seal", "--no-passphrase")
    assert refused(dpfa("trust", "t.json", "--add", "bob.key.pub", "--name", "Bob"), "keygen --for sign")
    assert not (tmp_path / "t.json").exists()


def test_a_foreign_file_is_no_sealed_run(dpfa, run):
    dpfa("keygen", "bob.key", "--for", "seal", "--no-passphrase")
    assert refused(
        dpfa("open", run / "model.safetensors", "--key", "bob.key", "--out", "o"), "not a sealed file"
    )
    assert refused(dpfa("open", "missing", "--key", "bob.key", "--out", "o"), "missing")


def test_nothing_that_a_run_holds_steers_the_terminal(dpfa, run, alice):
    """A claim or a file's name could otherwise erase what was printed, and print a better signature."""
    evil = "good\x1b[2K[/green]\nSigned by Bob\r"

    def steer(content):
        content["claim"]["statement"] = evil
        content["assumed"].append(evil)
        content["estimated"][evil] = 1.0
        content["files"][evil] = content["files"]["model.safetensors"]

    alter(run, steer)
    dpfa("sign", run, "--key", alice)
    (run / "extra").mkdir()
    (run / "extra" / "a\x1b[2K\nSigned by Bob").touch()
    code, out, err = dpfa("verify", run, "--key", "alice.key.pub", "--public-extra", "extra")
    assert (code, err) == (1, "")
    assert "\x1b" not in out
    assert "\nSigned by Bob" not in out
    code, _, err = dpfa("verify", run, "--key", "alice.key.pub")
    assert (code, err.count("\n")) == (1, 1)
    assert "\x1b" not in err
