"""The forms of linear maps' norms that a run was started with, measured once and kept in its record.

Guarantees: the choice reveals nothing and weakens nothing. It is made of shapes, which are public (pad to a public
length), and of times on synthetic tensors; every form gives the norm of the same recorded gradient up to float32
rounding. The record holds the shapes of the start-up check and the form of each, without the times. Shapes that appear
later are the formula's; which they were depends on the sample if a data set's lengths do, so they are written among the
private diagnostics.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dp_flash_attention.clipping.norm_forms import NormForms, NormShape
from dp_flash_attention.clipping.norm_timing import Timer, measured_forms
from dp_flash_attention.training.diagnostics import JsonLinesDiagnostics
from dp_flash_attention.training.execution import ExecutionConfig
from dp_flash_attention.training.run_directory import RunDirectory

FALLBACKS_NAME = "norm_form_fallbacks"


def forms_of_run(
    run: RunDirectory,
    execution: ExecutionConfig,
    shapes: Iterable[NormShape],
    *,
    device: torch.device,
    timer: Timer | None = None,
) -> NormForms:
    """Returns the run's recorded forms, or those measured now for a run that has not begun.

    Floating-point order is part of what a resumed run must share, so it never measures again: the clock might prefer
    another form today.

    Args:
        run: The run; ``settings`` holds what it was started with.
        execution: Says whether forms are measured at all.
        shapes: What to measure for a new run.
        device: Where the run computes.
        timer: See ``measured_forms``.

    Raises:
        InvalidInputError: If the record was altered.
    """
    if execution.norm_forms == "formula":
        return NormForms()
    if run.status != "preparing":
        return NormForms.from_json(run.settings.get("norm_forms", []))
    return measured_forms(shapes, device=device, batch_size=execution.microbatch_size, timer=timer)


def write_fallbacks(run: RunDirectory, forms: NormForms) -> None:
    """Writes the shapes that this process met and that were never measured among the run's private diagnostics."""
    met = NormForms(forms.fallbacks).to_json()
    if met:
        sink = JsonLinesDiagnostics(run.diagnostics, FALLBACKS_NAME)
        for entry in met:
            sink.write(entry)
