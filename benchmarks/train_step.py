"""What does a private training step cost beside a non-private one, and beside the peers?

One process, one model shape, interleaved repeats: forward, backward, clipping, noise, optimizer. The same
untied GPT, the same data and the same AdamW for everyone; the private modes clip each example to norm 1
and add Gaussian noise once. Untied, because Opacus has no exact rule for tied weights; ``--tied``
compares ours with the baseline on tied weights.

    python benchmarks/train_step.py --json > benchmarks/results/train_step-DEVICE.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Bar, Report, Row, emit, run_interleaved
from dp_flash_attention.clipping import ClippedGradientAccumulator
from dp_flash_attention.clipping.compiled import CompiledClipping
from dp_flash_attention.noise import SecretKey, make_generator
from dp_flash_attention.training.losses import language_model_loss
from dp_flash_attention.training.memory import keep_freed_memory
from dp_flash_attention.training.models import TextTransformer, TextTransformerConfig

CLIP_NORM, NOISE_MULTIPLIER = 1.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model and batch."""

    vocab_size: int
    seq_len: int
    d_model: int
    num_heads: int
    num_layers: int
    batch_size: int


SHAPES = (
    Shape(vocab_size=4096, seq_len=128, d_model=256, num_heads=4, num_layers=4, batch_size=16),
    Shape(vocab_size=8192, seq_len=256, d_model=512, num_heads=8, num_layers=4, batch_size=8),
    # Sequences longer than the model is wide, where gradients are smaller than what they are made of.
    Shape(vocab_size=4096, seq_len=1024, d_model=256, num_heads=4, num_layers=4, batch_size=4),
)

Step = Callable[[], object]


def build(shape: Shape, *, tied: bool) -> tuple[TextTransformer, torch.optim.AdamW, Tensor]:
    """Returns the same model, optimizer and data for every mode."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in asdict(shape).items() if k != "batch_size"}
    model = TextTransformer(TextTransformerConfig(**sizes, tie_head=tied))
    ids = torch.randint(0, shape.vocab_size, (shape.batch_size, shape.seq_len))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), ids


def non_private(shape: Shape, *, tied: bool, compiled: bool = False) -> Step:
    model, optimizer, ids = build(shape, tied=tied)
    forward: Callable[..., Tensor] = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        language_model_loss(forward(ids), ids).mean().backward()
        optimizer.step()

    return step


def lm_loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return language_model_loss(model(ids), ids)


def ours(shape: Shape, *, tied: bool, compiled: bool = False) -> Step:
    model, optimizer, ids = build(shape, tied=tied)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=CLIP_NORM)
    clipping = CompiledClipping(accumulator, model) if compiled else None
    generator = make_generator("secure", SecretKey.from_os())
    num_steps = 0

    def step() -> None:
        nonlocal num_steps
        accumulator.reset()
        if clipping is None:
            accumulator.add(lambda: lm_loss(model, ids), batch_size=len(ids))
        else:
            clipping.add(lm_loss, ids, batch_size=len(ids))
        sums = accumulator.sums
        for stream, (name, parameter) in enumerate(accumulator.parameters.items()):
            noisy = generator.add_normal_(
                sums[name], stddev=NOISE_MULTIPLIER * CLIP_NORM, step=num_steps, stream=stream
            )
            parameter.grad = noisy.div_(shape.batch_size)
        optimizer.step()
        num_steps += 1

    return step


def opacus_per_sample(shape: Shape, *, tied: bool) -> Step:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, optimizer, ids = build(shape, tied=tied)
    module = GradSampleModule(model, loss_reduction="mean")
    private = DPOptimizer(
        optimizer,
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=shape.batch_size,
    )

    def step() -> None:
        private.zero_grad(set_to_none=True)
        language_model_loss(module(ids), ids).mean().backward()
        private.step()

    return step


def opacus_ghost(shape: Shape, *, tied: bool) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    model, optimizer, ids = build(shape, tied=tied)
    module = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=CLIP_NORM, use_ghost_clipping=True, loss_reduction="mean"
    )
    private = DPOptimizerFastGradientClipping(
        optimizer,
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=shape.batch_size,
    )

    def step() -> None:
        private.zero_grad(set_to_none=True)
        DPTensorFastGradientClipping(module, private, language_model_loss(module(ids), ids)).backward()
        private.step()

    return step


MODES: dict[str, Callable[..., Step]] = {
    "non-private eager": non_private,
    "non-private compiled": lambda shape, tied: non_private(shape, tied=tied, compiled=True),
    "ours": ours,
    "ours compiled": lambda shape, tied: ours(shape, tied=tied, compiled=True),
    "opacus per-sample": opacus_per_sample,
    "opacus ghost": opacus_ghost,
}
OPACUS = ("opacus per-sample", "opacus ghost")


def peak_bytes(mode: str, shape: Shape, *, tied: bool) -> int:
    """Returns by how much three steps raise a fresh process's resident memory, model and data included."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(mode, shape, tied, sender))
    process.start()
    peak = int(receiver.recv())
    process.join()
    return peak


def _measure_peak(mode: str, shape: Shape, tied: bool, sender: Any) -> None:
    warnings.simplefilter("ignore")
    # A tiny model first, so that libraries and thread pools are not counted as the step's memory.
    warm = Shape(vocab_size=16, seq_len=8, d_model=16, num_heads=2, num_layers=1, batch_size=2)
    MODES[mode](warm, tied=tied)()
    before = _peak_resident_bytes()
    step = MODES[mode](shape, tied=tied)
    for _ in range(3):
        step()
    sender.send(_peak_resident_bytes() - before)


def _peak_resident_bytes() -> int:
    # Not getrusage: Linux hands a parent's peak down to its children there, through fork and exec.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(shape: Shape, *, tied: bool, repeats: int, modes: list[str]) -> tuple[list[Row], list[Bar]]:
    config = {**asdict(shape), "tied": tied}
    cases = {mode: MODES[mode](shape, tied=tied) for mode in modes}
    timings = run_interleaved(cases, repeats=repeats, warmup=2)
    baseline = timings["non-private eager"].median_s
    rows, ratios = [], {mode: timing.median_s / baseline for mode, timing in timings.items()}
    for mode, timing in timings.items():
        rows.append(
            Row(
                name=mode,
                config=config,
                value=timing.median_s * 1e3,
                unit="ms/step",
                baseline="non-private eager",
                ratio=ratios[mode],
                spread=timing.spread,
            )
        )
    label = f"d={shape.d_model}, T={shape.seq_len}{', tied' if tied else ''}"
    bars = [
        Bar(
            name=f"ours / non-private eager, {label}",
            value=ratios["ours"],
            bound=1.15,
            holds=ratios["ours"] <= 1.15,
        )
    ]
    compiled = ratios["ours compiled"] / ratios["non-private compiled"]
    bars.append(
        Bar(
            name=f"ours compiled / non-private compiled, {label}",
            value=compiled,
            bound=1.25,
            holds=compiled <= 1.25,
        )
    )
    peers = [ratios[mode] for mode in OPACUS if mode in ratios]
    if peers:
        gain = min(peers) / ratios["ours"]
        bars.append(Bar(name=f"better Opacus mode / ours, {label}", value=gain, bound=1.5, holds=gain >= 1.5))
    peaks = {mode: peak_bytes(mode, shape, tied=tied) for mode in modes if not mode.endswith("compiled")}
    for mode, peak in peaks.items():
        ratio = peak / peaks["non-private eager"]
        rows.append(
            Row(
                name=mode,
                config=config,
                value=peak / 2**20,
                unit="MiB peak",
                baseline="non-private eager",
                ratio=ratio,
                spread=0.0,
            )
        )
    memory = peaks["ours"] / peaks["non-private eager"]
    bars.append(
        Bar(
            name=f"peak memory, ours / non-private eager, {label}",
            value=memory,
            bound=1.05,
            holds=memory <= 1.05,
        )
    )
    return rows, bars


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tied", action="store_true", help="tie embedding and head; leaves Opacus out")
    parser.add_argument("--shapes", type=int, nargs="*", default=[0, 1, 2], help="which of the three shapes")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Opacus warns about its own hooks
    keep_freed_memory()  # as dpfa train does; it helps every mode
    modes = [mode for mode in MODES if not (options.tied and mode in OPACUS)]
    rows: list[Row] = []
    bars: list[Bar] = []
    for index in options.shapes:
        more_rows, more_bars = measure(SHAPES[index], tied=options.tied, repeats=options.repeats, modes=modes)
        rows += more_rows
        bars += more_bars
    emit(Report(benchmark="train_step", rows=rows, bars=bars, peers=("opacus",)), as_json=options.json)


if __name__ == "__main__":
    main()
