"""What every benchmark shares: interleaved timing, the JSON form, and the table."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_OUR_PACKAGES = ("dp-flash-attention", "torch", "numpy", "cryptography", "dp-accounting")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured figure.

    Attributes:
        name: What was measured.
        config: Its settings.
        value: The figure.
        unit: Its unit.
        baseline: What ``ratio`` compares with.
        ratio: ``value`` over the baseline's.
        spread: Half the distance between quartiles over the median, or as the benchmark says.
    """

    name: str
    config: Mapping[str, Any]
    value: float
    unit: str
    baseline: str
    ratio: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure that was promised, and whether it holds."""

    name: str
    value: float
    bound: float
    holds: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """A benchmark's result.

    Attributes:
        benchmark: Its name.
        rows: Figures.
        bars: Promises.
        peers: Packages compared with, for their versions.
        device: What it was measured on, if not ``device_name()``.
    """

    benchmark: str
    rows: Sequence[Row]
    bars: Sequence[Bar] = ()
    peers: Sequence[str] = ()
    device: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the form that every benchmark prints with ``--json``."""
        return {
            "benchmark": self.benchmark,
            "device": self.device or device_name(),
            "versions": {
                "python": platform.python_version(),
                **{name: _version(name) for name in (*_OUR_PACKAGES, *self.peers)},
            },
            "rows": [asdict(row) for row in self.rows],
            "bars": [asdict(bar) for bar in self.bars],
        }


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one case's repeats."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median_s


def run_interleaved(
    cases: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times all cases in turn, so that a slow moment of the machine falls on each of them.

    Args:
        cases: What to time, by name.
        repeats: Timed rounds; every round starts with another case.
        warmup: Rounds before them that are not timed.
        clock: Seconds; ``time.process_time`` counts the process's own work on a machine that others use too.
    """
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(warmup + repeats):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            taken = _seconds(cases[name], clock)
            if round_number >= warmup:
                seconds[name].append(taken)
    return {name: Timing(seconds=tuple(values)) for name, values in seconds.items()}


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Times a call: by events of the CUDA stream where there is one, else by the clock."""
    if not torch.cuda.is_available():
        began = clock()
        call()
        return clock() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def _version(name: str) -> str:
    # The measured step needs neither of them on a machine that has torch alone.
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def device_name() -> str:
    """Returns the accelerator's name, or the processor's with the number of cores that may be used."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def processor_name() -> str:
    """Returns the processor's name, with the number of cores that may be used."""
    model = platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in information.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores, {torch.get_num_threads()} threads"


def emit(report: Report, *, as_json: bool) -> None:
    """Prints the report: one JSON object and nothing else, or a table."""
    found = report.to_dict()
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    # Not needed for JSON, and a machine that is lent to measure on may have little more than torch.
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        "case", "settings", "value", "ratio", "spread", title=f"{report.benchmark} on {found['device']}"
    )
    for row in report.rows:
        settings = ", ".join(f"{name}={value}" for name, value in row.config.items())
        table.add_row(
            row.name,
            settings,
            f"{row.value:.4g} {row.unit}",
            f"{row.ratio:.3f} x {row.baseline}",
            f"{row.spread:.1%}",
        )
    console.print(table)
    for bar in report.bars:
        verdict = "holds" if bar.holds else "DOES NOT HOLD"
        console.print(f"{bar.name}: {bar.value:.4g} (bound {bar.bound:g}): {verdict}")


def device_slug() -> str:
    """Returns the device's name as a part of a file's name: ``amd-epyc-2-cores``."""
    name = re.sub(r",? *\d+ threads$", "", device_name())
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    print(device_slug())  # for the Makefile, which names results by it
