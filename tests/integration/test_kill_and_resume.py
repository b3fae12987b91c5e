"""A run that is killed at any moment ends as an unbroken one, and no noise meets two different sums."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("kill_and_resume.py")
NUM_STEPS, NUM_PARAMETERS = 12, 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    directory = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(directory), "7"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    result: dict[str, dict[str, object]] = json.loads(done.stdout)
    return result


def test_the_children_really_died(runs: dict[str, dict[str, object]]) -> None:
    for name, run in runs.items():
        endings = run["endings"]
        assert isinstance(endings, list)
        assert "failed" not in endings, name
        assert endings[-1] == "done", name
    deaths = sum(str(run["endings"]).count("killed") for run in runs.values())
    assert deaths >= 30
    repeated = sum(int(str(run["draws"])) - NUM_STEPS * NUM_PARAMETERS for run in runs.values())
    assert repeated > 0, "some deaths fell between a step and its checkpoint"


def test_killed_runs_end_with_the_parameters_of_the_unbroken_one(runs: dict[str, dict[str, object]]) -> None:
    assert {run["model"] for run in runs.values()} == {runs["unbroken"]["model"]}


def test_no_noise_is_added_to_two_different_sums(runs: dict[str, dict[str, object]]) -> None:
    for name, run in runs.items():
        assert run["positions"] == NUM_STEPS * NUM_PARAMETERS, name
        assert run["reused"] == 0, name


def test_nothing_is_left_over(runs: dict[str, dict[str, object]]) -> None:
    for name, run in runs.items():
        assert run["secrets_left"] is False, name
        assert run["temporaries"] == [], name
