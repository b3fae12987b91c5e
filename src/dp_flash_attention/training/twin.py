"""The non-private twin: the same model, data, steps and schedule without clipping and without noise.

What it learns is private data. It exists to measure what privacy costs, on data that may be looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.training.averaging import ParameterAverage
from dp_flash_attention.training.microbatches import RecordSource

_SAMPLING_SEED = 0  # no secret: nothing here is private


def train_without_privacy(
    model: nn.Module,
    dataset: object,
    *,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    sampling_prob: float,
    num_steps: int,
    microbatch_size: int,
    lr_schedule: Callable[[int], float],
    ema_decay: float,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Trains ``model`` in place on ordinary mean gradients. NOT PRIVATE.

    Args:
        model: With the initial weights that the private run had.
        dataset: See ``RecordSource``.
        optimizer: Over the model's parameters.
        loss_fn: Maps the model and inputs of B rows to B losses.
        sampling_prob: Each record enters each step with this probability, as in the private run.
        num_steps: Number of steps.
        microbatch_size: Rows of one forward and backward pass.
        lr_schedule: Factor of the learning rate as a function of the step.
        ema_decay: Decay of the averaged parameters that the model ends with.
        on_step: Called with the number of finished steps and of all steps.
    """
    source = RecordSource(dataset)
    generator = torch.Generator().manual_seed(_SAMPLING_SEED)
    average = ParameterAverage(dict(model.named_parameters()), decay=ema_decay)
    learning_rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(num_steps):
        for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate * lr_schedule(step)
        sample = torch.nonzero(torch.rand(len(source), generator=generator) < sampling_prob).flatten()
        optimizer.zero_grad(set_to_none=True)
        for indices in torch.split(sample, microbatch_size):
            (loss_fn(model, source.fetch(indices)).sum() / len(sample)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        average.update()
        if on_step is not None:
            on_step(step + 1, num_steps)
    average.copy_to_model()
