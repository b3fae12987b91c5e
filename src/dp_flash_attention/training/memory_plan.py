"""Which strategy and microbatch fit into a limit of memory: told before the first step, not by running out of it.

    plan = fitting_plan(measured_peaks(model, loss_fn, rows), limit_bytes=20 * 2**30)
    session = make_private(model, optimizer, privacy_plan, strategy=plan.strategy)
    for step in session.steps(dataset, microbatch_size=plan.microbatch_size): ...

A step's peak is a constant plus a number of bytes for each example, so two small steps tell it for any model, with
whatever it holds: a fused head, checkpointed blocks, layers of one's own. For the built-in transformer
``memory_model`` tells it from sizes alone. Neither depends on what records hold, only on their shapes; strategy and
microbatch size change speed and memory, never what is released.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dp_flash_attention.clipping import ClippedGradientAccumulator
from dp_flash_attention.clipping.strategies import Strategy
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.training.live_memory import peak_live_bytes

PeakOf = Callable[[int], int]
"""Maps a microbatch size to the bytes of a step's peak, never decreasing."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What fits.

    Attributes:
        strategy: The first of those that were offered of which an example fits.
        microbatch_size: The largest that fits.
        peak_bytes: Estimated peak of its step, beyond parameters, optimizer state and data.
    """

    strategy: Strategy
    microbatch_size: int
    peak_bytes: int


def fitting_plan(
    peaks: Mapping[Strategy, PeakOf], *, limit_bytes: int, most_examples: int = 1024
) -> MemoryPlan:
    """Returns the first strategy of which a microbatch fits, with the largest microbatch.

    Args:
        peaks: Peaks by strategy, the preferred one first: ``measured_peaks``, or formulas of ``memory_model``.
        limit_bytes: What a step may hold beyond parameters, optimizer state and data. Leave room for what the
            allocator cannot give back: up to a third was seen on a CPU.
        most_examples: No larger microbatch is looked for.

    Raises:
        InvalidInputError: If one example does not fit with any strategy.
    """
    limit = positive_int("limit_bytes", limit_bytes, remedy="Pass the free memory in bytes.")
    most = positive_int("most_examples", most_examples, remedy="Pass the expected batch size.")
    least: dict[Strategy, int] = {}
    for strategy, peak_of in peaks.items():
        least[strategy] = peak_of(1)
        if least[strategy] > limit:
            continue
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if peak_of(middle) <= limit else (low, middle - 1)
        return MemoryPlan(strategy=strategy, microbatch_size=low, peak_bytes=peak_of(low))
    needs = " and ".join(f"{bytes_ / 2**20:,.1f} MiB with {name!r}" for name, bytes_ in least.items())
    raise InvalidInputError(
        "limit_bytes",
        f"{limit / 2**20:,.1f} MiB",
        bound=f"at least what a microbatch of one example needs, {needs}",
        remedy="Use activation checkpointing with the strategy 'two_pass', a LinearCrossEntropy head, or shorter records.",
    )


def measured_peaks(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    rows: Any,
    *,
    strategies: tuple[Strategy, ...] = ("bookkeeping", "two_pass"),
    fallback_modules: Collection[str] = (),
) -> dict[Strategy, PeakOf]:
    """Returns each strategy's peak as a function of the microbatch size, from steps of two and four examples.

    Nothing is added or released: the sums are thrown away.

    Args:
        model: The model, on its device.
        loss_fn: Maps model and rows to one loss for each row.
        rows: A tree of tensors of the shapes that training will have, whose values are not looked at: the steps see ones,
            which are valid ids, labels, masks and features alike, so that the result tells nothing of records.
        strategies: Which of them, the preferred one first.
        fallback_modules: See ``ClippedGradientAccumulator``.
    """
    device = next(model.parameters()).device
    peaks: dict[Strategy, PeakOf] = {}
    for strategy in strategies:
        accumulator = ClippedGradientAccumulator(
            model, l2_clip_norm=1.0, strategy=strategy, fallback_modules=fallback_modules
        )

        def step(size: int, accumulator: ClippedGradientAccumulator = accumulator) -> None:
            inputs = pytree.tree_map_only(Tensor, lambda leaf: _ones(leaf, size).to(device), rows)
            accumulator.reset()
            accumulator.add(lambda: loss_fn(model, inputs), batch_size=size)
            accumulator.reset()

        step(2)  # the first one is book-kept, and pays for what is made once
        few, more = (peak_live_bytes(partial(step, size), device=device) for size in (2, 4))
        peaks[strategy] = _line(few, more)
    return peaks


def _ones(leaf: Tensor, size: int) -> Tensor:
    return leaf.new_ones((size, *leaf.shape[1:]))


def require_fit(peak_of: PeakOf, *, microbatch_size: int, limit_bytes: int) -> None:
    """Refuses a microbatch whose step would hold more than a limit.

    Raises:
        InvalidInputError: If it would; the bound is the largest microbatch that fits.
    """
    if peak_of(microbatch_size) <= limit_bytes:
        return
    largest = max((size for size in range(1, microbatch_size) if peak_of(size) <= limit_bytes), default=0)
    peak, limit = (f"{number / 2**20:,.1f} MiB" for number in (peak_of(microbatch_size), limit_bytes))
    raise InvalidInputError(
        "microbatch_size",
        f"{microbatch_size}, whose step would hold {peak}",
        bound=f"at most {largest} for memory_limit_bytes of {limit}",
        remedy="Lower it."
        if largest
        else "Use activation checkpointing with the strategy 'two_pass', a LinearCrossEntropy head, or shorter records.",
    )


def _line(two: int, four: int) -> PeakOf:
    """Returns the line through the peaks of two and four examples; it does not fall."""
    each = max(0, -(-(four - two) // 2))
    fixed = max(0, two - 2 * each)
    return lambda size: fixed + each * size


def free_bytes(device: torch.device) -> int:
    """Returns the memory that a step may still take on a device; on a CPU what Linux calls available.

    Raises:
        InvalidInputError: If the device or the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            [line] = [line for line in file if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        raise InvalidInputError(
            "device",
            str(device),
            bound="a CUDA device, or a CPU under Linux",
            remedy="Pass limit_bytes of your own.",
        ) from None
    return int(line.split()[1]) * 1024
