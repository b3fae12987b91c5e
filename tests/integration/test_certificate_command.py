"""A real run, signed, sealed, opened and verified by the command; and a run that never heard of keys."""

import json

import pytest

from dp_flash_attention.cli.main import main


@pytest.fixture
def dpfa(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


def test_a_trained_model_is_signed_sealed_opened_and_verified(dpfa, small_table, tmp_path):
    out = tmp_path / "run"
    code, _, err = dpfa(
        "train", "--data", small_table(), "--label", "kind", "--out", out, "--dataset-size", 300,
        "--steps", 2, "--expected-batch-size", 32,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert not list(out.glob("*.sig"))
    alice, bob = tmp_path / "alice.key", tmp_path / "bob.key"
    dpfa("certificate", "keygen", alice, "--algorithm", "ed25519_ml_dsa_87", "--no-passphrase")
    dpfa("certificate", "keygen", bob, "--for", "seal", "--no-passphrase")
    verify = ("certificate", "verify", "--key", f"{alice}.pub")
    assert dpfa(*verify, out)[0] == 2
    assert dpfa("certificate", "sign", out, "--key", alice)[0] == 0
    code, printed, _ = dpfa(*verify, out, "--json")
    found = json.loads(printed)
    assert code == 0
    assert {"model.safetensors", "report.html", "run.json", "evaluation.json"} <= set(found["files"])
    assert any(name.startswith("checkpoints/") for name in found["files"])
    assert not any(name.startswith(("diagnostics", ".")) for name in found["files"])
    assert found["claim"] == json.loads((out / "certificate.json").read_text())["claim"]
    sealed, opened = tmp_path / "sealed", tmp_path / "opened"
    assert dpfa("certificate", "seal", out, "--to", f"{bob}.pub", "--out", sealed)[0] == 0
    assert dpfa("certificate", "open", sealed, "--key", bob, "--out", opened)[0] == 0
    assert not (opened / "diagnostics").exists()
    assert dpfa(*verify, opened)[0] == 0
    model = bytearray((opened / "model.safetensors").read_bytes())
    model[-1] ^= 1
    (opened / "model.safetensors").write_bytes(bytes(model))
    code, printed, err = dpfa(*verify, opened)
    assert (code, printed) == (2, "")
    assert "model.safetensors was altered" in err
