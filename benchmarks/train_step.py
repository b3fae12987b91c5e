"""What does a private training step cost beside a non-private one, and beside the peers?

One process, one model shape, interleaved repeats: forward, backward, clipping, noise, optimizer. The same
untied GPT, the same data and the same AdamW for everyone; the private modes clip each example to norm 1
and add Gaussian noise once. Untied, because Opacus has no exact rule for tied weights; ``--tied``
compares ours with the baseline on tied weights.

    python benchmarks/train_step.py --json > benchmarks/results/train_step-DEVICE.json
    python benchmarks/train_step.py --device cuda --json > benchmarks/results/train_step-DEVICE.json

On a GPU the models are GPT-2's sizes, a Llama-style one of 1.2 billion parameters and one-layer slices of width 4096,
under bfloat16 autocast; the baseline is compiled, with flash attention. Ours runs eagerly, with kernels for norms and weighted
gradients, and compiled, with torch's products in float32 for both: ``path`` says what ran. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Bar, Report, Row, Timing, emit, run_interleaved
from _models import Shape, build_model, shape_of
from _steps import MODES, OPACUS, Place, modes_for
from dp_flash_attention.noise.device import has_triton
from dp_flash_attention.training.memory import keep_freed_memory

SHAPES = (
    Shape(vocab_size=4096, seq_len=128, d_model=256, num_heads=4, num_layers=4, batch_size=16),
    Shape(vocab_size=8192, seq_len=256, d_model=512, num_heads=8, num_layers=4, batch_size=8),
    # Sequences longer than the model is wide, where gradients are smaller than what they are made of.
    Shape(vocab_size=4096, seq_len=1024, d_model=256, num_heads=4, num_layers=4, batch_size=4),
)
CUDA_MODELS = ("gpt2-small", "gpt2-medium", "gpt2-large", "llama-1b", "slice-4096")
CUDA_LENGTHS = {"slice-4096": (512, 1024, 4096, 16_384)}

# Above this the modes of a model are timed one after the other, each with the GPU to itself.
_MOST_INTERLEAVED_BYTES = 40 * 2**30


def peak_bytes(mode: str, shape: Shape, place: Place) -> int:
    """Returns the most that three steps hold, model, optimizer and data included.

    On a CPU by how much they raise a fresh process's resident memory, on a GPU what the allocator counts.
    """
    if place.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        step = MODES[mode](shape, place)
        for _ in range(2):
            step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(mode, shape, place, sender))
    process.start()
    sender.close()  # so that a child that dies is an error here and not a wait for ever
    peak = int(receiver.recv())
    process.join()
    return peak


def _measure_peak(mode: str, shape: Shape, place: Place, sender: Any) -> None:
    warnings.simplefilter("ignore")
    # A tiny model first, so that libraries and thread pools are not counted as the step's memory.
    MODES[mode](
        shape_of({"gpt": "tiny", "llama": "tiny-llama", "slice": "tiny-slice"}[shape.family], 8), place
    )()
    before = peak_resident_bytes()
    step = MODES[mode](shape, place)
    for _ in range(3):
        step()
    sender.send(peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """Returns the most resident memory that this process has had."""
    # Not getrusage: Linux hands a parent's peak down to its children there, through fork and exec.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def timings_of(shape: Shape, place: Place, modes: list[str], repeats: int) -> tuple[dict[str, Timing], bool]:
    """Times the modes in turn; one after the other where they do not fit onto the GPU together."""
    with torch.device("meta"):
        numbers = sum(
            p.numel()
            for p in build_model(shape, tied=place.tied, device=torch.device("meta"))[0].parameters()
        )
    # Parameters, gradients and two moments of each mode.
    if place.device.type == "cpu" or 16 * numbers * len(modes) <= _MOST_INTERLEAVED_BYTES:
        cases = {mode: MODES[mode](shape, place) for mode in modes}
        return run_interleaved(cases, repeats=repeats, warmup=2), True
    timings = {}
    for mode in modes:
        gc.collect()
        torch.cuda.empty_cache()
        timings |= run_interleaved({mode: MODES[mode](shape, place)}, repeats=repeats, warmup=2)
    return timings, False


def path_of(mode: str, place: Place) -> str:
    """Returns what really runs: compiled or eager, which autocast, which norms."""
    parts = ["compiled" if mode.endswith("compiled") else "eager"]
    if place.bf16:
        parts.append("bf16 autocast")
    if mode.startswith("ours"):
        kernels = place.device.type == "cuda" and has_triton() and not mode.endswith("compiled")
        parts += [f"{'triton' if kernels else 'torch'} norms", f"noise {place.noise}"]
    return ", ".join(parts)


def promised_ratio(shape: Shape, place: Place) -> tuple[str, float]:
    """Returns the baseline's name and the most that ours may take of it."""
    if place.device.type == "cpu":
        return "non-private eager", 1.15
    if shape.d_model >= 4096:
        return "non-private compiled", 1 / 0.96
    return "non-private compiled", 1 / (0.90 if shape.seq_len <= 512 else 0.85)


def measure(
    shape: Shape, place: Place, *, repeats: int, modes: list[str], time_only: bool = False
) -> tuple[list[Row], list[Bar]]:
    """Measures one shape."""
    config = {**asdict(shape), "tied": place.tied}
    timings, interleaved = timings_of(shape, place, modes, repeats)
    baseline, bound = promised_ratio(shape, place)
    rows, ratios = [], {mode: t.median_s / timings[baseline].median_s for mode, t in timings.items()}
    for mode, timing in timings.items():
        rows.append(
            Row(
                name=mode,
                config={**config, "path": path_of(mode, place), "interleaved": interleaved},
                value=timing.median_s * 1e3,
                unit="ms/step",
                baseline=baseline,
                ratio=ratios[mode],
                spread=timing.spread,
            )
        )
    label = f"{shape.name or 'd=' + str(shape.d_model)}, T={shape.seq_len}{', tied' if place.tied else ''}"
    bars = [_at_most(f"ours / {baseline}, {label}", ratios["ours"], bound)]
    if "ours compiled" in ratios:
        compiled = ratios["ours compiled"] / ratios["non-private compiled"]
        bars.append(_at_most(f"ours compiled / non-private compiled, {label}", compiled, 1.25))
    peers = [ratios[mode] for mode in OPACUS if mode in ratios]
    if peers:
        gain = min(peers) / ratios["ours"]
        bars.append(Bar(name=f"better Opacus mode / ours, {label}", value=gain, bound=1.5, holds=gain >= 1.5))
    if time_only:
        return rows, bars
    on_cpu = place.device.type == "cpu"
    # A compiler's own memory is no part of a step's, and a CPU process cannot tell the two apart.
    peaks = {
        mode: peak_bytes(mode, shape, place) for mode in modes if not (on_cpu and mode.endswith("compiled"))
    }
    for mode, peak in peaks.items():
        rows.append(
            Row(
                name=mode,
                config=config,
                value=peak / 2**20,
                unit="MiB peak",
                baseline=baseline,
                ratio=peak / peaks[baseline],
                spread=0.0,
            )
        )
    memory = peaks["ours"] / peaks[baseline]
    bars.append(_at_most(f"peak memory, ours / {baseline}, {label}", memory, 1.05))
    return rows, bars


def _at_most(name: str, value: float, bound: float) -> Bar:
    return Bar(name=name, value=value, bound=bound, holds=value <= bound)


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    """Returns what was asked for."""
    if options.models is None and options.device == "cpu":
        return [SHAPES[index] for index in options.shapes]
    found = []
    for name in options.models or CUDA_MODELS:
        lengths = options.lengths or CUDA_LENGTHS.get(name, (512, 1024))
        found += [shape_of(name, length) for length in lengths]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tied", action="store_true", help="tie embedding and head; leaves Opacus out")
    parser.add_argument(
        "--shapes", type=int, nargs="*", default=[0, 1, 2], help="which of the three CPU shapes"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--models", nargs="+", default=None, help="named models instead, see _models.shape_of"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="lengths of named models")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default=None, help="bfloat16 is cuda's default"
    )
    parser.add_argument("--eager", action="store_true", help="leave compiled modes out, baseline included")
    parser.add_argument("--time-only", action="store_true", help="leave peak memory out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Opacus warns about its own hooks
    keep_freed_memory()  # as dpfa train does; it helps every mode
    place = Place(
        device=torch.device(options.device),
        bf16=(options.dtype or ("bfloat16" if options.device == "cuda" else "float32")) == "bfloat16",
        tied=options.tied,
    )
    if options.eager and options.device == "cuda":
        parser.error("--eager is for a CPU: on a GPU the baseline is compiled")
    rows: list[Row] = []
    bars: list[Bar] = []
    for shape in shapes_of(options):
        modes = [m for m in modes_for(shape, place) if not (options.eager and m.endswith("compiled"))]
        more_rows, more_bars = measure(
            shape, place, repeats=options.repeats, modes=modes, time_only=options.time_only
        )
        rows += more_rows
        bars += more_bars
    emit(Report(benchmark="train_step", rows=rows, bars=bars, peers=("opacus",)), as_json=options.json)


if __name__ == "__main__":
    main()
