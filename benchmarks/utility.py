"""What does privacy cost in accuracy? The built-in task at several ε, each beside its non-private twin.

The flights are public, so both are scored exactly. Every run draws its own split, sample and noise; the twin
has the same split, model, initial weights, number of steps and learning rates.

    python benchmarks/utility.py --json --plot docs/images/utility.svg > benchmarks/results/utility-DEVICE.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Bar, Report, Row, emit
from dp_flash_attention.training.choices import RunRequest
from dp_flash_attention.training.pipeline import Observer, run_private_training
from dp_flash_attention.training.tasks import Task, flights_task

Scores = list[tuple[float, float]]
"""(private AUC, twin's AUC) of each repeat."""

ACCEPTED_GAP = 0.01


def scores(task: Task, epsilon: float, *, repeats: int, steps: int | None, progress: Progress) -> Scores:
    """Trains with ``epsilon`` and without privacy, ``repeats`` times."""
    found = []
    for repeat in range(repeats):
        bar = progress.add_task(f"ε = {epsilon:g}, run {repeat + 1}")
        observer = Observer(
            on_step=lambda report, bar=bar: progress.update(
                bar, completed=report.step, total=2 * report.num_steps
            ),
            on_twin_step=lambda step, total, bar=bar: progress.update(
                bar, completed=total + step, total=2 * total
            ),
        )
        with tempfile.TemporaryDirectory() as directory:
            outcome = run_private_training(
                task,
                RunRequest(epsilon=epsilon, num_steps=steps),
                out_dir=Path(directory) / "run",
                with_twin=True,
                observer=observer,
            )
        assert outcome.comparison is not None
        found.append((outcome.comparison["private"]["auc"], outcome.comparison["non_private"]["auc"]))
    return found


def report(measured: Mapping[float, Scores]) -> Report:
    """Turns scores by ε into rows and bars."""
    rows, bars = [], []
    for epsilon, pairs in measured.items():
        private, twin = (statistics.median(column) for column in zip(*pairs, strict=True))
        gaps = [other - own for own, other in pairs]
        rows.append(
            Row(
                name=f"AUC at ε = {epsilon:g}",
                config={"epsilon": epsilon, "repeats": len(pairs), "pairs": [list(pair) for pair in pairs]},
                value=private,
                unit="AUC",
                baseline=f"the same model without privacy, {twin:.4f}",
                ratio=private / twin,
                spread=(max(gaps) - min(gaps)) / 2,
            )
        )
        if epsilon == 1.0:
            gap = statistics.median(gaps)
            bars.append(
                Bar(name="AUC gap at ε = 1", value=gap, bound=ACCEPTED_GAP, holds=gap <= ACCEPTED_GAP)
            )
    return Report(benchmark="utility", rows=rows, bars=bars)


def plot(measured: Mapping[float, Scores], path: Path) -> None:
    """Draws how much AUC privacy costs. Each run has a hold-out of its own, so a model is compared with its twin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    epsilons = sorted(measured)
    gaps = [[other - own for own, other in measured[epsilon]] for epsilon in epsilons]
    axes.plot(epsilons, [statistics.median(each) for each in gaps], color="#0b6bcb", lw=2, marker="o")
    for epsilon, each in zip(epsilons, gaps, strict=True):
        axes.plot([epsilon] * len(each), each, ".", color="#0b6bcb", alpha=0.5)
    axes.axhline(ACCEPTED_GAP, color="#888", lw=1, ls="--")
    axes.text(epsilons[-1], ACCEPTED_GAP, "aim at ε = 1", ha="right", va="bottom", color="#666", fontsize=9)
    twins = [other for pairs in measured.values() for _, other in pairs]
    axes.set_xscale("log", base=2)
    axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    axes.set_ylim(bottom=0.0)
    axes.set(xlabel="ε of the whole run (δ = 1e-6)", ylabel="AUC below the same model\nwithout privacy")
    title = f"Late arrivals of 336,776 flights: what privacy costs (AUC without it: {statistics.median(twins):.3f})"
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="instead of the default's 200 or so")
    parser.add_argument("--plot", type=Path, default=None, help="where to draw what privacy costs")
    options = parser.parse_args(arguments)
    task = flights_task()
    with Progress(console=Console(stderr=True)) as progress:
        measured = {
            epsilon: scores(task, epsilon, repeats=options.repeats, steps=options.steps, progress=progress)
            for epsilon in options.epsilons
        }
    if options.plot is not None:
        plot(measured, options.plot)
    emit(report(measured), as_json=options.json)


if __name__ == "__main__":
    main()
