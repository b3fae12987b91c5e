"""The benchmark's own path runs: our kernel by name under the interpreter, and the script without cryptography and rich."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from dp_flash_attention.attention.backends import registry
from dp_flash_attention.attention.kernels.backend import TritonBackend

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "attention.py"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds its folder
    spec = importlib.util.spec_from_file_location("attention_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "attention_benchmark", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backward", [False, True])
def test_our_kernel_is_measured_by_name_forward_and_backward(benchmark, backward, monkeypatch):
    monkeypatch.setattr(registry, "_triton", TritonBackend)
    ran = []
    release = TritonBackend.release
    monkeypatch.setattr(TritonBackend, "release", lambda self, call: ran.append(1) or release(self, call))
    case = benchmark.Case(seq_len=12, width=16, causal=True, num_heads=1, noise="fast")
    found, bars = benchmark.measure(case, repeats=1, backward=backward, cpu_time=True, backends=["triton"])
    assert len(ran) >= 2  # one to warm up; "auto" may have timed it too
    what = "forward and backward" if backward else "forward"
    assert [row.name for row in found] == [f"{who}, {what}" for who in ("torch SDPA", "ours", "ours, triton")]
    assert all(row.value > 0 and row.config["noise"] == "fast" for row in found)
    assert bars == []


def test_the_script_runs_where_there_is_little_more_than_torch():
    blocked = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"cryptography", "dp_accounting", "hypothesis", "rich"}:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    options = ["--device", "cpu", "--lengths", "16", "--widths", "16", "--repeats", "1", "--json"]

    def run(*more):
        return subprocess.run(
            [sys.executable, "-c", blocked, str(SCRIPT), *options, *more],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("--noise", "fast")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 8  # two kernels, causal or not, forward and both
    assert {row["config"]["noise"] for row in rows} == {"fast"}
    # Nothing switches to the noise that can be made.
    assert "cryptography" in run().stderr


def test_a_gpu_that_is_not_there_is_an_error():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cuda"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr
