"""The step benchmarks run: on tiny models, where their figures say nothing but their form and their paths do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name: str, *options: object) -> Any:
    """Runs a benchmark with --json, which prints one object and nothing else."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--json", *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# A machine with torch, triton, numpy, scipy, rich and typer alone.
BARE = """
import sys
for name in ("cryptography", "OpenSSL", "dp_accounting", "safetensors", "opacus", "pandas", "transformers", "matplotlib"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv.pop(1))
import train_step
train_step.main()
"""


def test_the_models_of_the_gpu_run_on_a_cpu_by_the_same_code_and_need_no_other_package() -> None:
    options = ["--device", "cpu", "--models", "tiny", "tiny-llama", "tiny-slice", "--lengths", "8"]
    options += ["--repeats", "1", "--dtype", "bfloat16", "--eager", "--time-only", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", BARE, BENCHMARKS, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {(row["name"], row["config"]["name"]): row for row in found["rows"]}
    assert rows.keys() == {
        (mode, model)
        for mode in ("ours", "non-private eager")
        for model in ("tiny", "tiny-llama", "tiny-slice")
    }
    path = rows["ours", "tiny"]["config"]["path"]
    assert path == "eager, bf16 autocast, torch norms, noise fast: cryptography is not installed"
    assert all(row["value"] > 0 for row in rows.values())
    assert {bar["name"] for bar in found["bars"]} >= {"ours / non-private eager, tiny-llama, T=8"}


def test_the_roofline_is_arithmetic() -> None:
    rows = run("roofline")["rows"]
    by = {
        (r["name"], r["config"]["name"][:4], r["config"]["d_model"], r["config"]["seq_len"]): r for r in rows
    }
    # Bound by products: 16 T² d beside 72 T d².
    assert by["gram", "H100", 4096, 1024]["ratio"] == pytest.approx(1 + 16 * 1024 / (72 * 4096))
    assert by["outer", "H100", 4096, 1024]["ratio"] == pytest.approx(4 / 3)
    # Bound by bytes: 12 d² float32 numbers three times, over 3.35 TB/s.
    formed = by["formed", "H100", 768, 512]
    seconds = 72 * 512 * 768**2 / 989e12 + 144 * 768**2 / 3.35e12
    assert formed["value"] == pytest.approx(seconds * 1e6)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_measured_in_both_ways_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "memory.svg"
    found = run("memory", "--lengths", 32, "--no-peers", "--malloc", "map", "--plot", picture)
    kinds = {(row["name"], row["config"]["peak"], row["config"]["malloc"]) for row in found["rows"]}
    modes = ("non-private eager", "ours", "ours two_pass")
    assert kinds == {(mode, kind, "map") for mode in modes for kind in ("live", "resident")}
    assert len(found["bars"]) == 4
    assert picture.read_text().startswith("<?xml")
    # The live peak is the algorithm's and hardly depends on the machine.
    live = {row["name"]: row["value"] for row in found["rows"] if row["config"]["peak"] == "live"}
    assert 0 < live["non-private eager"] <= 1.01 * live["ours"]


def test_the_profile_splits_a_whole_step(tmp_path: Path) -> None:
    picture = tmp_path / "profile.svg"
    found = run("step_profile", "--models", "tiny", "--lengths", 8, "--repeats", 1, "--plot", picture)
    parts = {row["name"]: row["value"] for row in found["rows"]}
    for part in ("forward", "backward", "norms", "weighted gradients", "noise", "optimizer"):
        assert parts[f"ours: {part}"] > 0
    assert parts["non-private eager: norms"] == parts["non-private eager: noise"] == 0
    assert parts["non-private eager: backward"] > 0
    assert picture.read_text().startswith("<?xml")
