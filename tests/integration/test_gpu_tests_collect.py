"""The tests for a device can be collected on a machine that has little more than torch and triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

COLLECT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"cryptography", "dp_accounting", "hypothesis"}:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
import pytest
# The conftest needs hypothesis; these tests do not.
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:xdist",
                      "--noconftest", "--collect-only", "-m", "gpu", "tests/gpu"]))
"""


def test_they_are_collected_without_cryptography_and_dp_accounting():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "src")}
    found = subprocess.run(
        [sys.executable, "-c", COLLECT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    for name in ("test_norms_are_those_of_float64", "test_gradients_are_the_reference_s_every_time"):
        assert name in found.stdout
