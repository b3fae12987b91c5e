"""How fast is each kind of noise beside torch's own and beside OpenDP's, and does its time tell its value?

Normals are timed on all of torch's threads, as in training; exact samplers on one. OpenDP draws one number after the
other, so it gets fewer of them. The last rows time single draws: Spearman's ρ between a call's time and the magnitude
of what it returned, where 0 is what a secret deserves.

    python benchmarks/noise.py --json > benchmarks/results/noise-DEVICE.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Bar, Report, Row, emit, run_interleaved
from dp_flash_attention.noise import DiscreteGaussianGenerator, ExactCipher, SecretKey, make_generator
from dp_flash_attention.noise.wide_discrete_gaussian import WideDiscreteGaussian
from dp_flash_attention.noise.wide_skellam import WideSkellam
from dp_flash_attention.quantum.checks.timing import (
    correlation,
    one_at_a_time,
    walking_sampler,
    wide_at_a_time,
)
from dp_flash_attention.quantum.exact_noise import noise_for, skellam_noise_for

NORMALS = 10_000_000
INTEGERS = 4_000_000
PEER_INTEGERS = 20_000
Draw = Callable[[], object]


def normals(name: str) -> Draw:
    generator = make_generator(name, SecretKey.from_os())  # type: ignore[arg-type]
    out, step = torch.empty(NORMALS), iter(range(10**9))
    return lambda: generator.fill_normal_(out, step=next(step), stream=0)


def torch_normals() -> Draw:
    out = torch.empty(NORMALS)
    return lambda: torch.randn(NORMALS, out=out)


def on_one_thread(draw: Draw) -> Draw:
    def timed() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        draw()
        torch.set_num_threads(before)

    return timed


def exact(stddev: int, cipher: ExactCipher = "aes-256-ctr") -> Draw:
    generator = DiscreteGaussianGenerator(SecretKey.from_os(), stddev=stddev, cipher=cipher)
    out, step = torch.empty(INTEGERS, dtype=torch.int64), iter(range(10**9))
    return lambda: generator.fill_(out, step=next(step), stream=0)


def wide(sampler: WideDiscreteGaussian | WideSkellam, cipher: ExactCipher = "aes-256-ctr") -> Draw:
    key, step = SecretKey.from_os(), iter(range(10**9))
    return lambda: sampler.draw(key, INTEGERS, step=next(step), cipher=cipher)


def opendp_gaussian(stddev: int) -> Callable[[list[int]], Any]:
    """Returns OpenDP's exact discrete Gaussian mechanism on integer vectors."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
    mechanism: Callable[[list[int]], Any] = dp.m.make_gaussian(*space, scale=float(stddev))
    return mechanism


def opendp(stddev: int) -> Draw:
    mechanism, zeros = opendp_gaussian(stddev), [0] * PEER_INTEGERS
    return lambda: mechanism(zeros)


def rate_rows(
    cases: dict[str, Draw], counts: dict[str, int], config: dict[str, Any], baseline: str, repeats: int
) -> tuple[list[Row], dict[str, float]]:
    """Times all cases in turn; a rate is numbers over the median time, in millions a second."""
    timings = run_interleaved(cases, repeats=repeats, warmup=2)
    rates = {name: counts[name] / timing.median_s / 1e6 for name, timing in timings.items()}
    rows = [
        Row(
            name=name,
            config={**config, "numbers": counts[name]},
            value=rates[name],
            unit="M/s",
            baseline=baseline,
            ratio=rates[name] / rates[baseline],
            spread=timing.spread,
        )
        for name, timing in timings.items()
    ]
    return rows, rates


def at_least(name: str, value: float, bound: float) -> Bar:
    return Bar(name=name, value=value, bound=bound, holds=value >= bound)


def measure_normals(repeats: int) -> tuple[list[Row], list[Bar]]:
    cases = {"torch.randn": torch_normals(), "secure": normals("secure"), "fast": normals("fast")}
    config = {"dtype": "float32", "threads": torch.get_num_threads()}
    rows, rates = rate_rows(cases, dict.fromkeys(cases, NORMALS), config, "torch.randn", repeats)
    return rows, [at_least("secure normals / torch.randn", rates["secure"] / rates["torch.randn"], 1.0)]


def measure_exact(repeats: int) -> tuple[list[Row], list[Bar]]:
    rows: list[Row] = []
    bars: list[Bar] = []
    for stddev, bound in ((4, 25.0), (32, 3.0), (2**17, None)):
        ours = {"exact, AES-256-CTR": exact(stddev), "exact, SHAKE256": exact(stddev, "shake256")}
        if stddev >= 2**14:
            gaussian, skellam = (law(Fraction(stddev) ** 2) for law in (WideDiscreteGaussian, WideSkellam))
            ours |= {
                "wide, AES-256-CTR": wide(gaussian),
                "wide, SHAKE256": wide(gaussian, "shake256"),
                "wide Skellam, AES-256-CTR": wide(skellam),
            }
        cases = {name: on_one_thread(draw) for name, draw in (ours | {"OpenDP": opendp(stddev)}).items()}
        counts = dict.fromkeys(ours, INTEGERS) | {"OpenDP": PEER_INTEGERS}
        more, rates = rate_rows(cases, counts, {"σ": stddev, "threads": 1}, "OpenDP", repeats)
        rows += more
        if bound is not None:
            bars.append(at_least(f"exact, σ = {stddev}, one core, M/s", rates["exact, AES-256-CTR"], bound))
    return rows, bars


def measure_timing(calls: int) -> tuple[list[Row], list[Bar]]:
    """Spearman's ρ of time and magnitude, one number a call; ``spread`` is its standard deviation by chance."""
    peer = opendp_gaussian(4)
    samplers = {
        "exact, AES-256-CTR": one_at_a_time(DiscreteGaussianGenerator(SecretKey.from_os(), stddev=4)),
        "wide Gaussian, AES-256-CTR": wide_at_a_time(noise_for),
        "wide Skellam, AES-256-CTR": wide_at_a_time(skellam_noise_for),
        "OpenDP": lambda call: peer([0])[0],
        "a walk along the table": walking_sampler(),
    }
    found = {name: correlation(draw, calls) for name, draw in samplers.items()}
    rows = [
        Row(
            name=name,
            config={"σ": "1.3 million" if name.startswith("wide") else 4, "calls": calls},
            value=rho,
            unit="Spearman's ρ of time and |noise|",
            baseline="OpenDP",
            ratio=rho / found["OpenDP"],
            spread=calls**-0.5,
        )
        for name, rho in found.items()
    ]
    bars = [
        Bar(name=f"|ρ| of {name}", value=abs(rho), bound=0.02, holds=abs(rho) < 0.02)
        for name, rho in found.items()
        if name.endswith("AES-256-CTR")
    ]
    return rows, bars


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--calls", type=int, default=50_000, help="timed single draws of each sampler")
    options = parser.parse_args()
    rows: list[Row] = []
    bars: list[Bar] = []
    for more_rows, more_bars in (
        measure_normals(options.repeats),
        measure_exact(options.repeats),
        measure_timing(options.calls),
    ):
        rows += more_rows
        bars += more_bars
    emit(Report(benchmark="noise", rows=rows, bars=bars, peers=("opendp",)), as_json=options.json)


if __name__ == "__main__":
    main()
