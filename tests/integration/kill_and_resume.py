"""Trains a small model in forked children, kills them at chosen places, and resumes; prints what happened as JSON.

A program of its own, because it forks: the parent imports everything and makes the plan, children train.
A child counts its durable writes and names the places that it passes, and kills itself at the one it was
told, so every death but the last few is the same on any machine. Started by ``test_kill_and_resume.py`` with a directory,
a seed and a stride: deaths at every so many writes, from the first.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch  # noqa: F401 - imported by every child otherwise
import torch
import torch._dynamo
from torch import Tensor, nn

from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import ExecutionConfig, PrivacyPlan, PrivateTrainer, step_noise
from dp_flash_attention.training import session as session_module

NUM_STEPS, NUM_RECORDS = 9, 200
CHECKPOINT_EVERY = 3
BOOKKEEPING = ExecutionConfig(microbatch_size=32, checkpoint_every=CHECKPOINT_EVERY)
# Other ways to clip, each killed where its noise was drawn and not kept: kind of clipping and execution.
MODES: dict[str, tuple[Any, ExecutionConfig]] = {
    "per_layer": ("per_layer", BOOKKEEPING),
    "two_pass": ("flat", replace(BOOKKEEPING, strategy="two_pass")),
    "one_example": ("flat", replace(BOOKKEEPING, strategy="one_example", microbatch_size=1)),
    "one_example per_layer": ("per_layer", replace(BOOKKEEPING, strategy="one_example", microbatch_size=1)),
}
# Between a step's noise and the checkpoint that holds it: after the first and the last parameter's noise,
# and after the step itself. Step 4 has no checkpoint of its own, step 5 is followed by one.
PLACES = tuple(f"{place} of step {step}" for step in (4, 5) for place in ("noise 0", "noise 2", "end"))
ADD_NOISE = step_noise.add_normals
APPLY = session_module.PrivateSession.apply
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


def train(
    out: Path,
    journal: Path,
    plan: PrivacyPlan,
    *,
    resume: bool,
    death: str | None,
    execution: ExecutionConfig = BOOKKEEPING,
) -> int:
    """Runs in a child, which kills itself at ``death``, a write ("write 3") or one of ``PLACES``.

    Returns:
        How many durable writes there were.
    """
    writes = 0

    def at(place: str) -> None:
        if place == death:
            os.kill(os.getpid(), signal.SIGKILL)

    def journalling(generator: Any, total: Tensor, *, stddev: float, step: int, stream: int) -> Tensor:
        digest = hashlib.sha256(total.contiguous().numpy().tobytes()).hexdigest()
        with journal.open("a") as file:
            file.write(json.dumps([step, stream, digest]) + "\n")
        noisy = ADD_NOISE(generator, total, stddev=stddev, step=step, stream=stream)
        at(f"noise {stream} of step {step}")
        return noisy

    def counting(descriptor: int) -> None:
        nonlocal writes
        writes += 1
        at(f"write {writes}")  # just before it is durable
        FSYNC(descriptor)

    def counted_end(session: Any, step: Any) -> None:
        APPLY(session, step)
        at(f"end of step {step.index}")

    step_noise.add_normals = journalling
    session_module.PrivateSession.apply = counted_end  # type: ignore[method-assign]
    os.fsync = counting
    # Once a run has begun, its first checkpoint decides where it starts, whatever the new process drew.
    torch.manual_seed(random.SystemRandom().randrange(2**31) if has_begun(out) else 0)
    model = Model()
    PrivateTrainer(
        model,
        plan=plan,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        loss_fn=loss_fn,
        out_dir=out,
        execution=execution,
        lr_schedule=lambda step: 1.0 / (1 + step),
        ema_decay=0.9,
        test_key=TestKey("kill"),
    ).fit(Records(), resume=resume)
    return writes


def has_begun(out: Path) -> bool:
    record = out / "run.json"
    return record.exists() and json.loads(record.read_text())["status"] != "preparing"


def in_child(
    out: Path,
    plan: PrivacyPlan,
    *,
    death: str | None = None,
    die_after_s: float | None = None,
    execution: ExecutionConfig = BOOKKEEPING,
) -> str:
    """Starts or resumes the run in ``out``; returns "killed", "failed" or "done after n writes"."""
    # A directory with a lock holds the beginnings of a run; without, there is nothing to resume.
    resume = (out / ".lock").exists()
    if not resume and out.exists():
        out.rmdir()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            journal = out.with_suffix(".journal")
            writes = train(out, journal, plan, resume=resume, death=death, execution=execution)
            os.write(writer, str(writes).encode())
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(writer)
    if die_after_s is not None:
        time.sleep(die_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        writes_text = file.read()
    if os.WIFSIGNALED(status):
        return "killed"
    return f"done after {writes_text} writes" if os.WEXITSTATUS(status) == 0 else "failed"


def digest_of(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def result_of(out: Path, endings: list[str]) -> dict[str, Any]:
    inputs: dict[tuple[int, int], set[str]] = {}
    lines = out.with_suffix(".journal").read_text().splitlines()
    for step, stream, digest in map(json.loads, lines):
        inputs.setdefault((step, stream), set()).add(digest)
    return {
        "endings": endings,
        "model": digest_of(out) if endings[-1].startswith("done") else None,
        "positions": len(inputs),
        "reused": sum(len(digests) > 1 for digests in inputs.values()),
        "draws": len(lines),
        "secrets_left": (out / ".secrets").exists(),
        "temporaries": [path.name for path in out.rglob(".tmp-*")],
    }


def copied(source: Path, target: Path) -> Path:
    """Copies a dead run with its journal, so that it can die in many ways from there."""
    shutil.copytree(source, target)
    shutil.copy(source.with_suffix(".journal"), target.with_suffix(".journal"))
    return target


def die_at(out: Path, plan: PrivacyPlan, death: str) -> dict[str, Any]:
    """Kills a run, new or dead, once at ``death`` and then lets it finish."""
    return result_of(out, [in_child(out, plan, death=death), in_child(out, plan)])


def num_writes(ending: str) -> int:
    return int(ending.split()[2])


def main() -> None:
    directory, seed, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
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
    gc.freeze()  # children would copy the pages that a collection writes to
    began_s = time.monotonic()
    ending = in_child(directory / "unbroken", plan)
    duration_s = time.monotonic() - began_s
    unbroken = result_of(directory / "unbroken", [ending])
    fresh = {
        f"write {n}": die_at(directory / f"fresh-{n}", plan, f"write {n}")
        for n in range(1, num_writes(ending) + 1, stride)
    }
    places = {place: die_at(directory / place.replace(" ", "-"), plan, place) for place in PLACES}
    # What a process does that takes over a run whose noise was drawn and not kept.
    dead = directory / "dead"
    assert in_child(dead, plan, death=PLACES[-1]) == "killed"
    ending = in_child(copied(dead, directory / "resumed"), plan)
    resumed = {
        f"write {n}": die_at(copied(dead, directory / f"resumed-{n}"), plan, f"write {n}")
        for n in range(1, num_writes(ending) + 1, stride)
    }
    chance = random.Random(seed)
    moments = [chance.uniform(0.1, 0.9) * duration_s for _ in range(5)]
    endings = [in_child(directory / "random", plan, die_after_s=moment) for moment in moments]
    endings.append(in_child(directory / "random", plan))
    random_moments = {"any": result_of(directory / "random", endings)}
    modes = {}
    for mode, (clipping, execution) in MODES.items():
        mode_plan = replace(plan, clipping=clipping)
        whole, broken = directory / f"{mode}-whole", directory / f"{mode}-broken"
        ending = in_child(whole, mode_plan, execution=execution)
        deaths = [in_child(broken, mode_plan, death=place, execution=execution) for place in PLACES[::2]]
        deaths.append(in_child(broken, mode_plan, execution=execution))
        modes[mode] = {"whole": result_of(whole, [ending]), "broken": result_of(broken, deaths)}
    groups = {"fresh": fresh, "places": places, "resumed": resumed, "random": random_moments}
    print(json.dumps({"unbroken": unbroken, "modes": modes, **groups}))


if __name__ == "__main__":
    main()
