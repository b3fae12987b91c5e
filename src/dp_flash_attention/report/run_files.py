"""The two pages of a run: ``report.html`` for everyone, ``diagnostics/report.html`` for the data's owner."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_flash_attention.core.durable import write_atomically
from dp_flash_attention.crypto.certificates import content_digest
from dp_flash_attention.report.figures import (
    confusion_svg,
    diagnostics_svg,
    epsilon_svg,
    roc_svg,
    score_svg,
)
from dp_flash_attention.training.evaluation import (
    SCORE_BOUND,
    ClassifierEvaluation,
    ConfusionEvaluation,
    Evaluation,
    LanguageModelEvaluation,
)

if TYPE_CHECKING:
    from dp_flash_attention.training.pipeline import RunOutcome

REPORT_FILE = "report.html"
_POINTS = 60


def write_reports(outcome: RunOutcome, *, is_public_data: bool = False) -> Path:
    """Writes both pages of a finished run; each is one file that opens without a network.

    ``report.html`` shows what the certificate covers and nothing else, except where the data themselves are
    public: then the exact scores of the model and its non-private twin stand beside, and are named so.

    Args:
        outcome: The finished run.
        is_public_data: Whether the records are published.

    Returns:
        The path of ``report.html``.
    """
    certificate = outcome.certificate.to_dict()
    path = outcome.path / REPORT_FILE
    write_atomically(
        path,
        _page(
            "report.html.j2",
            certificate=certificate,
            figures=_public_figures(outcome, is_public_data=is_public_data),
            headlines=_headlines(outcome.evaluation, certificate["task"]["classes"]),
            comparison=outcome.comparison if is_public_data else None,
            settings=_settings(certificate),
            certificate_sha256=content_digest(certificate),
        ),
    )
    _write_private_page(outcome, certificate)
    return path


def _public_figures(outcome: RunOutcome, *, is_public_data: bool) -> list[str]:
    evaluation, classes = outcome.evaluation, outcome.certificate.to_dict()["task"]["classes"]
    figures = []
    if isinstance(evaluation, ClassifierEvaluation):
        curves = None
        if is_public_data and outcome.comparison is not None:
            other = outcome.comparison["non_private"]
            curves = {f"without privacy: AUC {other['auc']:.3f}": other["roc"]}
        released = evaluation.to_dict()
        figures += [roc_svg(released, curves), score_svg(released, classes, SCORE_BOUND)]
    elif isinstance(evaluation, ConfusionEvaluation):
        figures.append(confusion_svg(evaluation.counts, classes))
    plan = outcome.plan
    spent = plan.epsilon_schedule()
    stride = max(1, plan.num_steps // _POINTS)
    steps = [*range(0, plan.num_steps, stride), plan.num_steps]
    figures.append(epsilon_svg(steps, [spent(step) for step in steps], budget=plan.epsilon))
    return figures


def _headlines(evaluation: Evaluation | None, classes: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the tiles (figure, what it is) of an evaluation."""
    private = "on the hold-out, released privately; ± is the noise"
    match evaluation:
        case ClassifierEvaluation():
            likelier = int(evaluation.positive_rate >= 0.5)
            base = max(evaluation.positive_rate, 1 - evaluation.positive_rate)
            return [
                (f"{evaluation.auc:.3f} ± {evaluation.auc_standard_error:.3f}", f"AUC {private}"),
                (
                    f"{evaluation.accuracy:.1%}",
                    f"accuracy; always '{classes[likelier]}' would have {base:.1%}",
                ),
            ]
        case ConfusionEvaluation():
            figure = f"{evaluation.accuracy:.1%} ± {evaluation.accuracy_standard_error:.1%}"
            base = evaluation.largest_class_share
            return [
                (figure, f"accuracy {private}; the most frequent class alone would have {base:.1%}"),
            ]
        case LanguageModelEvaluation():
            figure = f"{evaluation.nats_per_token:.3f} ± {evaluation.nats_standard_error:.3f}"
            return [
                (figure, f"nats a token {private}"),
                (f"{evaluation.perplexity:.2f}", "perplexity of a token"),
            ]
        case _:
            return []


def _settings(certificate: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Rows (name, value, reason) of everything that decided the run."""
    hyper_parameters = dict(certificate["hyper_parameters"])
    reasons = hyper_parameters.pop("reasons")
    training = next(entry for entry in certificate["mechanisms"] if entry["name"] == "training")
    values = {**training["parameters"], **hyper_parameters}
    return [
        (name, f"{value:.6g}" if isinstance(value, float) else value, reasons.get(name, ""))
        for name, value in values.items()
        if not isinstance(value, dict | list)
    ]


def _write_private_page(outcome: RunOutcome, certificate: Mapping[str, Any]) -> None:
    """Draws ``diagnostics/steps.jsonl``, if the run kept it."""
    directory = outcome.path / "diagnostics"
    source = directory / "steps.jsonl"
    if not source.exists():
        return
    warning, *records = (json.loads(line) for line in source.read_text(encoding="utf-8").splitlines())
    page = directory / REPORT_FILE
    write_atomically(
        page,
        _page(
            "diagnostics.html.j2",
            warning=warning["warning"],
            certificate=certificate,
            figure=diagnostics_svg(records, l2_clip_norm=outcome.plan.l2_clip_norm),
            comparison=outcome.comparison,
        ),
    )
    page.chmod(0o600)


def _page(template: str, **values: Any) -> bytes:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dp_flash_attention.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values).encode()
