"""The two pages of a run: ``report.html`` for everyone, ``diagnostics/report.html`` for the data's owner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_flash_attention.report.figures import diagnostics_svg, epsilon_svg, roc_svg, score_svg
from dp_flash_attention.training.durable import write_atomically
from dp_flash_attention.training.evaluation import SCORE_BOUND

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
            evaluation=None if outcome.evaluation is None else outcome.evaluation.to_dict(),
            comparison=outcome.comparison if is_public_data else None,
            settings=_settings(certificate),
        ),
    )
    _write_private_page(outcome, certificate)
    return path


def _public_figures(outcome: RunOutcome, *, is_public_data: bool) -> list[str]:
    figures = []
    if outcome.evaluation is not None:
        evaluation = outcome.evaluation.to_dict()
        curves = None
        if is_public_data and outcome.comparison is not None:
            other = outcome.comparison["non_private"]
            curves = {f"without privacy: AUC {other['auc']:.3f}": other["roc"]}
        classes = outcome.certificate.to_dict()["task"]["classes"]
        figures += [roc_svg(evaluation, curves), score_svg(evaluation, classes, SCORE_BOUND)]
    plan = outcome.plan
    spent = plan.epsilon_schedule()
    stride = max(1, plan.num_steps // _POINTS)
    steps = [*range(0, plan.num_steps, stride), plan.num_steps]
    figures.append(epsilon_svg(steps, [spent(step) for step in steps], budget=plan.epsilon))
    return figures


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
