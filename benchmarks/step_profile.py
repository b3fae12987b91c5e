"""Where does the time of a private step go, beside the non-private one?

The real steps of ``train_step``, with ``torch.profiler`` labels put around their parts from outside: forward, backward,
norms (with the gradients that are formed for them), weighted gradients, noise, optimizer. Time is the CPU's, or on a GPU
that of the kernels.

    python benchmarks/step_profile.py --json --plot docs/images/profile.svg > benchmarks/results/step_profile-DEVICE.json
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent))

import _steps
from _harness import Report, Row, emit
from _models import Shape, shape_of
from _steps import MODES, Place
from dp_flash_attention.clipping import accumulator, group_clipping
from dp_flash_attention.clipping.contributions import LinearContribution
from dp_flash_attention.training.memory import keep_freed_memory
from train_step import SHAPES

# In the order of a step. What a step spends outside of all of them is "rest".
PARTS = ("forward", "backward", "norms", "weighted gradients", "noise", "optimizer", "rest")
COLOURS = ("#0b6bcb", "#63b3ed", "#c53030", "#ed8936", "#805ad5", "#718096", "#e2e8f0")


@contextmanager
def labelled() -> Iterator[None]:
    """Puts labels around the parts of every step that is built and run inside."""
    targets = (
        (_steps, "losses_of", "loss"),
        (group_clipping, "group_sq_norms", "norms of records"),
        (LinearContribution, "formed", "formed"),
        (accumulator, "add_group", "norms and sums"),
        (torch.Tensor, "backward", "whole backward"),
        (torch.optim.AdamW, "step", "optimizer"),
    )
    patches = [
        patch.object(owner, name, _label(getattr(owner, name), label)) for owner, name, label in targets
    ]
    built, generator = _steps._built, Place.generator

    def labelled_built(*arguments: Any) -> Any:
        model, optimizer, data = built(*arguments)
        model.register_forward_pre_hook(lambda *_: model.__dict__.__setitem__("_part", _entered("model")))
        model.register_forward_hook(lambda *_: model.__dict__.pop("_part").__exit__(None, None, None))
        return model, optimizer, data

    def labelled_generator(place: Place) -> Any:
        made = generator(place)
        return _Labelled(made)

    patches += [
        patch.object(_steps, "_built", labelled_built),
        patch.object(Place, "generator", labelled_generator),
    ]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


class _Labelled:
    def __init__(self, generator: Any) -> None:
        self.add_normal_ = _label(generator.add_normal_, "noise")


def _label(call: Callable[..., Any], label: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def labelled_call(*arguments: Any, **named: Any) -> Any:
        with torch.profiler.record_function(label):
            return call(*arguments, **named)

    return labelled_call


def _entered(label: str) -> Any:
    context = torch.profiler.record_function(label)
    context.__enter__()
    return context


def parts_of(mode: str, shape: Shape, place: Place, *, repeats: int) -> dict[str, float]:
    """Returns the median milliseconds of each part of a step."""
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    on_gpu = place.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with labelled():
        step = MODES[mode](shape, place)
        step()
        for _ in range(repeats):
            with (
                torch.profiler.profile(activities=activities) as seen,
                torch.profiler.record_function("step"),
            ):
                step()
                if on_gpu:
                    torch.cuda.synchronize()
            times = {
                row.key: (row.device_time_total if on_gpu else row.cpu_time_total) / 1e3
                for row in seen.key_averages()
            }
            for part, taken in _split(times).items():
                found[part].append(taken)
    return {part: statistics.median(values) for part, values in found.items()}


def _split(times: Mapping[str, float]) -> dict[str, float]:
    def of(label: str) -> float:
        return times.get(label, 0.0)

    split = {
        "forward": of("model") + of("loss"),
        # Gradients that are formed for their norm are formed inside the backward pass.
        "backward": of("whole backward") - of("formed"),
        "norms": of("norms of records") + of("formed"),
        "weighted gradients": of("norms and sums") - of("norms of records"),
        "noise": of("noise"),
        "optimizer": of("optimizer"),
    }
    return split | {"rest": max(0.0, of("step") - sum(split.values()))}


def plot(found: Sequence[tuple[str, dict[str, float]]], path: Path) -> None:
    """Draws the parts of each step as one bar."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "dp-flash-attention"  # the same file for the same figures
    figure = Figure(figsize=(9, 0.9 + 0.45 * len(found)), layout="constrained")
    axes = figure.subplots()
    for k, (_, parts) in enumerate(found):
        left = 0.0
        for part, colour in zip(PARTS, COLOURS, strict=True):
            axes.barh(k, parts[part], left=left, color=colour, label=part if k == 0 else None)
            left += parts[part]
    axes.set_yticks(range(len(found)), [name for name, _ in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms in a step")
    figure.legend(
        *axes.get_legend_handles_labels(),
        ncols=len(PARTS),
        loc="outside upper center",
        fontsize=7,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--shapes", type=int, nargs="+", default=[0, 2], help="which of train_step's CPU shapes"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--models", nargs="+", default=None, help="named models instead of train_step's CPU shapes"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512])
    parser.add_argument("--plot", type=Path, default=None, help="where to draw the parts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_freed_memory()  # as dpfa train does
    place = Place(device=torch.device(options.device), bf16=options.device == "cuda")
    shapes = [shape_of(name, t) for name in options.models or () for t in options.lengths] or [
        SHAPES[k] for k in options.shapes
    ]
    drawn, rows = [], []
    for shape in shapes:
        whole = 0.0
        for mode in ("non-private eager", "ours"):
            parts = parts_of(mode, shape, place, repeats=options.repeats)
            whole = whole or sum(parts.values())  # the non-private step's
            drawn.append((f"{mode}\nd={shape.d_model}, T={shape.seq_len}, B={shape.batch_size}", parts))
            rows += [
                Row(
                    name=f"{mode}: {part}",
                    config=asdict(shape),
                    value=taken,
                    unit="ms",
                    baseline="whole non-private step",
                    ratio=taken / whole,
                    spread=0.0,
                )
                for part, taken in parts.items()
            ]
    if options.plot is not None:
        plot(drawn, options.plot)
    emit(Report(benchmark="step_profile", rows=rows), as_json=options.json)


if __name__ == "__main__":
    main()
