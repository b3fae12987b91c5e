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


def test_the_models_of_the_gpu_run_on_a_cpu_by_the_same_code() -> None:
    found = run(
        "train_step",
        *("--device", "cpu", "--models", "tiny", "tiny-llama", "tiny-slice", "--lengths", 8),
        *("--repeats", 1, "--dtype", "bfloat16", "--eager", "--time-only"),
    )
    rows = {(row["name"], row["config"]["name"]): row for row in found["rows"]}
    assert {key for key in rows if key[0] in ("ours", "non-private eager")} == {
        (mode, model)
        for mode in ("ours", "non-private eager")
        for model in ("tiny", "tiny-llama", "tiny-slice")
    }
    assert rows["ours", "tiny"]["config"]["path"] == "eager, bf16 autocast, torch norms, noise secure"
    assert all(row["value"] > 0 for row in rows.values())
    assert {bar["name"] for bar in found["bars"]} >= {"ours / non-private eager, tiny-llama, T=8"}
    assert found["versions"]["torch"]


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
