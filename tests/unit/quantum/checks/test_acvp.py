"""NIST's vectors pass, and the checks fail for keys and signatures of another kind."""

import pytest

from dp_flash_attention.crypto.ml_dsa import MlDsa
from dp_flash_attention.quantum.checks import acvp


def rows(check):
    return {row.name: row.holds for row in check()}


def test_nists_vectors_pass():
    assert rows(acvp.key_generation) == {
        f"{name}: NIST's keys": True for name in ("ml_kem_768", "ml_kem_1024", "ml_dsa_65", "ml_dsa_87")
    }
    assert rows(acvp.verification) == {
        f"{name}: NIST's signatures": True for name in ("ml_dsa_65", "ml_dsa_87")
    }


def test_the_vectors_say_where_they_are_from_and_hold_both_verdicts():
    vectors = acvp._vectors()
    assert "usnistgov/ACVP-Server" in vectors["source"]
    assert "17 U.S.C. 105" in vectors["licence"]
    for group in vectors["verification"].values():
        assert [case["passes"] for case in group["cases"]].count(True) == 1
        assert len(group["cases"]) == 4


def test_a_key_generation_of_another_kind_fails(monkeypatch):
    made = MlDsa.public_key
    monkeypatch.setattr(MlDsa, "public_key", lambda self, seed: made(self, bytes(reversed(seed))))
    assert [name for name, holds in rows(acvp.key_generation).items() if not holds] == [
        "ml_dsa_65: NIST's keys",
        "ml_dsa_87: NIST's keys",
    ]


@pytest.mark.parametrize("verdict", [True, False])
def test_a_verifier_that_says_one_thing_only_fails(monkeypatch, verdict):
    monkeypatch.setattr(acvp, "_accepts_internally", lambda *arguments: verdict)
    assert not any(rows(acvp.verification).values())


def test_vectors_that_are_gone_fail(monkeypatch):
    empty = {"key_generation": {name: [] for name in ("ml_kem_768", "ml_kem_1024", "ml_dsa_65", "ml_dsa_87")}}
    monkeypatch.setattr(acvp, "_vectors", lambda: empty)
    assert not any(rows(acvp.key_generation).values())
