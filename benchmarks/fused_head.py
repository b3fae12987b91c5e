"""What does a language model's head cost with and without its logits in memory, when each example is clipped?

One head over a vocabulary of 50k, hidden states of bounded size, the loss of each example: forward, backward, norms,
clipped sum. ``plain`` is ``nn.Linear`` with ``language_model_loss``; ``fused`` is ``LinearCrossEntropy`` on the same
weight. Time is interleaved in one process; peak memory is that of a process of its own for each case, over what it
held before the step (Linux).

    python benchmarks/fused_head.py --json > benchmarks/results/fused_head-DEVICE.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Report, Row, emit, run_interleaved
from dp_flash_attention.clipping import ClippedGradientAccumulator, LinearCrossEntropy
from dp_flash_attention.training.losses import language_model_loss, language_model_loss_from_hidden
from dp_flash_attention.training.memory import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One head and batch."""

    vocab_size: int
    d_model: int
    seq_len: int
    batch_size: int


SHAPES = (
    Shape(vocab_size=50257, d_model=256, seq_len=128, batch_size=8),
    Shape(vocab_size=50257, d_model=768, seq_len=512, batch_size=2),
    Shape(vocab_size=50257, d_model=256, seq_len=1024, batch_size=1),
)


def case(shape: Shape, mode: str) -> Callable[[], object]:
    """Returns one clipped step of the head."""
    torch.manual_seed(0)
    linear = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
    head = LinearCrossEntropy.sharing(linear) if mode == "fused" else linear
    x = torch.randn(shape.batch_size, shape.seq_len, shape.d_model, requires_grad=True)
    ids = torch.randint(0, shape.vocab_size, (shape.batch_size, shape.seq_len))
    accumulator = ClippedGradientAccumulator(head, l2_clip_norm=1.0)

    def losses() -> Tensor:
        if isinstance(head, LinearCrossEntropy):
            return language_model_loss_from_hidden(x, head, ids)
        return language_model_loss(head(x), ids)

    def step() -> None:
        accumulator.reset()
        accumulator.add(losses, batch_size=shape.batch_size)

    return step


def _peak_mib(shape: Shape, mode: str) -> float:
    step = case(shape, mode)
    # The kernel's high-water mark outlives exec, so it is set back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water_kib()
    step()
    return (_high_water_kib() - before) / 1024


def _high_water_kib() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def rows_of(shape: Shape, *, repeats: int) -> list[Row]:
    """Measures both cases on one shape."""
    timings = run_interleaved(
        {mode: case(shape, mode) for mode in ("plain", "fused")}, repeats=repeats, warmup=1
    )
    peaks = {}
    for mode in timings:
        # A fresh process: the resident set of this one has been higher already.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[mode] = pool.apply(_peak_mib, (shape, mode))
    rows = []
    for mode, timing in timings.items():
        ratio = timing.median_s / timings["plain"].median_s
        rows.append(
            Row(
                name=f"{mode} step",
                config=asdict(shape),
                value=1e3 * timing.median_s,
                unit="ms",
                baseline="plain step",
                ratio=ratio,
                spread=timing.spread,
            )
        )
        rows.append(
            Row(
                name=f"{mode} peak memory",
                config=asdict(shape),
                value=peaks[mode],
                unit="MiB",
                baseline="plain peak memory",
                ratio=peaks[mode] / peaks["plain"],
                spread=0.0,
            )
        )
    return rows


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="which of them, by number"
    )
    arguments = parser.parse_args()
    keep_freed_memory()
    rows = [row for k in arguments.shapes for row in rows_of(SHAPES[k], repeats=arguments.repeats)]
    emit(Report(benchmark="fused_head", rows=rows), as_json=arguments.json)


if __name__ == "__main__":
    main()
