"""``dpfa train``: a private run from a file, or from the built-in data, to certificate and report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dp_flash_attention.core.errors import InvalidInputError, RunStateError

if TYPE_CHECKING:
    from rich.console import Console

    from dp_flash_attention.training.choices import Choices, RunRequest
    from dp_flash_attention.training.pipeline import Observer, RunOutcome
    from dp_flash_attention.training.plan import PrivacyPlan
    from dp_flash_attention.training.tasks import Task

_SOURCE_FACT = "source"
_RUNS = Path("runs")
_INTERRUPTED = 130


def train(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(help="A .csv, .jsonl, .parquet or .txt file; left out: the flights of 2013."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column of --data to predict; left out: a language model.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Column of --data with texts; with --label, they are classified."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of a Hugging Face model and tokenizer to start from; for texts."),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens at which a text is cut.")] = None,
    schema: Annotated[
        Path | None, typer.Option(help="Public JSON description of a table's columns; left out: inferred.")
    ] = None,
    epsilon: Annotated[float, typer.Option(help="Total ε of the run.")] = 1.0,
    delta: Annotated[float | None, typer.Option(help="Total δ; below 1 / (number of records).")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Bound C of a record's gradient norm.")] = None,
    expected_batch_size: Annotated[int | None, typer.Option(help="Expected records in a step.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Expected passes over the records.")] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of --epochs: number of steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's learning rate.")] = None,
    noise: Annotated[
        str,
        typer.Option(
            help="'secure', 'exact' (on a grid, finite precision certified), or 'fast' for research."
        ),
    ] = "secure",
    dataset_size: Annotated[
        int | None, typer.Option(help="Number of records, if it is public; left out: released with noise.")
    ] = None,
    holdout: Annotated[
        float, typer.Option(help="Share of records kept for the evaluation; 0 for none.")
    ] = 0.1,
    twin: Annotated[
        bool | None,
        typer.Option(
            "--twin/--no-twin",
            help="Train the same model without privacy too; its scores are private data. Default: for the "
            "built-in public data only.",
        ),
    ] = None,
    microbatch_size: Annotated[
        int | None, typer.Option(help="Rows of one forward pass; changes speed and memory only.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch; changes speed only.")] = None,
    compile: Annotated[
        bool, typer.Option(help="Compile the private step: slow once, faster then; needs a C++ compiler.")
    ] = False,
    strategy: Annotated[
        str,
        typer.Option(
            help="bookkeeping; two_pass: less memory with checkpointing, more time; or one_example: microbatches of one."
        ),
    ] = "bookkeeping",
    norm_forms: Annotated[
        str,
        typer.Option(
            help="formula, or measured: time the forms of linear maps' norms before the first step."
        ),
    ] = "formula",
    clipping: Annotated[
        str,
        typer.Option(
            help="flat: a record's whole gradient to C; per_layer: each module's part to C/√K, with less memory."
        ),
    ] = "flat",
    out: Annotated[
        Path | None, typer.Option(help="New or empty directory; left out: the next free one under runs/.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, with the options it was started with."),
    ] = False,
) -> int:
    """Train a transformer with differential privacy.

    Without options: late arrivals among the 336,776 flights of 2013, at ε = 1, beside the same model without
    privacy. With --label: that column from all others, or from --text. Without: a language model of --text.
    A run leaves model.safetensors, certificate.json and report.html.

    Example: dpfa train --data patients.csv --label readmitted --epsilon 3
    """
    from rich.console import Console

    console = Console()
    if resume:
        if out is None:
            raise InvalidInputError(
                "--out",
                None,
                bound="given with --resume",
                remedy="Name the directory of the run to go on with.",
            )
        _refuse_other_options(context)
        source, request = _remembered(out)
    else:
        source = {
            "data": None if data is None else str(data.resolve()),
            "label": label,
            "schema": None if schema is None else str(schema.resolve()),
            "text": text,
            "model": None if model is None else str(model.resolve()),
            "max_length": max_length,
            "twin": twin,
            "microbatch_size": microbatch_size,
            "threads": threads,
            "compile": compile,
            "strategy": strategy,
            "norm_forms": norm_forms,
        }
        request = _request(
            epsilon=epsilon,
            delta=delta,
            l2_clip_norm=clip_norm,
            expected_batch_size=expected_batch_size,
            epochs=epochs,
            num_steps=steps,
            learning_rate=learning_rate,
            noise=noise,
            dataset_size=dataset_size,
            holdout_prob=holdout,
            clipping=clipping,
        )
    return _carry_out(source, request, out=out, resume=resume, console=console)


def _refuse_other_options(context: typer.Context) -> None:
    given = [
        name
        for name in context.params
        if name not in ("out", "resume") and context.get_parameter_source(name).name == "COMMANDLINE"  # type: ignore[union-attr]
    ]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InvalidInputError(
            options,
            "given",
            bound="left out with --resume, because a run goes on as it was started",
            remedy="Give --out and --resume alone, or start a new run in another directory.",
        )


def _remembered(out: Path) -> tuple[dict[str, Any], RunRequest]:
    import json

    from dp_flash_attention.training.pipeline import REQUEST_FACT

    try:
        facts = json.loads((out / "run.json").read_text(encoding="utf-8"))["facts"]
        return facts[_SOURCE_FACT], _request(**facts[REQUEST_FACT])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunStateError(
            f"{out} holds no run that dpfa train can go on with. Check the directory's name; a run that was "
            "stopped before its first step has spent nothing, and is started anew elsewhere."
        ) from error


def _request(**numbers: Any) -> RunRequest:
    from dp_flash_attention.training.choices import RunRequest

    return RunRequest(**numbers)


def _carry_out(
    source: dict[str, Any], request: RunRequest, *, out: Path | None, resume: bool, console: Console
) -> int:
    """Returns the exit code."""
    from dp_flash_attention.report.run_files import write_reports
    from dp_flash_attention.training.memory import keep_freed_memory
    from dp_flash_attention.training.pipeline import run_private_training

    keep_freed_memory()
    with console.status("Reading the data"):
        task = _task(source)
    directory = _next_free_directory(task) if out is None else out
    console.print(f"[bold]{task.name}[/bold]  ->  {directory}")
    twin = source["twin"]
    try:
        with _watching(console) as observer:
            outcome = run_private_training(
                task,
                request,
                out_dir=directory,
                resume=resume,
                facts={_SOURCE_FACT: source},
                execution=_execution(task, source),
                with_twin=task.is_public_data if twin is None else twin,
                observer=observer,
            )
    except KeyboardInterrupt:
        typer.echo(
            f"dpfa: stopped; everything so far is kept. Go on with: dpfa train --resume --out {directory}",
            err=True,
        )
        return _INTERRUPTED
    write_reports(outcome, is_public_data=task.is_public_data)
    _print_outcome(console, outcome, task)
    return 0


def _execution(task: Task, source: dict[str, Any]) -> Any:
    from dp_flash_attention.training.execution import ExecutionConfig

    size, strategy = source["microbatch_size"], source.get("strategy", "bookkeeping")
    default = 1 if strategy == "one_example" else task.defaults.microbatch_size
    return ExecutionConfig(
        microbatch_size=default if size is None else size,
        num_threads=source["threads"],
        compile=source.get("compile", False),
        strategy=strategy,
        norm_forms=source.get("norm_forms", "formula"),
    )


def _task(source: dict[str, Any]) -> Task:
    from dp_flash_attention.training.data.schema import load_schema
    from dp_flash_attention.training.tasks import flights_task, table_task
    from dp_flash_attention.training.text_tasks import text_task

    if source["data"] is None:
        _refuse(source, ("label", "schema", "text", "model", "max_length"), "together with --data")
        return flights_task()
    data, model, schema = Path(source["data"]), source["model"], source["schema"]
    is_text = source["text"] is not None or model is not None or source["label"] is None
    if is_text or data.suffix == ".txt":
        _refuse(source, ("schema",), "for tables of fields, not for texts")
        return text_task(
            data,
            text=source["text"],
            label=source["label"],
            model=None if model is None else Path(model),
            max_length=source["max_length"],
        )
    _refuse(source, ("max_length",), "together with --text")
    return table_task(
        data, label=source["label"], schema=None if schema is None else load_schema(Path(schema))
    )


def _refuse(source: dict[str, Any], names: tuple[str, ...], bound: str) -> None:
    for name in names:
        if source[name] is not None:
            option = "--" + name.replace("_", "-")
            raise InvalidInputError(
                option, source[name], bound=f"given {bound}", remedy="Leave it out, or see dpfa train --help."
            )


def _next_free_directory(task: Task) -> Path:
    stem = "flights" if task.is_public_data else "train"
    number = 1
    while (_RUNS / f"{stem}-{number}").exists():
        number += 1
    return _RUNS / f"{stem}-{number}"


@contextmanager
def _watching(console: Console) -> Iterator[Observer]:
    """Yields an observer that draws progress; what it shows is public."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dp_flash_attention.training.pipeline import Observer

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        private, twin = (
            progress.add_task(name, visible=False, note="") for name in ("private", "non-private")
        )

        def on_step(report: Any) -> None:
            note = f"ε {report.epsilon_spent:.3f} spent, {report.examples_per_s:,.0f} examples/s"
            progress.update(private, visible=True, completed=report.step, total=report.num_steps, note=note)

        yield Observer(
            on_phase=lambda phase: progress.console.print(f"{phase} ..."),
            on_plan=lambda choices, plan: _print_choices(progress.console, choices, plan),
            on_step=on_step,
            on_twin_step=lambda step, total: progress.update(
                twin, visible=True, completed=step, total=total, note="not private"
            ),
        )


def _print_choices(console: Console, choices: Choices, plan: PrivacyPlan) -> None:
    from rich.table import Table

    table = Table("setting", "value", "why", box=None, pad_edge=False)
    for name, value in {
        "epsilon of training": plan.epsilon,
        "delta": choices.delta,
        "expected_batch_size": choices.expected_batch_size,
        "sampling_prob": choices.sampling_prob,
        "epochs": choices.num_steps * choices.sampling_prob,
        "num_steps": choices.num_steps,
        "l2_clip_norm": choices.l2_clip_norm,
        "clipping": plan.clipping,
        "noise_multiplier": plan.noise_multiplier,
        "learning_rate": choices.learning_rate,
        "ema_decay": choices.ema_decay,
    }.items():
        table.add_row(
            name, f"{value:.4g}" if isinstance(value, float) else str(value), _reason(name, choices, plan)
        )
    console.print(table)


def _reason(name: str, choices: Choices, plan: PrivacyPlan) -> str:
    fixed = {
        "epsilon of training": "the rest of the total pays for the number of records, unless that is public",
        "clipping": {
            "flat": "a record's whole gradient is clipped as one vector",
            "per_layer": "each module's part is clipped to a bound of its own; their squares add up to C²",
        }[plan.clipping],
        "noise_multiplier": "the least noise that keeps all steps within the budget",
    }
    return fixed.get(name, choices.reasons.get(name, ""))


def _print_outcome(console: Console, outcome: RunOutcome, task: Task) -> None:
    certificate = outcome.certificate.to_dict()
    claim = certificate["claim"]
    console.print(f"({claim['epsilon']:g}, {claim['delta']:g})-differentially private for each record.")
    if outcome.evaluation is not None:
        console.print(outcome.evaluation.summary())
    if outcome.comparison is not None:
        private, other = outcome.comparison["private"], outcome.comparison["non_private"]
        if "auc" in private and task.is_public_data:
            console.print(
                f"Exact AUC (the data is public): {private['auc']:.4f} private, {other['auc']:.4f} without "
                f"privacy, gap {other['auc'] - private['auc']:.4f}."
            )
    for name in ("report.html", "certificate.json", "model.safetensors"):
        console.print(f"  {outcome.path / name}", soft_wrap=True)
    console.print(
        f"  {outcome.path / 'diagnostics'}: PRIVATE DATA, not covered by the guarantee", soft_wrap=True
    )
    console.print(f"Compute the claim again: dpfa certificate check {outcome.path}", soft_wrap=True)
