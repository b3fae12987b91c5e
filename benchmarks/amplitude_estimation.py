"""What does a quantum attacker learn by asking again? Amplitude estimation against fresh and memoised noise.

The attacker is simulated: the state vector is evolved exactly, and only final measurements are drawn. One answer
has discrete Gaussian noise with (ε, δ) = (0.5, 1e-7); the error is that of the attacker's estimate of the true value.

    python benchmarks/amplitude_estimation.py --json --plot docs/images/amplitude_estimation.svg > RESULT.json
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from _harness import Bar, Report, Row, emit
from dp_flash_attention.core.errors import BudgetExhaustedError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import TestKey
from dp_flash_attention.quantum.amplitude_estimation_resistant import AmplitudeEstimationResistant
from dp_flash_attention.quantum.attackers import (
    average_answers,
    doubling_powers,
    estimate_amplitude,
    mechanism_oracle,
)
from dp_flash_attention.quantum.charges import ConcentratedBudget

VALUE = 100.0
LOW, HIGH = 0.0, 256.0
SHOTS = 30
SENSITIVITY = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
PRICE = PrivacyBudget(epsilon=0.5, delta=1e-7)
TOTAL = PrivacyBudget(epsilon=4.0, delta=1e-6)

Curve = list[tuple[float, float]]


def mechanism(run: int) -> AmplitudeEstimationResistant:
    """Returns a memoised mechanism with a key of its own and a fresh budget."""
    return AmplitudeEstimationResistant(
        key=TestKey(run), charges=ConcentratedBudget(TOTAL), data_version="v1", grid=2.0**-4
    )


def answer(asked: AmplitudeEstimationResistant, query: object) -> float:
    """Asks one query, of which VALUE is the true answer."""
    return float(asked.answer(query, lambda: VALUE, sensitivity=SENSITIVITY, budget=PRICE).value)


def root_mean_square(errors: Sequence[float]) -> float:
    """Returns √mean(x²)."""
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def slope(curve: Curve) -> float:
    """Returns the exponent of error against calls, by least squares on logarithms."""
    calls, errors = zip(*curve, strict=True)
    return float(np.polyfit(np.log(calls), np.log(errors), 1)[0])


def measure(*, rounds: int, repeats: int, rng: np.random.Generator) -> tuple[dict[str, Curve], float, int]:
    """Returns the curves, one answer's noise and how many distinct queries the budget answers."""
    found = mechanism(0).answer("q", lambda: VALUE, sensitivity=SENSITIVITY, budget=PRICE)
    sigma = found.noise_stddev
    noise = np.arange(-round(10 * sigma * 16), round(10 * sigma * 16) + 1) / 16.0
    fresh = mechanism_oracle(VALUE + noise, np.exp(-0.5 * (noise / sigma) ** 2), low=LOW, high=HIGH)
    memos = [
        # The oracle a superposed repeat evaluates: sixteen calls of the mechanism itself, all of which must agree.
        mechanism_oracle([answer(asked, "q") for _ in range(16)], [1.0] * 16, low=LOW, high=HIGH)
        for asked in map(mechanism, range(repeats))
    ]
    curves: dict[str, Curve] = {"classical": [], "quantum": [], "memoised": [], "distinct": []}
    for num_rounds in range(2, rounds + 1):
        powers = doubling_powers(num_rounds)

        def attack(oracles: Sequence, powers: Sequence[int] = powers) -> tuple[float, float]:
            estimates = [
                estimate_amplitude(oracle, powers=powers, shots=SHOTS, rng=rng) for oracle in oracles
            ]
            return estimates[0].num_calls, root_mean_square([e.answer - VALUE for e in estimates])

        calls, error = attack([fresh] * repeats)
        curves["quantum"].append((calls, error))
        curves["memoised"].append(attack(memos))
        averages = [
            average_answers(fresh, num_calls=int(calls), rng=rng).answer - VALUE for _ in range(repeats)
        ]
        curves["classical"].append((calls, root_mean_square(averages)))
    books = [ask_until_refused(mechanism(1000 + run)) for run in range(repeats)]
    affordable = len(books[0])
    for count in sorted({2**k for k in range(12) if 2**k < affordable} | {affordable}):
        curves["distinct"].append(
            (count, root_mean_square([float(np.mean(book[:count])) - VALUE for book in books]))
        )
    return curves, sigma, affordable


def ask_until_refused(asked: AmplitudeEstimationResistant) -> list[float]:
    """Asks one question in ever new words until the budget refuses, and returns the answers."""
    answers: list[float] = []
    try:
        while True:
            answers.append(answer(asked, ["the same question in other words", len(answers)]))
    except BudgetExhaustedError:
        return answers


def report(curves: Mapping[str, Curve], sigma: float, affordable: int, repeats: int) -> Report:
    """Turns curves into rows and bars."""
    baseline = f"the noise of one answer, {sigma:.3f}"
    rows = [
        Row(
            name=f"{name}, {round(calls)} calls",
            config={"attacker": name, "calls": round(calls), "repeats": repeats},
            value=error,
            unit="root mean square error",
            baseline=baseline,
            ratio=error / sigma,
            spread=1.0 / math.sqrt(2 * repeats),
        )
        for name, curve in curves.items()
        for calls, error in curve
    ]
    memo, quantum, classical = curves["memoised"], curves["quantum"], curves["classical"]
    # Where few calls leave the attacker's own error large, the curves say nothing about the mechanism.
    gain = memo[-1][1] / sigma
    checks: list[tuple[str, float, float, Callable[[float, float], bool]]] = [
        ("exponent of amplitude estimation against fresh noise", slope(quantum[2:]), -0.85, float.__lt__),
        ("exponent of averaging against fresh noise", slope(classical), -0.35, float.__lt__),
        ("error against memoised noise at the most calls, over one answer's noise", gain, 0.7, float.__gt__),
        ("exponent of distinct queries, each charged", slope(curves["distinct"]), -0.35, float.__lt__),
    ]
    bars = [
        Bar(name=name, value=value, bound=bound, holds=holds(value, bound))
        for name, value, bound, holds in checks
    ]
    bars.append(
        Bar(
            name=f"distinct queries answered within epsilon = {TOTAL.epsilon:g}",
            value=affordable,
            bound=1000,
            holds=affordable < 1000,
        )
    )
    return Report(benchmark="amplitude_estimation", rows=rows, bars=bars)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulates, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--rounds", type=int, default=11, help="Grover powers 0, 1, 2, 4, … of the longest attack"
    )
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--plot", type=Path, default=None, help="where to draw error against calls")
    options = parser.parse_args(arguments)
    curves, sigma, affordable = measure(
        rounds=options.rounds, repeats=options.repeats, rng=np.random.default_rng(2026)
    )
    if options.plot is not None:
        from dp_flash_attention.report.quantum_figures import amplitude_estimation_svg

        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text(
            amplitude_estimation_svg(
                curves, noise_stddev=sigma, affordable_queries=affordable, budget=f"ε = {TOTAL.epsilon:g}"
            )
        )
    emit(report(curves, sigma, affordable, options.repeats), as_json=options.json)


if __name__ == "__main__":
    main()
