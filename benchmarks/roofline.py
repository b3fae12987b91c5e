"""What could a private step cost at best? Counts of products and bytes, divided by a machine's peaks. Nothing is measured.

For the linear maps of one transformer block (q, k, v, output, two of a feed-forward layer four times as wide), for each
way of taking a linear map's per-example norm and each strategy. A part's time is the larger of its products over the
peak rate and its bytes over the bandwidth; parts add up. What a real step reaches of it is ``train_step``'s to say.

    python benchmarks/roofline.py --json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Report, Row, emit


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Peaks, from data sheets.

    Attributes:
        name: What it is.
        flops: Products and additions a second in the step's precision.
        bytes_per_s: Memory bandwidth.
        float_bytes: Bytes of a number that is recorded.
    """

    name: str
    flops: float
    bytes_per_s: float
    float_bytes: int


MACHINES = (
    # H100 SXM data sheet: dense bfloat16 tensor cores, HBM3.
    Machine(name="H100 SXM, bfloat16", flops=989e12, bytes_per_s=3.35e12, float_bytes=2),
    # Two Zen 4 cores: 2 fused multiply-adds of 8 float32 numbers a cycle at 2.6 GHz; a share of one socket's 12 channels of
    # DDR5-4800 by cores of 64 would be 14 GB/s, two channels' 77 GB/s: 25 GB/s is assumed.
    Machine(
        name="2 cores of an AMD EPYC, float32", flops=2 * 2 * 8 * 2 * 2.6e9, bytes_per_s=25e9, float_bytes=4
    ),
)
SHAPES = [(768, 512), (768, 1024), (768, 4096), (1280, 1024), (2048, 2048), (4096, 1024), (4096, 4096)]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Products (multiply-add = 2) and bytes of one block's linear maps, for one example."""

    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """Returns the time at the machine's peaks."""
        return max(self.flops / machine.flops, self.bytes / machine.bytes_per_s)


def non_private(d: int, t: int, size: int, batch: int) -> list[Cost]:
    """Forward, input gradient and weight gradient: 24·T·d² each; activations and weights once each."""
    moved = size * (16 * d * t + 12 * d * d / batch)
    return [Cost(flops=24 * t * d * d, bytes=moved)] * 3


def norm(form: str, d: int, t: int, size: int) -> Cost:
    """What one form of the norm adds.

    Gram: ``T²(D + P)`` for each map, the symmetric half, 16·T²·d for the four. Outer: a weight gradient's products once
    more. Formed: no product, but 12·d² float32 numbers written, read for the norm and read for the weighted sum.
    """
    read = size * 16 * d * t
    if form == "gram":
        return Cost(flops=16 * t * t * d, bytes=read)
    if form == "outer":
        return Cost(flops=24 * t * d * d, bytes=read)
    # The products of the weight gradient are done when they are formed, and not again.
    return Cost(flops=0, bytes=3 * 4 * 12 * d * d)


def rows_of(machine: Machine, d: int, t: int, batch: int) -> Iterator[Row]:
    """Yields the ratio to the non-private block of each form, and of two passes with the best of them."""
    size = machine.float_bytes
    passes = non_private(d, t, size, batch)
    base = sum(cost.seconds(machine) for cost in passes)
    totals = {form: base + norm(form, d, t, size).seconds(machine) for form in ("gram", "outer", "formed")}
    totals["best form"] = min(totals.values())
    totals["two_pass, best form"] = totals["best form"] + sum(cost.seconds(machine) for cost in passes[:2])
    for name, taken in totals.items():
        yield Row(
            name=name,
            config={**asdict(machine), "d_model": d, "seq_len": t, "batch_size": batch},
            value=taken * 1e6,
            unit="us an example, computed",
            baseline="non-private, computed",
            ratio=taken / base,
            spread=0.0,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of a microbatch")
    options = parser.parse_args()
    rows = [
        row
        for machine in MACHINES
        for d, t in SHAPES
        for row in rows_of(machine, d, t, max(1, options.tokens // t))
    ]
    emit(Report(benchmark="roofline", rows=rows), as_json=options.json)


if __name__ == "__main__":
    main()
