"""Measures which form of a linear map's norm is fastest on this machine, on synthetic tensors.

What is timed is what a step pays for a layer beyond its forward pass and input gradient: the norm and the weighted
gradient together, because the form that keeps gradients has already paid for most of the second with the first.

Nothing of a data set takes part: the tensors are drawn here, and shapes and types are public. The times themselves
are forgotten; only the choice is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch

from dp_flash_attention.clipping.contributions import Contribution, LinearContribution
from dp_flash_attention.clipping.norm_forms import NormForm, NormForms, NormShape
from dp_flash_attention.clipping.precision import full_precision

Timer = Callable[[Callable[[], object]], float]
"""Runs a call as often as it likes and returns its cost in seconds."""

# Inputs and output gradients of a trial take at most this much, so that a trial is milliseconds and not a step.
_TRIAL_BYTES = 32 * 2**20
_MOST_EXAMPLES = 8
_REPEATS = 3


def measured_forms(
    shapes: Iterable[NormShape],
    *,
    device: torch.device,
    batch_size: int,
    timer: Timer | None = None,
) -> NormForms:
    """Returns the fastest form of each shape, timed here with the threads that are set now.

    A shape is timed once in a process for each device and number of threads. Two forms within a twentieth are a draw,
    which the one named first in ``NormShape.candidates`` wins: the record then depends less on the clock.

    Args:
        shapes: What to measure.
        device: Where the run will compute.
        batch_size: Examples of a microbatch; a trial has at most that many.
        timer: Measures a call; None takes the least of a few readings of the clock.
    """
    timer = least_seconds if timer is None else timer
    threads, place = torch.get_num_threads(), str(device)
    return NormForms(
        {shape: _fastest(shape, place, threads, min(batch_size, _MOST_EXAMPLES), timer) for shape in shapes}
    )


def least_seconds(call: Callable[[], object]) -> float:
    """Returns the least of a few readings of the clock around a call, after one that is not counted."""
    readings = []
    for _ in range(1 + _REPEATS):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        readings.append(time.perf_counter() - began)
    return min(readings[1:])


@lru_cache(maxsize=1024)
def _fastest(shape: NormShape, place: str, threads: int, batch_size: int, timer: Timer) -> NormForm:
    """Times the candidates; the arguments are the key under which the process remembers the answer."""
    seconds: dict[NormForm, float] = {
        form: timer(_trial(shape, form, torch.device(place), batch_size)) for form in shape.candidates
    }
    least = min(seconds.values())
    return next(form for form, taken in seconds.items() if taken <= 1.05 * least)


def _trial(shape: NormShape, form: NormForm, device: torch.device, batch_size: int) -> Callable[[], object]:
    """Returns one layer's share of a private step in one form, on tensors of its own."""
    # Constant tensors would do for the time, but their rows would all be one direction: a special case of the sums.
    generator = torch.Generator().manual_seed(0)
    row_bytes = 4 * shape.num_rows * (shape.num_inputs + shape.num_outputs)
    size = max(1, min(batch_size, _TRIAL_BYTES // max(1, row_bytes)))
    drawn = [
        torch.randn(size, shape.num_rows, width, generator=generator).to(device, getattr(torch, dtype))
        for width, dtype in ((shape.num_inputs, shape.input_dtype), (shape.num_outputs, shape.grad_dtype))
    ]
    record = LinearContribution(
        x_BTD=drawn[0],
        g_BTP=drawn[1],
        weight_shape=torch.Size((shape.num_outputs, shape.num_inputs)),
        form="outer" if form == "formed" else form,
    )
    factors_B = torch.ones(size, device=device)
    out = torch.empty(record.weight_shape, device=device, dtype=record.dense(0, 0).dtype)

    def trial() -> None:
        with full_precision(device):
            kept: Contribution = record.formed() if form == "formed" else record
            kept.sq_norms()
            kept.add_weighted_sum(factors_B, out, fresh=True)

    return trial
