"""Every kernel compiles for an H100-class GPU (sm_90) on a machine without one: the interpreter checks no types."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")


def compiled(folder, *arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("kernels"))


def spilled(counts):
    return {name: count["spilled_bytes"] for name, count in counts.items() if count["spilled_bytes"]}


def test_no_kernel_for_narrow_rows_spills_registers(binaries):
    found = spilled(binaries)
    # float32 is no fast path; passes keep a second set of sums, written away once in 8,192 rows.
    found.pop("attention/float32", None)
    assert found.pop("attention/64, hidden, passes", 0) <= 64
    assert found == {}


def test_bfloat16_is_multiplied_by_the_tensor_cores_of_sm_90(binaries):
    assert binaries["attention/64, causal"]["wgmma"] > 0
    assert binaries["attention/float32"]["wgmma"] == 0  # float32 stays float32: no TF32


def test_the_words_stay_in_registers_until_the_store(binaries, tmp_path):
    # One conversion of layout before the store takes 18, in several pieces; one at each join takes 90.
    counts = [count["barriers"] for name, count in binaries.items() if name.startswith("write_normals")]
    assert len(counts) == 4
    assert max(counts) <= 24
    assert binaries["attention/64, causal"]["barriers"] <= 24
    (planted,) = compiled(tmp_path, "--without-anchor").values()
    assert planted["barriers"] > 60


@pytest.mark.slow
def test_every_variant_compiles_and_those_for_bfloat16_spill_nothing(tmp_path):
    counts = compiled(tmp_path, "--all")
    assert len(counts) > 40
    assert [name for name in spilled(counts) if "bfloat16" in name] == []
