"""What every test stands on: one thread per worker, fixed seeds, repeatable property tests."""

from __future__ import annotations

import json
import os
import random
import shutil
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


@pytest.fixture(scope="session")
def certified_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Writes what a finished run shares, as training does but with bytes for a model: certificate, files and page."""
    from dp_flash_attention.crypto.certificates import content_digest
    from dp_flash_attention.crypto.shared_files import fingerprint
    from dp_flash_attention.training import PrivacyPlan
    from dp_flash_attention.training.certificate import EvaluationStatement, build_certificate
    from dp_flash_attention.training.evaluation import ClassifierEvaluation

    plan = PrivacyPlan(
        epsilon=4.0,
        delta=1e-5,
        sampling_prob=0.05,
        expected_batch_size=100.0,
        num_steps=40,
        l2_clip_norm=2.0,
        noise_multiplier=1.0,
    )
    evaluation = ClassifierEvaluation(
        epsilon=4.0, delta=1e-5, noise_stddev=1.5, negatives=(50.0, 10.5), positives=(9.5, 40.0)
    )
    original = tmp_path_factory.mktemp("certified") / "run"
    original.mkdir()
    (original / "model.safetensors").write_bytes(bytes(1000))
    (original / "evaluation.json").write_text(json.dumps(evaluation.to_dict()))
    (original / "run.json").write_text(json.dumps({"status": "finished", "facts": {"plan": plan.to_dict()}}))
    certificate = build_certificate(
        plan=plan,
        count_release=None,
        holdout_prob=0.1,
        evaluation=EvaluationStatement.of(evaluation),
        total_epsilon=4.0,
        task={"name": "a task", "classes": ["no", "yes"]},
        public_statements=["The columns are public."],
        hyper_parameters={"learning_rate": 0.1},
        uses_test_key=False,
        files={name: fingerprint(original / name) for name in ("model.safetensors", "evaluation.json")},
    )
    certificate.write(original / "certificate.json")
    content = certificate.to_dict()
    (original / "report.html").write_text(
        f'<meta name="certificate-sha256" content="{content_digest(content)}"><p>{content["claim"]["statement"]}</p>'
    )

    def write(directory: Path) -> Path:
        shutil.copytree(original, directory)
        return directory

    return write
