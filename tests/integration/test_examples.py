"""Every example runs as its own first lines say."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ARGUMENTS = {
    "own_training_loop.py": [["--steps", "2", "--batch", "512"]],
    "private_lookup.py": [["--rows", "20000"], ["--rows", "5000", "--noise", "exact"]],
    "private_retrieval.py": [["--customers", "2000"]],
    "resumable_trainer.py": [
        ["--out", "runs/mine", "--steps", "3"],
        ["--out", "runs/mine", "--resume", "--steps", "3"],
    ],
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)
    assert all(len(path.read_text().splitlines()) < 200 for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs_and_states_its_guarantee(name, tmp_path):
    for arguments in ARGUMENTS[name]:
        done = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLES / name, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr
        assert "-DP" in done.stdout
