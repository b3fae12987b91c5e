"""What do the quantum mechanisms' releases cost in time? Each beside plain ``secure`` noise for as many numbers.

python benchmarks/quantum_mechanisms.py --json > RESULT.json

``--clock cpu`` counts the process's own work on all its threads instead of the time that passes: the work's ratio, on a machine
that others use too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from dp_flash_attention.quantum.layered_plan import LayeredPlan

ONE = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)
PROMISED_RATIO = 3.0
_PARTIES, _HONEST = 10, 6
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Steps:
    """A counter, so that no position of a generator is used twice."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self) -> int:
        """Returns the next whole number, from 0."""
        self._next += 1
        return self._next - 1


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        call: The work.
        bar: Whether it is promised to take at most three times the baseline's time.
    """

    call: Callable[[], object]
    bar: bool = True


def cases(num: int) -> dict[str, Case]:
    """Returns what is timed, by name; the first is the baseline."""
    value = torch.zeros(num)
    counts = torch.zeros(num, dtype=torch.int64)
    normals, step = SecureNormalGenerator(SecretKey.from_os()), Steps()
    fine = PostQuantumGaussian()
    plan = fine.plan(dimension=num, sensitivity=ONE, budget=BUDGET)
    wide, key = noise_for(plan.variance), SecretKey.from_os()
    found = {
        "secure normals, float32": Case(
            lambda: normals.add_normal_(value.clone(), stddev=4.3, step=step(), stream=0), bar=False
        ),
        "PostQuantumGaussian, float32 on the default grid": Case(lambda: fine.release(value, ONE, BUDGET)),
        "PostQuantumGaussian, whole numbers": Case(lambda: fine.release(counts, ONE, BUDGET)),
        "its exact noise alone, default grid": Case(lambda: wide.draw(key, num, step=step()), bar=False),
    }
    return found | memo_cases(value) | lattice_cases(value) | layered_cases(value)


def memo_cases(value: torch.Tensor) -> dict[str, Case]:
    """Returns the memoised mechanism: a query that is new in every call, and one that is not."""
    charges = ConcentratedBudget(PrivacyBudget(epsilon=25.0, delta=1e-6))
    memo = AmplitudeEstimationResistant(key=SecretKey.from_os(), charges=charges, data_version="v1")
    query = Steps()
    return {
        "AmplitudeEstimationResistant, a new query": Case(
            lambda: memo.release(value, ONE, BUDGET, query=query())
        ),
        "AmplitudeEstimationResistant, the same query again": Case(
            lambda: memo.release(value, ONE, BUDGET, query="q")
        ),
    }


def lattice_cases(value: torch.Tensor) -> dict[str, Case]:
    """Returns scaled ℤ^d; a general basis is timed by ``small_cases``."""
    lattice = LatticeGaussian()
    return {"LatticeGaussian, float32 on scaled ℤ^d": Case(lambda: lattice.release(value, ONE, BUDGET))}


def layered_cases(value: torch.Tensor) -> dict[str, Case]:
    """Returns one party's share and the combination of ten, which run on different machines."""
    found: dict[str, Case] = {}
    num, laws = value.numel(), ("skellam", "discrete_gaussian")
    for law in laws:
        noise = LayeredNoise(num_parties=_PARTIES, num_honest=_HONEST, law=law)
        plan = noise.plan(dimension=num, sensitivity=ONE, budget=BUDGET)
        key, step = SecretKey.from_os(), Steps()

        def share(
            noise: LayeredNoise = noise, plan: LayeredPlan = plan, key: SecretKey = key, step: Steps = step
        ) -> object:
            return noise.message(value, plan, key=key, step=step())

        found[f"LayeredNoise, one party's share, {law.replace('_', ' ')}"] = Case(share)
    rng = np.random.default_rng()
    sent = {party: rng.integers(-(2**20), 2**20, num) for party in range(_PARTIES)}
    found[f"LayeredNoise, the combination of {_PARTIES} messages"] = Case(
        lambda: noise.combine(sent, plan, ONE, key_bits=256)
    )
    return found


def small_cases() -> dict[str, Callable[[], object]]:
    """Returns mechanisms for short vectors, and Klein's sampler, which goes through a basis row by row."""
    ten = Sensitivity(l2=10.0, neighboring_relation=ONE.neighboring_relation)
    wide = Sensitivity(l2=40.0, neighboring_relation=ONE.neighboring_relation)
    parties = LayeredNoise(num_parties=10, num_honest=6, grid=2.0**-6)
    rows = np.zeros((10, 1000))
    one = PostQuantumGaussian()

    def lattice(rank: int) -> LatticeGaussian:
        return LatticeGaussian((np.eye(rank) + np.eye(rank, k=1) / 2).tolist())

    bases = {rank: lattice(rank) for rank in (4, 16, 64)}
    return {
        "PostQuantumGaussian, one number": lambda: one.release(1.0, ONE, BUDGET),
        **{
            f"LatticeGaussian, basis of {rank}, one point": lambda rank=rank: bases[rank].release(
                np.zeros(rank), ten if rank < 64 else wide, BUDGET
            )
            for rank in bases
        },
        "LayeredNoise, 10 parties x 1,000, Skellam": lambda: parties.release(rows, ONE, BUDGET),
    }


def report(num: int, repeats: int, clock: str) -> Report:
    """Times everything."""
    timed_cases = cases(num)
    timed = run_interleaved(
        {name: case.call for name, case in timed_cases.items()},
        repeats=repeats,
        warmup=1,
        clock=_CLOCKS[clock],
    )
    names = list(timed)
    base = timed[names[0]].median_s
    rows = [
        Row(
            name=name,
            config={"numbers": num, "threads": torch.get_num_threads(), "clock": clock},
            value=num / timing.median_s / 1e6,
            unit="million numbers/s",
            baseline=f"time of {names[0]}",
            ratio=timing.median_s / base,
            spread=timing.spread,
        )
        for name, timing in timed.items()
    ]
    for name, timing in run_interleaved(
        small_cases(), repeats=3 * repeats, warmup=2, clock=_CLOCKS[clock]
    ).items():
        rows.append(
            Row(
                name=name,
                config={"threads": torch.get_num_threads(), "clock": clock},
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
        for name in names
        if timed_cases[name].bar
    ]
    return Report(benchmark="quantum_mechanisms", rows=rows, bars=bars)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--numbers", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=sorted(_CLOCKS), default="wall")
    options = parser.parse_args(arguments)
    emit(report(options.numbers, options.repeats, options.clock), as_json=options.json)


if __name__ == "__main__":
    main()
