"""What does each way to clip cost in time and memory at long sequences, with and without checkpointing?

The same GPT, data and AdamW for every row; a step is forward, backward, clipping and the optimizer, without noise,
which is the same for all. Peaks are by how much two steps raise the resident memory of a fresh process.

    python benchmarks/clipping_strategies.py --json > benchmarks/results/clipping_strategies-DEVICE.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Report, Row, emit, run_interleaved
from dp_flash_attention.clipping import ClippedGradientAccumulator
from dp_flash_attention.training.losses import language_model_loss
from dp_flash_attention.training.memory import keep_freed_memory
from dp_flash_attention.training.models import TextTransformer, TextTransformerConfig

BASELINE = "non-private"
# Strategy and kind of clipping; None for the ordinary step.
MODES: dict[str, tuple[str, str] | None] = {
    BASELINE: None,
    "bookkeeping, flat": ("bookkeeping", "flat"),
    "bookkeeping, per_layer": ("bookkeeping", "per_layer"),
    "two_pass, flat": ("two_pass", "flat"),
    "one_example, flat": ("one_example", "flat"),
    "one_example, per_layer": ("one_example", "per_layer"),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model and batch."""

    seq_len: int
    batch_size: int
    checkpointing: bool
    d_model: int = 256
    num_heads: int = 4
    num_layers: int = 8
    vocab_size: int = 1024


SETTINGS = tuple(
    Setting(seq_len=length, batch_size=size, checkpointing=checkpointing)
    for length, size in ((1024, 4), (4096, 2))
    for checkpointing in (False, True)
)


class Checkpointed(nn.Module):
    """Runs a block again in the backward pass instead of keeping its activations."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns the block's output."""
        output: Tensor = checkpoint(self.block, x_BTD, use_reentrant=False)
        return output


def make_step(setting: Setting, mode: str) -> Callable[[], None]:
    """Returns one optimizer step of a mode."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in asdict(setting).items() if k not in ("batch_size", "checkpointing")}
    model = TextTransformer(TextTransformerConfig(**sizes))
    if setting.checkpointing:
        model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, setting.vocab_size, (setting.batch_size, setting.seq_len))
    chosen = MODES[mode]
    if chosen is None:

        def non_private() -> None:
            optimizer.zero_grad(set_to_none=True)
            language_model_loss(model(ids), ids).mean().backward()
            optimizer.step()

        return non_private
    strategy, clipping = chosen
    options: Any = {"strategy": strategy, "clipping": clipping}
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0, **options)
    # What the start-up check of a session leaves: how often each parameter is used.
    accumulator.record(lambda: language_model_loss(model(ids[:1, :8]), ids[:1, :8]), batch_size=1)
    microbatches = ids.split(1 if strategy == "one_example" else setting.batch_size)

    def private() -> None:
        accumulator.reset()
        for rows in microbatches:
            accumulator.add(
                lambda rows=rows: language_model_loss(model(rows), rows),  # type: ignore[misc]
                batch_size=len(rows),
            )
        sums = accumulator.sums
        for name, parameter in accumulator.parameters.items():
            parameter.grad = sums[name].div_(setting.batch_size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return private


def peak_bytes(setting: Setting, mode: str) -> int:
    """Returns by how much two steps raise a fresh process's resident memory, model and data included."""
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    arguments = (setting, mode, torch.get_num_threads(), sender)
    process = multiprocessing.get_context("spawn").Process(target=_measure_peak, args=arguments)
    process.start()
    peak = int(receiver.recv())
    process.join()
    return peak


def _measure_peak(setting: Setting, mode: str, num_threads: int, sender: Any) -> None:
    torch.set_num_threads(num_threads)
    # A tiny model first, so that libraries and thread pools are not counted as the step's memory.
    make_step(Setting(seq_len=8, batch_size=2, checkpointing=setting.checkpointing, d_model=16), mode)()
    before = _peak_resident_bytes()
    step = make_step(setting, mode)
    for _ in range(2):
        step()
    sender.send(_peak_resident_bytes() - before)


def _peak_resident_bytes() -> int:
    # Not getrusage: Linux hands a parent's peak down to its children there, through fork and exec.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(setting: Setting, *, repeats: int) -> list[Row]:
    """Returns the times of all modes, interleaved, and their peaks."""
    peaks = {mode: float(peak_bytes(setting, mode)) / 2**20 for mode in MODES}
    timings = run_interleaved({mode: make_step(setting, mode) for mode in MODES}, repeats=repeats, warmup=1)
    rows = []
    for unit, values in (
        ("ms/step", {mode: timing.median_s * 1e3 for mode, timing in timings.items()}),
        ("MiB peak", peaks),
    ):
        for mode, value in values.items():
            rows.append(
                Row(
                    name=mode,
                    config=asdict(setting),
                    value=value,
                    unit=unit,
                    baseline=BASELINE,
                    ratio=value / values[BASELINE],
                    spread=timings[mode].spread if unit == "ms/step" else 0.0,
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--settings",
        type=int,
        nargs="*",
        default=list(range(len(SETTINGS))),
        choices=range(len(SETTINGS)),
        help="which of: T=1024, the same checkpointed, T=4096, the same checkpointed",
    )
    options = parser.parse_args()
    keep_freed_memory()
    rows = [row for k in options.settings for row in measure(SETTINGS[k], repeats=options.repeats)]
    emit(Report(benchmark="clipping_strategies", rows=rows), as_json=options.json)


if __name__ == "__main__":
    main()
