"""What does a private attention call cost beside the best flash kernel of this machine?

One process, interleaved repeats, the same rows for everyone: torch's ``scaled_dot_product_attention`` on rows as they are,
against the whole private call (checks, plan, clip, kernel, noise: ``secure``, to which the bars apply, and ``exact``).
Rows are longer than their bound, so that clipping has work to do. Batch times heads is small; ratios do not depend on
it. "ours" is the back end that the library chooses by itself; those of ``--backends`` are asked for by name, and one
that refuses a call ends the run. On a machine without the package cryptography only ``--noise fast`` can be measured,
and every row says which noise it had.

    python benchmarks/attention.py --json > benchmarks/results/attention-DEVICE.json
    python benchmarks/attention.py --device cuda --lookups --json       # our kernel by name too, and few queries over many rows
    python benchmarks/attention.py --plot docs/images/attention.svg     # usefulness; measures nothing
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Bar, Report, Row, Timing, emit, processor_name, run_interleaved
from dp_flash_attention.attention import (
    AttentionBounds,
    CallNoise,
    dp_flash_attention,
    plan_attention_release,
)
from dp_flash_attention.attention.interface import AttentionNoise

LOOKUP_ROWS = 336_776
"""Rows of the table of flights that examples/private_lookup.py asks about."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape."""

    seq_len: int
    width: int
    causal: bool
    num_heads: int
    dtype: str = "float32"
    device: str = "cpu"
    noise: str = "secure"
    num_queries: int | None = None  # as many as rows

    @property
    def label(self) -> str:
        """The shape in words."""
        queries = "" if self.num_queries is None else f"{self.num_queries} queries, "
        return f"{queries}T={self.seq_len}, D={self.width}{', causal' if self.causal else ''}"


def heads_for(seq_len: int) -> int:
    """Enough heads for a few tens of milliseconds, at least one."""
    return max(1, 8192 // seq_len)


def rows(case: Case, *, needs_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    counts = (case.num_queries or case.seq_len, case.seq_len, case.seq_len)
    dtype = getattr(torch, case.dtype)
    return [
        torch.randn(1, case.num_heads, count, case.width).to(case.device, dtype).requires_grad_(needs_grad)
        for count in counts
    ]


def baseline(case: Case, *, backward: bool) -> Callable[[], object]:
    query, key, value = rows(case, needs_grad=backward)

    def run() -> None:
        output = scaled_dot_product_attention(query, key, value, is_causal=case.causal)
        if backward:
            torch.autograd.grad(output.sum(), (query, key, value))

    return run


def ours(
    case: Case, *, backward: bool, backend: str = "auto", name: AttentionNoise | None = None
) -> Callable[[], object]:
    query, key, value = rows(case, needs_grad=backward)
    bounds = AttentionBounds(query_norm=4.0, key_norm=4.0, value_norm=4.0, num_rows=case.seq_len)
    # AES has no kernel: "triton" needs ChaCha20 wherever it runs.
    needs_chacha = case.device == "cuda" or backend == "triton"
    noise = CallNoise.from_os(name=name or case.noise, cipher="chacha20" if needs_chacha else "aes-256-ctr")

    def run() -> None:
        output, _ = dp_flash_attention(
            query, key, value, bounds=bounds, noise=noise, mu=1.0, is_causal=case.causal, backend=backend
        )
        if backward:
            torch.autograd.grad(output.sum(), (query, key, value))

    return run


WHO = {"torch SDPA": baseline, "ours, exact noise": partial(ours, name="exact"), "ours": ours}
BY_NAME = {"triton": partial(ours, backend="triton"), "flash": partial(ours, backend="flash")}


def peak_bytes(who: str, case: Case) -> int:
    """Returns by how much one forward call raises a fresh process's resident memory, inputs not counted (Linux)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(who, case, sender))
    process.start()
    sender.close()  # so that a child that dies ends the wait
    peak = int(receiver.recv())
    process.join()
    return peak


def _measure_peak(who: str, case: Case, sender: Any) -> None:
    WHO[who](Case(seq_len=16, width=case.width, causal=case.causal, num_heads=1), backward=False)()
    run = WHO[who](case, backward=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident_kib("VmRSS")
    run()
    sender.send((_resident_kib("VmHWM") - before) * 1024)


def _resident_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(
    case: Case, *, repeats: int, backward: bool, cpu_time: bool, backends: Sequence[str] = ()
) -> tuple[list[Row], list[Bar]]:
    # Exact noise stands on the ciphers that ``secure`` has; a machine without them measures neither.
    own = {who: make for who, make in WHO.items() if case.noise == "secure" or "exact" not in who}
    who = own | {f"ours, {name}": BY_NAME[name] for name in backends}
    cases = {each: make(case, backward=backward) for each, make in who.items()}
    clock = time.process_time if cpu_time else time.perf_counter
    timings = run_interleaved(cases, repeats=repeats, warmup=1, clock=clock)
    what = "forward and backward" if backward else "forward"
    base = timings["torch SDPA"]

    def row(who: str, timing: Timing) -> Row:
        return Row(
            name=f"{who}, {what}",
            config={**asdict(case), "threads": torch.get_num_threads(), "cpu_time": cpu_time},
            value=timing.median_s * 1e3,
            unit="ms",
            baseline="torch SDPA",
            ratio=timing.median_s / base.median_s,
            spread=timing.spread,
        )

    found = [row(each, timing) for each, timing in timings.items()]
    bars = []
    bound = None if backward or case.num_queries is not None else promised(case.seq_len, case.device)
    # The promise is for the noise that can be relied on.
    if bound is not None and case.noise == "secure":
        ratio = timings["ours"].median_s / base.median_s
        name = f"ours / torch SDPA, {case.label}"
        bars.append(Bar(name=name, value=ratio, bound=bound, holds=ratio <= bound))
    return found, bars


def promised(seq_len: int, device: str) -> float | None:
    """The bound on the forward ratio at a length, on a kind of device; None where none is promised."""
    steps = {8192: 1.05, 4096: 1.10, 2048: 1.20} if device == "cuda" else {8192: 1.05, 2048: 1.10}
    return next((bound for least, bound in steps.items() if seq_len >= least), None)


def memory(case: Case) -> list[Row]:
    peaks = {who: peak_bytes(who, case) for who in WHO}
    return [
        Row(
            name=f"{who}, forward",
            config=asdict(case),
            value=peaks[who] / 2**20,
            unit="MiB peak",
            baseline="torch SDPA",
            ratio=peaks[who] / peaks["torch SDPA"],
            spread=0.0,
        )
        for who in WHO
        if who != "torch SDPA"
    ]


def plot(path: Path) -> None:
    """Draws the best signal-to-noise ratio of one answer against the number of rows, for several S, and of many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    one, many = figure.subplots(1, 2, sharey=True)
    counts = [round(10 ** (2 + i / 8)) for i in range(33)]

    def curve(s: float, *, num_queries: int, value_width: int) -> list[float]:
        found = []
        for count in counts:
            bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=count)
            plan = plan_attention_release(
                bounds, num_queries=num_queries, query_width=32, value_width=value_width, scale=s, mu=0.2367
            )
            found.append(float(plan.signal_to_noise().min()))
        return found

    for s in (0.5, 1.0, 2.0, 3.0, 4.0):
        one.plot(counts, curve(s, num_queries=1, value_width=1), label=f"S = {s:g}")
    for num_queries, width in ((1, 1), (1, 64), (1000, 1), (1000, 64)):
        label = f"{num_queries} quer{'y' if num_queries == 1 else 'ies'}, {width} numbers each"
        many.plot(counts, curve(1.0, num_queries=num_queries, value_width=width), label=label)
    one.set_title("One query, one number", loc="left", fontsize=11)
    many.set_title("S = 1", loc="left", fontsize=11)
    one.set_ylabel("largest signal / noise at ε = 1, δ = 1e-6")
    for axes in (one, many):
        axes.axhline(1.0, color="#8a94a3", ls=":", lw=1)
        axes.set(xscale="log", yscale="log", xlabel="rows that a query sees")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="cuda if there is one")
    parser.add_argument("--dtype", default=None, help="bfloat16 on a GPU and float32 on a CPU if not given")
    parser.add_argument("--noise", choices=("secure", "fast"), default="secure")
    parser.add_argument(
        "--backends", nargs="*", choices=tuple(BY_NAME), default=None, help="by name; triton on a GPU"
    )
    parser.add_argument("--lookups", action="store_true", help="measure few queries over many rows too")
    parser.add_argument(
        "--backward-up-to", type=int, default=1 << 20, help="longest length with a backward pass"
    )
    parser.add_argument("--plot", type=Path, default=None, help="draw usefulness there, and measure nothing")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread's own time: for a machine that others use too"
    )
    options = parser.parse_args()
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch sees none")
    on_gpu = options.device == "cuda"
    if options.dtype is None:
        options.dtype = "bfloat16" if on_gpu else "float32"
    if options.backends is None:
        options.backends = ["triton"] if on_gpu else []
    return options


def main() -> None:
    options = parsed()
    if options.cpu_time:
        torch.set_num_threads(1)
    if options.plot is not None:
        plot(options.plot)
        return
    found: list[Row] = []
    bars: list[Bar] = []
    kind = {"dtype": options.dtype, "device": options.device, "noise": options.noise}

    def add(case: Case, *, backward: bool) -> None:
        repeats = options.repeats if case.seq_len < 8192 else max(3, options.repeats // 2)
        more, promises = measure(
            case,
            repeats=repeats,
            backward=backward,
            cpu_time=options.cpu_time,
            backends=options.backends,
        )
        found.extend(more)
        bars.extend(promises)

    for seq_len in options.lengths:
        for width in options.widths:
            for causal in (False, True):
                case = Case(seq_len=seq_len, width=width, causal=causal, num_heads=heads_for(seq_len), **kind)
                for backward in (False, True) if seq_len <= options.backward_up_to else (False,):
                    add(case, backward=backward)
    for num_queries in (1, 30, 1000) if options.lookups else ():
        add(
            Case(seq_len=LOOKUP_ROWS, width=64, causal=False, num_heads=1, num_queries=num_queries, **kind),
            backward=False,
        )
    if options.device == "cpu" and 4096 in options.lengths:
        found += memory(Case(seq_len=4096, width=64, causal=False, num_heads=16, **kind))
    device = processor_name() if options.device == "cpu" else None
    emit(Report(benchmark="attention", rows=found, bars=bars, device=device), as_json=options.json)


if __name__ == "__main__":
    main()
