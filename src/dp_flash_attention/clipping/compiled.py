"""The clipped step of a microbatch as one compiled graph.

Forward, backward, norms, clip factors and weighted gradients are traced once through the recording rules into
one graph of tensor operations, which ``torch.compile`` compiles without a break. Parameters and buffers are
inputs of the graph, so each call reads their present values.

What a graph cannot do, decide by values, is left outside: the graph returns the clipped sums together with one
flag, and only if the flag is down are they added. The flag is up for a microbatch with an example whose gradient
is not finite or whose rows cancel (``norms``); such a microbatch, rare, takes the eager path from the start, with
the same dropout masks.

A trace holds for what it was made with: the loss function, the inputs' shapes, types and plain values, the
modules' training flags, and the settings of precision. Another combination is traced anew. Other Python state that
a model reads, an attribute changed later say, stays what it was at the trace, which changes the model that is
trained and never the clipping: norms and sums come from one graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dp_flash_attention.clipping.accumulator import ClippedGradientAccumulator, MicrobatchNorms
from dp_flash_attention.clipping.norms import cancellation_deferred
from dp_flash_attention.clipping.precision import Autocast, full_precision
from dp_flash_attention.clipping.random_state import RandomState
from dp_flash_attention.clipping.trace_key import TraceKey
from dp_flash_attention.core.errors import CompilationError, DPFlashAttentionError

# A loss function made anew for each microbatch over other values would be traced each time, for a minute each.
_MOST_TRACES = 16

# What the compiled graph may differ from the eager step by at its first use, relative; rounding in float32 gives
# 1e-6, in bfloat16 5e-3, a wrong graph far more.
_AGREEMENT = 1e-3
_LOW_PRECISION_AGREEMENT = 2e-2

# What an example's part of the sum may differ from its clipped norm by, in any precision: both are made of the same numbers.
_BOUND_AGREEMENT = 1e-3

_COMPILER_OPTIONS: Final[dict[str, str | int | bool | Callable[..., Any]]] = {
    # The eager step's random numbers: dropout masks are the same on either path.
    "fallback_random": True,
    # A 16-bit intermediate is rounded wherever it is used. Otherwise a fused norm may read it in float32 and the sum
    # as it was stored, and what is clipped would not be what is released.
    "emulate_precision_casts": True,
}

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class _GraphResult:
    """What a graph returns of one microbatch."""

    sums: dict[str, Tensor]
    sq_norms_KB: Tensor
    losses_B: Tensor
    needs_eager: Tensor


@dataclass(kw_only=True)
class _Graph:
    """A compiled step, and whether a result of it was compared with the eager step yet."""

    key: TraceKey
    run: Callable[..., _GraphResult]
    agrees: bool = False


class CompiledClipping:
    """Adds microbatches to an accumulator's sums by a compiled graph.

    Args:
        accumulator: Whose sums, clip norm and rules are used.
        model: The model that the accumulator was made for.

    Guarantees: those of ``ClippedGradientAccumulator``, with one term more that is *assumed*: that the compiler
        carries out the graph. It is looked at, not proved: at the first use of each graph its norms and sums
        are compared with the eager ones.
    """

    def __init__(self, accumulator: ClippedGradientAccumulator, model: nn.Module) -> None:
        self._accumulator, self._model = accumulator, model
        self._graphs: list[_Graph] = []

    @property
    def num_traces(self) -> int:
        """How many graphs were made so far."""
        return len(self._graphs)

    def add(
        self, loss_fn: LossFn, inputs: Any, *, batch_size: int, weights: Tensor | None = None
    ) -> MicrobatchNorms:
        """Adds one microbatch's clipped gradients to the accumulator's sums; see its ``add``.

        Autocast that is on here holds inside the loss function, and for nothing else.

        Args:
            loss_fn: Maps the model and a tree of inputs to one loss for each example, shape [B].
            inputs: A tree whose tensors have B rows.
            batch_size: B, padding included.
            weights: Shape [B], 1 for a real example and 0 for padding; None means all ones.

        Raises:
            CompilationError: If the step cannot be traced or compiled, or the graph disagrees with the eager step at
                its first use. Nothing was added.
            InvalidInputError: As the accumulator's ``add``.
            ExampleCouplingError: As the accumulator's ``add``.
            MissingRuleError: As the accumulator's ``add``.
        """
        device = next(iter(self._accumulator.parameters.values())).device
        checked_B = self._accumulator.checked_weights(weights, batch_size=batch_size, device=device)

        random_state = RandomState(device)
        autocast = Autocast.of(device)
        as_called = partial(autocast.call, loss_fn)
        with full_precision(device):
            graph = self._graph_for(loss_fn, inputs, checked_B, autocast)
            random_state.rewind()
            result = _run(graph.run, self._state(), inputs, checked_B)
            random_state.rewind()
            if bool(result.needs_eager):
                return self._accumulator.add(
                    lambda: as_called(self._model, inputs), batch_size=batch_size, weights=weights
                )
            if not graph.agrees:
                self._check_agreement(result, as_called, inputs, checked_B, low=autocast.enabled)
                sq_norms_B = result.sq_norms_KB.sum(0)
                for example in {int(sq_norms_B.argmin()), int(sq_norms_B.argmax())}:
                    random_state.rewind()
                    self._check_bound(graph, inputs, torch.zeros_like(checked_B), example)
                graph.agrees = True
            self._accumulator.add_sums(result.sums)
        return self._accumulator.seen(result.sq_norms_KB, result.losses_B)

    def _state(self) -> dict[str, Tensor]:
        """Returns the model's parameters and buffers by name, as plain tensors."""
        return {name: p.detach() for name, p in self._model.named_parameters()} | dict(
            self._model.named_buffers()
        )

    def _graph_for(self, loss_fn: LossFn, inputs: Any, weights_B: Tensor, autocast: Autocast) -> _Graph:
        key = TraceKey.of(self._model, loss_fn, inputs, autocast)
        for graph in self._graphs:
            if graph.key == key:
                return graph
        if len(self._graphs) >= _MOST_TRACES:
            raise CompilationError(
                f"the step would be traced for the {_MOST_TRACES + 1}th time. Give accumulate() the same loss function "
                f"and inputs of the same shapes each time (pad to one length), or train without compile."
            )
        graph = _Graph(key=key, run=self._trace(partial(autocast.call, loss_fn), inputs, weights_B))
        self._graphs.append(graph)
        return graph

    def _trace(self, loss_fn: LossFn, inputs: Any, weights_B: Tensor) -> Callable[..., _GraphResult]:
        step = _Step(self._model, self._accumulator, loss_fn)

        def run(
            state: dict[str, Tensor], inputs: Any, weights_B: Tensor
        ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
            trained = self._accumulator.parameters.keys()
            leaves = {
                f"model.{n}": t.detach().requires_grad_() if n in trained else t for n, t in state.items()
            }
            result: tuple[dict[str, Tensor], Tensor, Tensor, Tensor] = torch.func.functional_call(
                step, leaves, (inputs, weights_B)
            )
            return result

        try:
            # Fake tensors have no values, so a model whose course depends on them raises here.
            traced = make_fx(run, tracing_mode="fake")(self._state(), inputs, weights_B)
        except DPFlashAttentionError:
            raise
        except Exception as error:
            raise CompilationError(
                f"the step cannot be traced into one graph: {_short(error)}. A forward pass may not depend on "
                f"values of tensors, nor use tensors that are neither inputs, parameters nor buffers. Change that, or "
                f"train without compile."
            ) from error
        compiled = torch.compile(traced, fullgraph=True, dynamic=False, options=_COMPILER_OPTIONS)

        def call(state: dict[str, Tensor], inputs: Any, weights_B: Tensor) -> _GraphResult:
            sums, sq_norms_KB, losses_B, needs_eager = compiled(state, inputs, weights_B)
            return _GraphResult(
                sums=sums, sq_norms_KB=sq_norms_KB, losses_B=losses_B, needs_eager=needs_eager
            )

        return call

    def _check_agreement(
        self, result: _GraphResult, loss_fn: LossFn, inputs: Any, weights_B: Tensor, *, low: bool
    ) -> None:
        """Compares the first result of a graph that would be used with the eager one: each norm, losses, each sum."""
        tape, losses_B = self._accumulator.record(
            lambda: loss_fn(self._model, inputs), batch_size=len(weights_B)
        )
        sums, sq_norms_KB = self._accumulator.clipped_sums(tape, weights_B)
        low = low or any(p.dtype.itemsize < 4 for p in self._accumulator.parameters.values())
        share = _LOW_PRECISION_AGREEMENT if low else _AGREEMENT
        # What is tiny beside C inherits the rounding of what is not.
        least = self._accumulator.sensitivity.l2 * 1e-3
        norms_KB = sq_norms_KB.sqrt()
        _require("a norm", (result.sq_norms_KB.sqrt() - norms_KB).abs(), norms_KB.clamp(min=least), share)
        _require("losses", (result.losses_B - losses_B).norm(), losses_B.norm(), share)
        for name, total in sums.items():
            difference = (result.sums[name] - total).norm()
            _require(f"the sum of {name}", difference, total.norm().clamp(min=least), share)

    def _check_bound(self, graph: _Graph, inputs: Any, weights_B: Tensor, example: int) -> None:
        """Checks that what one example alone adds to a group is as long as its norm says, clipped: the sensitivity."""
        weights_B[example] = 1.0
        alone = _run(graph.run, self._state(), inputs, weights_B)
        groups = self._accumulator.groups
        for group, bound, sq_norms_B in zip(
            groups.groups, groups.l2_clip_norms, alone.sq_norms_KB, strict=True
        ):
            found = torch.stack([alone.sums[name].double().norm() for name in group.parameters]).norm()
            clipped = sq_norms_B[example].sqrt().double().clamp(max=bound)
            _require("what one example adds", (found - clipped).abs(), clipped, _BOUND_AGREEMENT)


class _Step(nn.Module):
    """The clipped step as a module, so that parameters and buffers can be handed in."""

    def __init__(self, model: nn.Module, accumulator: ClippedGradientAccumulator, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self._accumulator, self._loss_fn = accumulator, loss_fn

    def forward(self, inputs: Any, weights_B: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        accumulator = self._accumulator.bound_to(self.model)
        with cancellation_deferred() as cancelled:
            tape, losses_B = accumulator.record(
                lambda: self._loss_fn(self.model, inputs), batch_size=len(weights_B)
            )
            sums, sq_norms_KB = accumulator.clipped_sums(tape, weights_B)
        needs_eager = ~torch.isfinite(sq_norms_KB.sqrt()).all()
        for cancelled_B in cancelled:
            needs_eager = needs_eager | cancelled_B.any()
        return sums, sq_norms_KB, losses_B, needs_eager


def _require(what: str, difference: Tensor, size: Tensor, share: float) -> None:
    if not bool((difference <= share * size).all()):  # a NaN is none
        raise CompilationError(
            f"the compiled step disagrees with the eager one: {what} differs by more than {share:g} of its size. "
            f"Nothing was added. Train without compile, and report this."
        )


def _run(graph: Callable[..., _GraphResult], *arguments: Any) -> _GraphResult:
    try:
        with warnings.catch_warnings():
            # No code of the user's runs here; the compiler uses parts of torch that torch warns of.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return graph(*arguments)
    except DPFlashAttentionError:
        raise
    except torch._dynamo.exc.TorchDynamoException as error:
        raise CompilationError(
            f"the step could not be compiled: {_short(error)}. On a CPU torch.compile needs a C++ compiler (g++ or "
            f"clang++, with Python's headers); install one, or train without compile."
        ) from error


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300].rstrip(".:") or type(error).__name__
