"""What does the noise, the division and the optimizer's update of a step cost, in which order and with which optimizer?

The sums are there already; every case ends with the same parameters up to rounding. ``noise, divide`` goes parameter by
parameter, as ``one by one``; ``all noise first`` draws for all of them before torch divides the first. ``in chunks`` gives
each chunk of a parameter its noise and its update while it is in a cache, with the division inside the update.

    python benchmarks/optimizer_update.py --json > benchmarks/results/optimizer_update-DEVICE.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Report, Row, emit, run_interleaved
from dp_flash_attention.noise import SecretKey, make_generator

SHAPES = [(1024, 4096), (4096, 1024), (3072, 1024), (1024, 1024), (1024,), (4096,)] * 3 + [(8192, 1024)]
BATCH = 256.0
CHUNK = 1 << 22
BASELINE = "Adam, one by one"


class Update:
    """A model's parameters, their sums, and an optimizer whose state exists."""

    def __init__(self, *, fused: bool, order: str) -> None:
        self._parameters = [nn.Parameter(0.02 * torch.randn(shape)) for shape in SHAPES]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-3, fused=fused)
        self._generator, self._step, self._order = make_generator("secure", SecretKey.from_os()), 0, order
        self._sums = [torch.randn(shape) for shape in SHAPES]
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = total.clone()
        self._optimizer.step()

    def __call__(self) -> None:
        """Takes one step."""
        self._step += 1
        if self._order == "in chunks":
            self._in_chunks()
            return
        pairs = list(zip(self._parameters, self._sums, strict=True))
        if self._order == "all noise first":
            for stream, total in enumerate(self._sums):
                self._generator.add_normal_(total, stddev=1.0, step=self._step, stream=stream)
        for stream, (parameter, total) in enumerate(pairs):
            if self._order == "one by one":
                self._generator.add_normal_(total, stddev=1.0, step=self._step, stream=stream)
            parameter.grad = total.div_(BATCH)
        self._optimizer.step()

    def _in_chunks(self) -> None:
        batch, finite = torch.tensor(BATCH), torch.zeros(())
        for stream, (parameter, total) in enumerate(zip(self._parameters, self._sums, strict=True)):
            state = self._optimizer.state[parameter]
            state["step"] += 1
            flat = [t.detach().view(-1) for t in (parameter, total, state["exp_avg"], state["exp_avg_sq"])]
            for start in range(0, total.numel(), CHUNK):
                p, g, m, v = (tensor[start : start + CHUNK] for tensor in flat)
                # The numbers are not those of the position, which a chunk cannot ask for; their cost is.
                self._generator.add_normal_(g, stddev=1.0, step=self._step, stream=stream)
                torch._fused_adamw_(
                    [p], [g], [m], [v], [], [state["step"]],
                    lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=1e-2, eps=1e-8,
                    amsgrad=False, maximize=False, grad_scale=batch, found_inf=finite,
                )  # fmt: skip


CASES: dict[str, tuple[bool, str]] = {
    BASELINE: (False, "one by one"),
    "Adam, all noise first": (False, "all noise first"),
    "fused Adam, one by one": (True, "one by one"),
    "fused Adam, all noise first": (True, "all noise first"),
    "fused Adam, in chunks": (True, "in chunks"),
}


def measure(repeats: int) -> list[Row]:
    cases: dict[str, Callable[[], object]] = {
        name: Update(fused=fused, order=order) for name, (fused, order) in CASES.items()
    }
    timings = run_interleaved(cases, repeats=repeats, warmup=1)
    config = {
        "parameters": sum(torch.Size(shape).numel() for shape in SHAPES),
        "threads": torch.get_num_threads(),
    }
    return [
        Row(
            name=name,
            config=config,
            value=1e3 * timing.median_s,
            unit="ms",
            baseline=BASELINE,
            ratio=timing.median_s / timings[BASELINE].median_s,
            spread=timing.spread,
        )
        for name, timing in timings.items()
    ]


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    emit(Report(benchmark="optimizer_update", rows=measure(options.repeats)), as_json=options.json)


if __name__ == "__main__":
    main()
