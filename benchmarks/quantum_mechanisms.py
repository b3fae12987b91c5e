"""What do the quantum mechanisms' releases cost in time? Each beside plain ``secure`` noise for as many numbers.

python benchmarks/quantum_mechanisms.py --json > RESULT.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Bar, Report, Row, emit, run_interleaved
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import SecretKey, SecureNormalGenerator
from dp_flash_attention.quantum import (
    AmplitudeEstimationResistant,
    ConcentratedBudget,
    LatticeGaussian,
    LayeredNoise,
    PostQuantumGaussian,
)
from dp_flash_attention.quantum.exact_noise import noise_for

ONE = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)
PROMISED_RATIO = 3.0


class Steps:
    """A counter, so that no position of a generator is used twice."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self) -> int:
        """Returns the next whole number, from 0."""
        self._next += 1
        return self._next - 1


def cases(num: int) -> dict[str, Callable[[], object]]:
    """Returns what is timed, by name; the first is the baseline."""
    value = torch.zeros(num)
    counts = torch.zeros(num, dtype=torch.int64)
    normals, step = SecureNormalGenerator(SecretKey.from_os()), Steps()
    fine = PostQuantumGaussian()
    wide = noise_for(fine.plan(dimension=num, sensitivity=ONE, budget=BUDGET).variance)
    key = SecretKey.from_os()
    whole = Sensitivity(l2=1.0, neighboring_relation=ONE.neighboring_relation)
    memo = AmplitudeEstimationResistant(
        key=SecretKey.from_os(),
        charges=ConcentratedBudget(PrivacyBudget(epsilon=20.0, delta=1e-6)),
        data_version="v1",
    )
    return {
        "secure normals, float32": lambda: normals.add_normal_(
            value.clone(), stddev=4.3, step=step(), stream=0
        ),
        "PostQuantumGaussian, float32 on the default grid": lambda: fine.release(value, ONE, BUDGET),
        "PostQuantumGaussian, whole numbers": lambda: fine.release(counts, whole, BUDGET),
        "its exact noise alone": lambda: wide.draw(key, num, step=step()),
        "AmplitudeEstimationResistant, the same query again": lambda: memo.release(
            value, ONE, BUDGET, query="q"
        ),
    }


def small_cases() -> dict[str, Callable[[], object]]:
    """Returns mechanisms for short vectors."""
    lattice = LatticeGaussian(
        [[1.0, 0.5, 0.0, 0.0], [0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 1.0]]
    )
    ten = Sensitivity(l2=10.0, neighboring_relation=ONE.neighboring_relation)
    parties = LayeredNoise(num_parties=10, num_honest=6, grid=2.0**-6)
    rows = np.zeros((10, 1000))
    one = PostQuantumGaussian()
    return {
        "PostQuantumGaussian, one number": lambda: one.release(1.0, ONE, BUDGET),
        "LatticeGaussian, basis of 4": lambda: lattice.release(np.zeros(4), ten, BUDGET),
        "LayeredNoise, 10 parties x 1,000, Skellam": lambda: parties.release(rows, ONE, BUDGET),
    }


def report(num: int, repeats: int) -> Report:
    """Times everything."""
    timed = run_interleaved(cases(num), repeats=repeats, warmup=1)
    names = list(timed)
    base = timed[names[0]].median_s
    rows = [
        Row(
            name=name,
            config={"numbers": num, "threads": torch.get_num_threads()},
            value=num / timing.median_s / 1e6,
            unit="million numbers/s",
            baseline=f"time of {names[0]}",
            ratio=timing.median_s / base,
            spread=timing.spread,
        )
        for name, timing in timed.items()
    ]
    for name, timing in run_interleaved(small_cases(), repeats=10 * repeats, warmup=2).items():
        rows.append(
            Row(
                name=name,
                config={"threads": torch.get_num_threads()},
                value=timing.median_s * 1e3,
                unit="ms a release",
                baseline="itself",
                ratio=1.0,
                spread=timing.spread,
            )
        )
    bars = [
        Bar(
            name=f"{name}: time over plain secure noise",
            value=timed[name].median_s / base,
            bound=PROMISED_RATIO,
            holds=timed[name].median_s / base <= PROMISED_RATIO,
        )
        for name in names[1:3]
    ]
    return Report(benchmark="quantum_mechanisms", rows=rows, bars=bars)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--numbers", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    emit(report(options.numbers, options.repeats), as_json=options.json)


if __name__ == "__main__":
    main()
