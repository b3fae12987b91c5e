"""Every file of checks is a subject, and a report holds only if something was checked."""

from pathlib import Path

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum import checks
from dp_flash_attention.quantum.evidence import CheckResult, Evidence
from dp_flash_attention.quantum.verification import VerificationReport, checks_of, subjects


def result(holds):
    row = Evidence(name="x", claim="x is 1", measured="1", bound="1", holds=holds)
    return CheckResult(name="x", rows=(row,), seconds=0.5)


def test_every_file_is_a_subject():
    files = {path.stem for path in Path(checks.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == set(subjects())
    assert {"tables", "ciphers", "entropy", "statistics", "timing"} <= files
    for deep in (False, True):
        named = {name.partition(":")[0] for name, _ in checks_of(deep=deep)}
        assert named == files


def test_chosen_subjects_only():
    assert {name.partition(":")[0] for name, _ in checks_of(["tables", "tables"])} == {"tables"}


@pytest.mark.parametrize("chosen", [[], ["magic"], ["tables", ""]])
def test_an_unknown_subject_is_refused(chosen):
    with pytest.raises(InvalidInputError, match="subject"):
        checks_of(chosen)


def test_a_report_holds_if_everything_does_and_there_is_something():
    assert VerificationReport(results=(result(True), result(True)), deep=False).holds
    assert not VerificationReport(results=(result(True), result(False)), deep=False).holds
    assert not VerificationReport(results=(), deep=False).holds


def test_the_form_of_the_json():
    found = VerificationReport(results=(result(False),), deep=True).to_dict()
    assert found == {
        "holds": False,
        "deep": True,
        "seconds": 0.5,
        "checks": [
            {
                "name": "x",
                "holds": False,
                "seconds": 0.5,
                "evidence": [
                    {
                        "name": "x",
                        "claim": "x is 1",
                        "measured": "1",
                        "bound": "1",
                        "holds": False,
                        "basis": "measured",
                    }
                ],
            }
        ],
    }
