"""The start-up check: does one example's loss or gradient depend on another?

It runs the model on a few real examples, alone and together, and compares. Parameters at or near zero
(new heads, adapters, gates) are moved away for the time of the check, or no gradient would pass them
and whatever lies behind would go unseen. It catches what no
inspection of modules can: batch-level normalisers in a loss, sequence-first layouts, hand-written
batch statistics, state that carries data from one batch to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dp_flash_attention.clipping.accumulator import ClippedGradientAccumulator
from dp_flash_attention.core.errors import ExampleCouplingError, InvalidInputError, MissingRuleError

# Two batch sizes, so that a dimension that equals one of them by chance differs from the other.
_PROBE_SIZES = (2, 3)

# Alone and together differ by rounding only. Measured: below 1e-5 in float32 over all model
# families of the tests, below 2e-2 in bfloat16; a batch-level normaliser is off by a factor.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}
_LOW_PRECISION_TOLERANCE = 5e-2

# A parameter whose gradient is a smaller share of the whole may be off by the tolerance of this share.
_SMALL_SHARE = 0.02

# Weights are drawn with a deviation of 0.02 or more; below this a parameter was started at zero.
_NEAR_ZERO = 5e-3
_MOVED_BY = 0.1


def check_examples_independent(
    accumulator: ClippedGradientAccumulator,
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    inputs: Any,
) -> None:
    """Checks on real inputs that examples do not touch each other, and that norms are exact.

    Args:
        accumulator: The accumulator that will clip the model's gradients.
        model: The model.
        loss_fn: Maps inputs to one loss for each example.
        inputs: A tree of tensors with at least one example along every leading dimension; the
            first three are used, repeated where there are fewer.

    Raises:
        ExampleCouplingError: If a loss or a parameter's gradient norm changes with the company of the
            example, or a buffer of the model changes in a forward pass.
        MissingRuleError: If the loss has a gradient for a parameter that is not among the accumulator's.
        InvalidInputError: If inputs hold no tensor.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not leaves or any(leaf.dim() == 0 or leaf.shape[0] == 0 for leaf in leaves):
        raise InvalidInputError(
            "inputs",
            [tuple(leaf.shape) for leaf in leaves],
            bound="tensors with at least one row",
            remedy="Pass a batch.",
        )
    with _state_restored(model), _moved_from_zero(accumulator.parameters.values()):
        _check_parameters(accumulator, model, loss_fn, inputs)
        _check_buffers(model, loss_fn, inputs, size=1 if accumulator.strategy == "one_example" else 2)
        if accumulator.strategy == "one_example":
            with _evaluating(model):
                _check_memory(accumulator, loss_fn, inputs)
            return
        with _evaluating(model):
            for size in _PROBE_SIZES:
                batch = _rows(inputs, range(size))
                accumulator.record(partial(loss_fn, batch), batch_size=size, probing=True)
            for size in _PROBE_SIZES:
                _check_alone_and_together(accumulator, model, loss_fn, inputs, size)
        _check_company(model, loss_fn, inputs)


def _rows(inputs: Any, rows: range | list[int]) -> Any:
    def pick(leaf: Tensor) -> Tensor:
        index = torch.tensor([row % leaf.shape[0] for row in rows], device=leaf.device)
        return leaf.index_select(0, index)

    return pytree.tree_map_only(Tensor, pick, inputs)


def _check_alone_and_together(
    accumulator: ClippedGradientAccumulator,
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    inputs: Any,
    size: int,
) -> None:
    together = _rows(inputs, range(size))
    tape, losses = accumulator.record(lambda: loss_fn(together), batch_size=size)
    norms = {name: sq.sqrt() for name, sq in accumulator.sq_norms_by_parameter(tape).items()}
    parameters = accumulator.parameters
    dtype = _narrowest(list(parameters.values()))
    for i in range(size):
        alone = loss_fn(_rows(inputs, [i]))
        gradients = torch.autograd.grad(alone.sum(), list(parameters.values()), allow_unused=True)
        if not _close(losses[i], alone.detach().reshape(()), losses.dtype):
            raise ExampleCouplingError(
                f"example {i}'s loss is not the same alone and in a batch of {size}. Divide each example's loss by its own "
                f"number of tokens or by a constant, never by a number that depends on the batch."
            )
        expected = [0.0 if g is None else float(g.double().norm()) for g in gradients]
        floor = _SMALL_SHARE * math.hypot(*expected)
        for (name, norms_B), norm in zip(norms.items(), expected, strict=True):
            if abs(float(norms_B[i]) - norm) > _tolerance(dtype) * (max(norm, floor) + 1e-4):
                raise ExampleCouplingError(
                    f"example {i}'s gradient norm of {name!r} is not the same alone and in a batch of {size}: a module "
                    f"mixes examples or does not keep the batch dimension first. Put the batch first, or name the module "
                    f"in fallback_modules."
                )


def _check_parameters(
    accumulator: ClippedGradientAccumulator, model: nn.Module, loss_fn: Callable[[Any], Tensor], inputs: Any
) -> None:
    """Whatever else gets a gradient, gets a raw one: a head outside the model, a parameter unfrozen later."""
    private = {id(parameter) for parameter in accumulator.parameters.values()}
    names = {id(parameter): repr(name) for name, parameter in model.named_parameters()}
    pending, seen = [loss_fn(_rows(inputs, [0])).grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in private:
            shown = names.get(id(leaf), f"of shape {tuple(leaf.shape)} outside the model")
            raise MissingRuleError(
                f"the loss has a gradient for parameter {shown}, which was not trainable or not there when the model was "
                f"made private, so nothing clips it. Make one module of everything that is trained, or freeze it with "
                f"requires_grad_(False)."
            )


def _check_company(model: nn.Module, loss_fn: Callable[[Any], Tensor], inputs: Any) -> None:
    """In training mode, with the same random numbers, example 0 must not notice its neighbour."""
    losses = []
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    for neighbour in (1, 2):
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(0)  # dropout masks only; restored on leaving, never used for noise
            losses.append(loss_fn(_rows(inputs, [0, neighbour, 0]))[0])
    if not _close(losses[0], losses[1], losses[0].dtype):
        raise ExampleCouplingError(
            "in training mode an example's loss changes with the other examples of its batch. Remove the module or loss "
            "term that uses batch statistics."
        )


def _check_memory(
    accumulator: ClippedGradientAccumulator, loss_fn: Callable[[Any], Tensor], inputs: Any
) -> None:
    """Examples that run one at a time can touch each other through what the model remembers alone."""
    norms, losses = [], []
    for row in (0, 1, 2, 0):
        tape, loss = accumulator.record(partial(loss_fn, _rows(inputs, [row])), batch_size=1)
        norms.append(accumulator.sq_norms_of(tape).sqrt())
        losses.append(loss)
    if not (_close(losses[0], losses[3], losses[0].dtype) and _close(norms[0], norms[3], losses[0].dtype)):
        raise ExampleCouplingError(
            "an example's loss or gradient norm changes with the examples that ran before it, so the model carries "
            "state from one to the next. Remove that state, or reset it in the forward pass."
        )


def _check_buffers(model: nn.Module, loss_fn: Callable[[Any], Tensor], inputs: Any, *, size: int) -> None:
    """Buffers that change in a forward pass would carry raw data into the released model."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        loss_fn(_rows(inputs, range(size)))
    for name, buffer in model.named_buffers():
        if name in before and not torch.equal(before[name], buffer):
            raise ExampleCouplingError(
                f"buffer {name!r} changes in a forward pass in training mode, so it would carry data into the released "
                f"model. Replace the module that keeps running statistics."
            )


def _narrowest(tensors: list[Any]) -> torch.dtype:
    dtype: torch.dtype = min((t.dtype for t in tensors), key=lambda d: d.itemsize)
    return dtype


def _tolerance(dtype: torch.dtype) -> float:
    autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return _LOW_PRECISION_TOLERANCE if autocast else _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE)


def _close(first: Tensor, second: Tensor, dtype: torch.dtype) -> bool:
    tolerance = _tolerance(dtype)
    return bool(torch.isclose(first.double(), second.double(), rtol=tolerance, atol=tolerance * 1e-2))


@contextmanager
def _moved_from_zero(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Adds public random numbers to parameters that are nearly zero; puts the old ones back on leaving."""
    generator = torch.Generator().manual_seed(0)  # moves the check's starting point, never used for noise
    moved = {
        p: p.detach().clone()
        for p in parameters
        if float(p.detach().double().square().mean()) < _NEAR_ZERO**2
    }
    try:
        with torch.no_grad():
            for parameter in moved:
                parameter.add_((_MOVED_BY * torch.randn(parameter.shape, generator=generator)).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in moved.items():
                parameter.copy_(before)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off: its masks differ between runs of different size."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _state_restored(model: nn.Module) -> Iterator[None]:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rng = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(rng)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
