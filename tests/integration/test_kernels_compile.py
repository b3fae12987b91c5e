"""Every kernel compiles for an H100-class GPU (sm_90) on a machine without one: the interpreter checks no types."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
LAUNCHES = Path(__file__).with_name("launch_kernels.py")


def compiled(folder, *arguments, script=SCRIPT):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def spilled(counts):
    return {name: count["spilled_bytes"] for name, count in counts.items() if count["spilled_bytes"]}


def test_the_kernels_compile_to_what_they_should(tmp_path):
    binaries = compiled(tmp_path)
    # No registers are spilled. float32 is no fast path; passes keep a second set of sums, written away once in
    # 8,192 rows.
    found = spilled(binaries)
    for name in ("gram_norm/fp32", "outer_norm/fp32"):
        found.pop(name, None)
    assert found.pop("attention/64, hidden, passes", 0) <= 64
    assert found.pop("norm_backward/fp32, 8192", 0) <= 32  # the widest rows that are taken
    # A tile of exact noise and its rare branch hold more than the registers of eight warps.
    for name in ("write_discrete_gaussian/fill", "write_discrete_gaussian/add"):
        assert name in binaries
        assert found.pop(name, 0) <= 256
    # So does a tile of noise with what AdamW makes of it: 32 numbers of four tensors a thread, divided with rounding.
    for cipher in ("chacha20", "philox4x64"):
        assert found.pop(f"noisy_adamw/{cipher}", 0) <= 576
    assert found == {}
    # Tiles are copied ahead, in two or three stages, where the copy can be asynchronous.
    assert binaries["attention/64, causal"]["shared_bytes"] >= 3 * 64 * 64 * 2 * 2
    assert binaries["gram_norm/bf16"]["shared_bytes"] >= 3 * 2 * 64 * 64 * 2
    # bfloat16 is multiplied by the tensor cores of sm_90; float32 stays float32 and becomes no TF32.
    products = ("gram_norm/bf16", "outer_norm/bf16", "tied_cross/bf16, bf16", "weighted_grad/add")
    backward = [name for name in binaries if name.startswith("attention backward")]
    assert len(backward) == 2
    narrow = ("attention/64, causal", "attention/float16, 64", "attention part/64, ahead", *backward)
    for name in (*narrow, *products):
        assert binaries[name]["wgmma"] > 0
    assert binaries["gram_norm/fp32"]["wgmma"] == 0
    assert binaries["tied_cross/fp32, fp32"]["wgmma"] == binaries["tied_cross/fp32, bf16"]["wgmma"] == 0
    # No kernel adds to memory that another program adds to: the same bits every time, with no mode to turn on.
    assert {name for name, count in binaries.items() if count["atomics"]} == set()
    # A program of the embedding's norm is one warp, whose threads never wait for each other.
    assert [count["barriers"] for name, count in binaries.items() if "embedding" in name] == [0] * 3
    # Words of noise stay in registers until the store, whose one conversion of layout takes 18 barriers.
    counts = [count["barriers"] for name, count in binaries.items() if name.startswith("write_normals")]
    assert len(counts) == 4
    assert max(counts) <= 24
    assert max(binaries[f"noisy_adamw/{cipher}"]["barriers"] for cipher in ("chacha20", "philox4x64")) <= 24
    assert binaries["attention/64, causal"]["barriers"] <= 24
    assert binaries["attention merge/64"]["barriers"] <= 40


def test_an_atomic_addition_is_counted(tmp_path):
    (planted,) = compiled(tmp_path, "--with-an-atomic").values()
    assert planted["atomics"] > 0


def test_without_the_anchor_words_move_at_every_join(tmp_path):
    (planted,) = compiled(tmp_path, "--without-anchor").values()
    assert planted["barriers"] > 60


def test_the_launchers_ask_for_the_same_kernel_whatever_the_key(tmp_path):
    found = compiled(tmp_path, script=LAUNCHES)
    # A variant for each key would be compiled in the middle of training, and its name would tell of the key.
    assert found["noise"] == {"variants": 1, "types": ["u32", "u32", "u32", "u64"]}
    assert found["noisy update"] == {"variants": 1, "types": ["u32", "u32", "u64", "fp32", "fp32"]}
    # One for a single layer's numbers and one for all others would be enough; the law's numbers make none.
    assert found["exact noise"] == {"variants": 1, "types": ["u32", "u32", "u32", "i32"]}
    assert found["attention"] == {
        "forward": 2,
        "part": 2,
        "merge": 2,
        "backward query": 1,
        "backward rows": 1,
    }
    assert found["added noise"] == {"compiled": 6}
    assert found["embedding_norm"] == {"compiled": 9}
    assert found["tied_cross"] == {"compiled": 12}
    assert found["norm_backward"] == {"compiled": 36}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_launch_compiles_at_the_edges_of_its_shapes(tmp_path):
    found = compiled(tmp_path, "--all", script=LAUNCHES)
    assert found["attention"] == {
        "forward": 30,
        "part": 18,  # no diagonal
        "merge": 18,
        "backward query": 15,
        "backward rows": 12,  # of no rows there is no gradient
    }
    assert found["gram_norm"] == found["outer_norm"] == {"compiled": 9}
    assert found["weighted_grad"] == {"compiled": 8}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_variant_compiles_and_those_for_bfloat16_spill_next_to_nothing(tmp_path):
    counts = compiled(tmp_path, "--all")
    assert len(counts) > 40
    assert counts["attention/float32"]["wgmma"] == 0
    narrow = [count for name, count in spilled(counts).items() if "float16" in name]
    assert max(narrow, default=0) <= 64
    wide = [count for name, count in spilled(counts).items() if "float32" in name and "backward" in name]
    assert max(wide, default=0) <= 64
