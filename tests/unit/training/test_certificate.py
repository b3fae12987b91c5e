from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dp_flash_attention.core.errors import RunStateError
from dp_flash_attention.training import PrivacyPlan
from dp_flash_attention.training.certificate import Certificate, build_certificate


def built(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "plan": PrivacyPlan(
            epsilon=60.0,
            delta=1e-3,
            sampling_prob=0.2,
            expected_batch_size=10.0,
            num_steps=5,
            l2_clip_norm=0.5,
            noise_multiplier=1.0,
            noise=changes.pop("noise", "secure"),
            clipping=changes.pop("clipping", "flat"),
        ),
        "count_release": {
            "mechanism": "discrete Laplace",
            "epsilon": 0.01,
            "scale": 100.0,
            "released_count": 50,
        },
        "holdout_prob": 0.1,
        "evaluation": None,
        "total_epsilon": 60.01,
        "task": {"name": "a task", "classes": ("no", "yes")},
        "public_statements": ["The columns are public."],
        "hyper_parameters": {"learning_rate": 0.1},
        "uses_test_key": False,
        "files": {"model.safetensors": {"sha256": "0" * 64, "size": 1}},
    }
    return build_certificate(**(values | changes)).to_dict()


def test_the_claim_and_its_five_statements() -> None:
    content = built()
    assert content["claim"]["holds"] is True
    assert "(60.01, 0.001)-differentially private" in content["claim"]["statement"]
    training = next(part for part in content["mechanisms"] if part["name"] == "training")
    assert set(training["guarantee"]) == {
        "neighboring_relation",
        "privacy_unit",
        "sensitivity",
        "public",
        "theorem",
        "source",
    }
    certified = content["certified"]
    assert certified["training_epsilon_by_pld"] <= certified["training_epsilon_by_rdp_as_cross_check"]
    assert certified["training_epsilon_by_pld"] <= training["epsilon"]
    assert content == json.loads(json.dumps(content)), "JSON values only"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count_release": None}, "number of records is public"),
        ({"noise": "fast"}, "statistical only (Philox)"),
        ({}, "The columns are public."),
    ],
)
def test_what_is_taken_for_granted_is_said(changes: dict[str, Any], words: str) -> None:
    assert any(words in line for line in built(**changes)["assumed"])


@pytest.mark.parametrize(
    ("clipping", "words"), [("flat", "one norm over all"), ("per_layer", "one norm for each group")]
)
def test_what_is_clipped_together_is_certified(clipping: str, words: str) -> None:
    content = built(clipping=clipping)
    certified = content["certified"]
    assert certified["clipping"] == clipping
    assert words in certified["method"]
    assert certified["l2_sensitivity_of_a_step"] == 0.5
    training = next(part for part in content["mechanisms"] if part["name"] == "training")
    assert training["parameters"]["clipping"] == clipping
    assert PrivacyPlan.from_dict(training["parameters"]).clipping == clipping


def test_what_is_not_assumed_is_not_said() -> None:
    lines = " ".join(built()["assumed"])
    assert "Philox" not in lines
    assert "number of records is public" not in lines


def test_with_the_renyi_accountant_the_field_of_the_other_holds_the_other_s_figure() -> None:
    plan = PrivacyPlan(
        epsilon=60.0, delta=1e-3, sampling_prob=0.2, expected_batch_size=10.0, num_steps=5, l2_clip_norm=0.5,
        noise_multiplier=1.0, accountant="rdp",
    )  # fmt: skip
    assert built(plan=plan)["certified"] == built()["certified"]


def test_a_test_key_certifies_nothing() -> None:
    content = built(uses_test_key=True)
    assert content["claim"]["holds"] is False
    assert content["certified"] == {}


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"claim": {}}', '{"claim": 3}', "\xff"])
def test_another_file_is_not_taken_for_a_certificate(tmp_path: Path, text: str) -> None:
    path = tmp_path / "certificate.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunStateError, match="not a certificate"):
        Certificate.read(path)


def test_a_missing_certificate_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RunStateError):
        Certificate.read(tmp_path / "none.json")
