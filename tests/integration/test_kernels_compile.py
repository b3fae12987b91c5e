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


def test_no_kernel_spills_registers(binaries):
    assert {
        name: counts["spilled_bytes"] for name, counts in binaries.items() if counts["spilled_bytes"]
    } == {}


def test_the_words_stay_in_registers_until_the_store(binaries, tmp_path):
    def barriers(counts):
        return {name: count["barriers"] for name, count in counts.items() if name.startswith("write_normals")}

    # One conversion of layout before the store takes 18, in several pieces; one at each join takes 90.
    assert len(barriers(binaries)) == 4
    assert max(barriers(binaries).values()) <= 24
    assert min(barriers(compiled(tmp_path, "--without-anchor")).values()) > 60
