"""Trains a small model in forked children, kills them, and resumes; prints what happened as JSON.

A program of its own, because it forks: the parent imports everything and makes the plan, children train.
Started by ``test_kill_and_resume.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import ExecutionConfig, PrivacyPlan, PrivateTrainer
from dp_flash_attention.training import session as session_module

NUM_STEPS, NUM_RECORDS = 12, 200
ADD_NOISE = session_module._add_noise
FSYNC = os.fsync


class Records:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 20, (NUM_RECORDS, 6), generator=generator)

    def __len__(self) -> int:
        return NUM_RECORDS

    def take(self, indices: Tensor) -> Tensor:
        return self.ids[indices]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.embedding(ids))))


def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids).mT, ids.roll(1, 1), reduction="none").mean(1)


def train(out: Path, journal: Path, plan: PrivacyPlan, *, resume: bool, die_at_sync: int | None) -> None:
    """Runs in a child; ``die_at_sync`` kills it just before its n-th durable write."""
    syncs = 0

    def journalling(generator: Any, total: Tensor, *, stddev: float, step: int, stream: int) -> Tensor:
        digest = hashlib.sha256(total.contiguous().numpy().tobytes()).hexdigest()
        with journal.open("a") as file:
            file.write(json.dumps([step, stream, digest]) + "\n")
        return ADD_NOISE(generator, total, stddev=stddev, step=step, stream=stream)

    def counting(descriptor: int) -> None:
        nonlocal syncs
        syncs += 1
        if syncs == die_at_sync:
            os.kill(os.getpid(), signal.SIGKILL)
        FSYNC(descriptor)

    session_module._add_noise = journalling
    os.fsync = counting
    torch.manual_seed(0 if not resume else random.SystemRandom().randrange(2**31))
    model = Model()
    PrivateTrainer(
        model,
        plan=plan,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        loss_fn=loss_fn,
        out_dir=out,
        execution=ExecutionConfig(microbatch_size=16, checkpoint_every=3),
        lr_schedule=lambda step: 1.0 / (1 + step),
        ema_decay=0.9,
        on_step=lambda report: time.sleep(0.01),
        test_key=TestKey("kill"),
    ).fit(Records(), resume=resume)


def in_child(
    out: Path, journal: Path, plan: PrivacyPlan, *, die_at_sync: int | None, die_after_s: float | None
) -> str:
    # A directory with a lock holds the beginnings of a run; without, there is nothing to resume.
    resume = (out / ".lock").exists()
    if not resume and out.exists():
        out.rmdir()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(out, journal, plan, resume=resume, die_at_sync=die_at_sync)
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if die_after_s is not None:
        time.sleep(die_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed"
    return "done" if os.WEXITSTATUS(status) == 0 else "failed"


def digest_of(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def run(out: Path, plan: PrivacyPlan, deaths: list[tuple[int | None, float | None]]) -> dict[str, Any]:
    """Kills a run once for each entry of ``deaths``, then lets it finish."""
    journal = out.with_suffix(".journal")
    endings = []
    for die_at_sync, die_after_s in [*deaths, (None, None)]:
        endings.append(in_child(out, journal, plan, die_at_sync=die_at_sync, die_after_s=die_after_s))
        if endings[-1] == "failed":
            break
    inputs: dict[tuple[int, int], set[str]] = {}
    for line in journal.read_text().splitlines():
        step, stream, digest = json.loads(line)
        inputs.setdefault((step, stream), set()).add(digest)
    return {
        "endings": endings,
        "model": digest_of(out) if endings[-1] == "done" else None,
        "positions": len(inputs),
        "reused": sum(len(digests) > 1 for digests in inputs.values()),
        "draws": len(journal.read_text().splitlines()),
        "secrets_left": (out / ".secrets").exists(),
        "temporaries": [path.name for path in out.rglob(".tmp-*")],
    }


def main() -> None:
    directory, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)  # forking with living worker threads can hang
    plan = PrivacyPlan(
        epsilon=60.0,
        delta=1e-3,
        sampling_prob=0.2,
        expected_batch_size=40.0,
        num_steps=NUM_STEPS,
        l2_clip_norm=0.5,
        noise_multiplier=1.0,
        accountant="rdp",
    )
    plan.epsilon_schedule()
    chance = random.Random(seed)
    began_s = time.monotonic()
    runs = {"unbroken": run(directory / "unbroken", plan, [])}
    duration_s = time.monotonic() - began_s
    # Every durable write of a fresh start, one death each, and then deaths of resumed processes at theirs.
    for start in (1, 12, 23):
        runs[f"writes from {start}"] = run(
            directory / f"sync-{start}", plan, [(n, None) for n in range(start, start + 11)]
        )
    runs["any moment"] = run(
        directory / "random", plan, [(None, chance.uniform(0.05, 0.7) * duration_s) for _ in range(8)]
    )
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
