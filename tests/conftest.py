"""What every test stands on: one thread per worker, fixed seeds, repeatable property tests."""

from __future__ import annotations

import json
import os
import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

# Several workers share few cores, and the tensors here are small: more threads would only fight. Set before
# torch or numpy are imported; a test about threads asks for them itself.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# A test that would need a model hub has to fail at once, not wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Kernels run under Triton's interpreter on the CPU. It is chosen when they are imported, so for all tests or for
# none: on an accelerator, run TRITON_INTERPRET=0 python -m pytest -m gpu tests/gpu.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis  # noqa: E402 - the lines above have to come first
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Derandomised: the same examples on every run, so that a failure is a change of the code and not of the dice.
# No deadline: a shared machine is slow at times, and no test judges time.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Seeds the global generators with a number that follows from the test's own name.

    The library never draws from them; tests do, for their inputs. Order and selection of tests do not matter.
    """
    seed = zlib.crc32(request.node.nodeid.encode())
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A NumPy generator of the test's own, the same on every run."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def small_table(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a .csv with one telling column, one of noise, one category, and the label ``kind``."""

    def write(num_records: int = 300, classes: int = 2) -> Path:
        draw = random.Random(0)
        lines = ["telling,noise,letter,kind"]
        for _ in range(num_records):
            k = draw.randrange(classes)
            lines.append(
                f"{4 * k + draw.gauss(0, 1):.4f},{draw.gauss(0, 1):.4f},{draw.choice('xyz')},class{k}"
            )
        path = tmp_path_factory.mktemp("table") / "small.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture(scope="session")
def small_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 120 short texts with the label ``mood``."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "small.jsonl"
    with path.open("w") as file:
        for _ in range(120):
            good = draw.random() < 0.5
            text = " ".join(draw.choice(["good", "fine"] if good else ["bad", "poor"]) for _ in range(3))
            file.write(json.dumps({"text": text, "mood": "up" if good else "down"}) + "\n")
    return path
