"""How does the peak memory of a private step grow with the length of a record, beside the non-private step and Opacus?

A small GPT, few examples of T tokens, a fresh process for each figure. Two peaks are taken of each:

- *live*: bytes of tensors that exist at once in one step, by the allocator's events, parameters and optimizer state
  not included. This is what the algorithm needs.
- *resident*: by how much three steps raise the process's VmHWM, model and optimizer included, over a process that
  has run a tiny step. This is what the machine has to have: live memory and what the C library's heap cannot give back.

How the heap is set decides most of the difference, so ``--malloc`` says it: ``keep`` never returns blocks (as ``dpfa
train`` and the other benchmarks, for speed), ``map`` gives each block from 64 KiB its own mapping, ``default`` is the C
library's.

    python benchmarks/memory.py --json --plot docs/images/memory.svg > benchmarks/results/memory-DEVICE.json
    python benchmarks/memory.py --draw benchmarks/results/memory-DEVICE.json --plot docs/images/memory.svg
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Bar, Report, Row, emit
from _models import Shape, shape_of
from _steps import MODES, OPACUS, Place
from dp_flash_attention.training.live_memory import peak_live_bytes
from dp_flash_attention.training.memory import keep_freed_memory
from train_step import peak_resident_bytes

BASELINE = "non-private eager"
OURS = ("ours", "ours two_pass")
# Examples of each length: the rest of a fixed number of tokens would fill the machine with Opacus' gradients alone.
BATCHES = {512: 4, 1024: 4, 2048: 2, 4096: 2}
_M_MMAP_THRESHOLD = -3


def shape_at(seq_len: int) -> Shape:
    """Returns the model at a length."""
    return Shape(
        vocab_size=1024,
        seq_len=seq_len,
        d_model=128,
        num_heads=4,
        num_layers=2,
        batch_size=BATCHES.get(seq_len, 1),
    )


def peaks_of(mode: str, shape: Shape, malloc: str) -> dict[str, int]:
    """Returns live and resident peak bytes of a mode, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(mode, shape, malloc, sender))
    process.start()
    sender.close()  # so that a child that dies is an error here and not a wait for ever
    found: dict[str, int] = receiver.recv()
    process.join()
    return found


def _measure(mode: str, shape: Shape, malloc: str, sender: Any) -> None:
    warnings.simplefilter("ignore")
    if malloc == "keep":
        keep_freed_memory()
    elif malloc == "map":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 64 * 1024)
    place = Place(device=torch.device("cpu"))
    # A tiny model first, so that libraries and thread pools are not counted as the step's memory.
    MODES[mode](shape_of("tiny", 8), place)()
    before = peak_resident_bytes()
    step = MODES[mode](shape, place)
    for _ in range(2):
        step()
    resident = peak_resident_bytes() - before
    live = peak_live_bytes(step, device=place.device)
    sender.send({"live": live, "resident": resident})


def measure(seq_len: int, *, modes: Sequence[str], malloc: str) -> tuple[list[Row], list[Bar]]:
    """Measures all modes at one length."""
    shape = shape_at(seq_len)
    peaks = {mode: peaks_of(mode, shape, malloc) for mode in modes}
    rows = [
        Row(
            name=mode,
            config={**asdict(shape), "malloc": malloc, "peak": kind},
            value=found[kind] / 2**20,
            unit="MiB",
            baseline=BASELINE,
            ratio=found[kind] / peaks[BASELINE][kind],
            spread=0.0,
        )
        for mode, found in peaks.items()
        for kind in ("live", "resident")
    ]
    bars = []
    for mode in OURS:
        for kind in ("live", "resident"):
            ratio = peaks[mode][kind] / peaks[BASELINE][kind]
            name = f"{kind} peak, {mode} / non-private, T={seq_len}, B={shape.batch_size}, malloc {malloc}"
            bars.append(Bar(name=name, value=ratio, bound=1.05, holds=ratio <= 1.05))
    return rows, bars


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws both peaks for each example against its length."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    matplotlib.rcParams["svg.hashsalt"] = "dp-flash-attention"  # the same file for the same figures
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("live", "resident"), strict=True):
        for mode, colour, mark in (
            (BASELINE, "black", "s"),
            ("ours", "#0b6bcb", "o"),
            ("ours two_pass", "#38a169", "^"),
            ("opacus per-sample", "#b7791f", "x"),
            ("opacus ghost", "#c53030", "+"),
        ):
            points = sorted(
                (row["config"]["seq_len"], row["value"] / row["config"]["batch_size"])
                for row in rows
                if row["name"] == mode and row["config"]["peak"] == kind
            )
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=mark, lw=1.2, label=mode)
        axes.set(xscale="log", yscale="log", xlabel="tokens of an example", title=f"{kind} peak")
        axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([512, 1024, 2048, 4096, 8192, 16384]))
        axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("MiB for each example")
    figure.axes[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16_384])
    parser.add_argument("--malloc", choices=("keep", "map", "default"), nargs="+", default=["keep"])
    parser.add_argument("--no-peers", action="store_true", help="leave Opacus out")
    parser.add_argument("--plot", type=Path, default=None, help="where to draw peaks against length")
    parser.add_argument(
        "--draw", type=Path, default=None, help="draw the figures of this file and measure nothing"
    )
    options = parser.parse_args()
    if options.draw is not None:
        kept = json.loads(options.draw.read_text(encoding="utf-8"))["rows"]
        kept = [row for row in kept if row["config"]["malloc"] == options.malloc[0]]
        plot(kept, options.plot or Path("memory.svg"))
        return
    modes = [BASELINE, *OURS, *(() if options.no_peers else OPACUS)]
    rows: list[Row] = []
    bars: list[Bar] = []
    for seq_len in options.lengths:
        for malloc in options.malloc:
            more_rows, more_bars = measure(seq_len, modes=modes, malloc=malloc)
            rows += more_rows
            bars += more_bars
            print(f"T={seq_len} malloc={malloc} done", file=sys.stderr)
    report = Report(benchmark="memory", rows=rows, bars=bars, peers=() if options.no_peers else ("opacus",))
    if options.plot is not None:
        first = [row for row in report.to_dict()["rows"] if row["config"]["malloc"] == options.malloc[0]]
        plot(first, options.plot)
    emit(report, as_json=options.json)


if __name__ == "__main__":
    main()
