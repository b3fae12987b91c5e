"""``dpfa account``: answers the one accounting question that the given options leave open."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_finite, positive_int


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What is known about a run; exactly one of the first five is None, and that is the question."""

    epsilon: float | None
    delta: float | None
    sampling_prob: float | None
    noise_multiplier: float | None
    num_steps: int | None
    dataset_size: int | None


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A complete run, with both bounds of its ε."""

    question: str
    answer: float
    sampling_prob: float
    noise_multiplier: float
    num_steps: int
    delta: float
    epsilon_pld: float
    epsilon_rdp: float
    expected_batch_size: float | None


def account(
    epsilon: Annotated[float | None, typer.Option(help="Target ε.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ; well below 1 / (number of records).")] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise standard deviation over clip norm (σ).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of training steps.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Instead of --steps: epochs / sampling probability steps.")
    ] = None,
    sampling_prob: Annotated[
        float | None, typer.Option(help="Probability with which a record enters a step (q).")
    ] = None,
    expected_batch_size: Annotated[
        float | None, typer.Option(help="Instead of --sampling-prob, with --dataset-size.")
    ] = None,
    dataset_size: Annotated[int | None, typer.Option(help="Number of records, as a public number.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer an accounting question: leave out the one quantity that you ask for.

    Of ε, δ, σ, steps and sampling probability, give four. Sampling is Poisson, neighbours differ by
    one record added or removed. With --dataset-size a sampling probability is also shown as a batch size.

    Example: dpfa account --noise-multiplier 1.1 --steps 1000 --sampling-prob 0.01 --delta 1e-6
    """
    run = _complete(
        _Run(
            epsilon=epsilon,
            delta=delta,
            sampling_prob=sampling_prob,
            noise_multiplier=noise_multiplier,
            num_steps=steps,
            dataset_size=dataset_size,
        ),
        epochs=epochs,
        expected_batch_size=expected_batch_size,
    )
    answer = _answer(run)
    if as_json:
        typer.echo(json.dumps(_as_json(answer)))
    else:
        _print_table(answer)


def _complete(run: _Run, *, epochs: float | None, expected_batch_size: float | None) -> _Run:
    """Replaces batch size by sampling probability and epochs by steps, and checks what depends on both."""
    if run.dataset_size is not None:
        positive_int("--dataset-size", run.dataset_size, remedy="State the public number of records.")
        if run.delta is not None and run.delta >= 1.0 / run.dataset_size:
            raise InvalidInputError(
                "--delta",
                run.delta,
                bound=f"below 1 / {run.dataset_size} = {1.0 / run.dataset_size:.3g}",
                remedy="A larger delta would allow to publish a record whole.",
            )
    if expected_batch_size is not None:
        if run.sampling_prob is not None or run.dataset_size is None:
            raise InvalidInputError(
                "--expected-batch-size",
                expected_batch_size,
                bound="given together with --dataset-size and without --sampling-prob",
                remedy="Their quotient is the sampling probability.",
            )
        size = positive_finite(
            "--expected-batch-size", expected_batch_size, remedy="Common values: 256 to 4096."
        )
        run = replace(run, sampling_prob=size / run.dataset_size)
    if epochs is not None:
        if run.num_steps is not None or run.sampling_prob is None:
            raise InvalidInputError(
                "--epochs",
                epochs,
                bound="given without --steps and with a sampling probability",
                remedy="Say --steps instead.",
            )
        wanted = positive_finite("--epochs", epochs, remedy="Common values: 1 to 100.")
        run = replace(
            run, num_steps=max(1, round(wanted / positive_finite("q", run.sampling_prob, remedy="")))
        )
    return run


def _answer(run: _Run) -> _Answer:
    from dp_flash_attention import accounting

    question = _open_question(run)
    known = {
        name: value for name, value in asdict(run).items() if value is not None and name != "dataset_size"
    }
    if question == "noise_multiplier":
        known[question] = accounting.calibrate_noise_multiplier(**known)
    elif question == "num_steps":
        known[question] = accounting.max_steps(**known)
        if known[question] == 0:
            raise InvalidInputError(
                "--epsilon", run.epsilon, bound="enough for one step", remedy="Raise the noise multiplier."
            )
    elif question == "sampling_prob":
        known[question] = accounting.max_sampling_prob(**known)
    event = accounting.PoissonSampledGaussian(
        sampling_prob=known["sampling_prob"],
        noise_multiplier=known["noise_multiplier"],
        num_steps=known["num_steps"],
    )
    if question == "delta":
        known[question] = accounting.delta(event, epsilon=known["epsilon"])
    pld = accounting.epsilon(event, delta=known["delta"])
    return _Answer(
        question=question,
        answer=pld if question == "epsilon" else known[question],
        sampling_prob=event.sampling_prob,
        noise_multiplier=event.noise_multiplier,
        num_steps=event.num_steps,
        delta=known["delta"],
        epsilon_pld=pld,
        epsilon_rdp=accounting.epsilon(event, delta=known["delta"], accountant="rdp"),
        expected_batch_size=None if run.dataset_size is None else event.sampling_prob * run.dataset_size,
    )


def _open_question(run: _Run) -> str:
    options = {
        "epsilon": "--epsilon",
        "delta": "--delta",
        "sampling_prob": "--sampling-prob (or --expected-batch-size with --dataset-size)",
        "noise_multiplier": "--noise-multiplier",
        "num_steps": "--steps (or --epochs)",
    }
    missing = [name for name in options if getattr(run, name) is None]
    if len(missing) != 1:
        raise InvalidInputError(
            "the number of quantities left open",
            len(missing),
            bound="exactly 1, the one that is asked for",
            remedy=f"Give all but one of {', '.join(options[name] for name in (missing or options))}.",
        )
    return missing[0]


def _as_json(answer: _Answer) -> dict[str, object]:
    return asdict(answer) | {
        "sampling": "poisson",
        "neighboring_relation": "add_or_remove_one",
        "certified": ["epsilon_pld"],
        "cross_check": ["epsilon_rdp"],
    }


def _print_table(answer: _Answer) -> None:
    from rich.console import Console
    from rich.table import Table

    labels = {
        "epsilon": "ε",
        "delta": "δ",
        "noise_multiplier": "noise multiplier σ",
        "num_steps": "steps",
        "sampling_prob": "sampling probability q",
    }
    table = Table(
        title=f"{labels[answer.question]} = {answer.answer:.6g}", title_justify="left", show_header=False
    )
    table.add_row("ε by PLD (certified)", f"{answer.epsilon_pld:.4f}")
    table.add_row("ε by RDP (cross-check)", f"{answer.epsilon_rdp:.4f}")
    table.add_row("at δ", f"{answer.delta:.3g}")
    table.add_row("noise multiplier σ", f"{answer.noise_multiplier:.6g}")
    table.add_row("steps", f"{answer.num_steps:,}")
    table.add_row("sampling probability q", f"{answer.sampling_prob:.6g}")
    if answer.expected_batch_size is not None:
        table.add_row("expected batch size", f"{answer.expected_batch_size:,.1f}")
    table.add_row("holds for", "Poisson sampling; one record added or removed")
    Console().print(table)
