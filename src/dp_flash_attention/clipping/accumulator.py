"""Exact flat per-example clipping by book-keeping: one forward and one backward pass.

While a microbatch runs, every module with trainable parameters records its inputs and output
gradients instead of computing a weight gradient. Afterwards each example's gradient norm is known
exactly, and the weight gradient is computed once, already weighted by the clip factors.

Source: Bu et al. 2023, "Differentially private optimization on large model at small cost"
(book-keeping); Li et al. 2022 (ghost norms); the exact cross terms of tied weights are ours, see
``contributions``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.clip import flat_clip_factors
from dp_flash_attention.clipping.contributions import Contribution, combined_sq_norms
from dp_flash_attention.clipping.coverage import (
    Recorded,
    modules_with_batch_statistics,
    plan_recording,
    refuse_batch_statistics,
)
from dp_flash_attention.clipping.norms import accumulation_dtype
from dp_flash_attention.clipping.precision import full_precision
from dp_flash_attention.clipping.random_state import RandomState
from dp_flash_attention.clipping.strategies import Strategy, checked_strategy
from dp_flash_attention.clipping.tape import Tape
from dp_flash_attention.clipping.two_pass import NormTape, SumTape
from dp_flash_attention.core.errors import (
    ExampleCouplingError,
    InvalidInputError,
    MissingRuleError,
    RunStateError,
)
from dp_flash_attention.core.privacy import NeighboringRelation, Sensitivity
from dp_flash_attention.core.validation import positive_finite, positive_int


@dataclass(frozen=True, kw_only=True)
class MicrobatchNorms:
    """What a microbatch showed of each example. Private data: never release it.

    Attributes:
        norms: Gradient norms before clipping, shape [B], float32 or better.
        losses: Per-example losses, shape [B].
    """

    norms: Tensor
    losses: Tensor


class ClippedGradientAccumulator:
    """Sums per-example gradients, each clipped to an L2 norm of at most C over all parameters.

    Args:
        model: Any module; its trainable parameters (``requires_grad``) at this moment are clipped.
        l2_clip_norm: C, in the unit of the gradient.
        fallback_modules: Names of modules, as in ``model.named_modules()``, to run under
            ``torch.func.vmap`` with one parameter copy for each example. Slower, exact for any module.
        strategy: ``"bookkeeping"``, one pass that holds what all layers record; or ``"two_pass"``, which frees them
            layer by layer, for checkpointed models, in about 1.7 of the time (``two_pass``). Either is exact. The
            first microbatch, or the start-up check, shows how often parameters are used and is book-kept.

    Raises:
        InvalidInputError: If the clip norm is not a positive finite number, or a name is unknown.
        MissingRuleError: If a trainable parameter has no per-example rule.
        ExampleCouplingError: If the model holds a module that mixes examples (BatchNorm, routers).

    Guarantees:
        neighbouring relation: add or remove one example.
        privacy unit: one example, that is one row of the microbatch.
        sensitivity: ``sums`` moves by at most C in L2 norm over all parameters together.
        public: the model's architecture, C, and the shapes of microbatches.
        theorem: each summand is ``g_i · min(1, C/‖g_i‖)``, whose norm is at most C, and depends on
            example i alone (Abadi et al. 2016, section 3.1). Norm and summand are computed from the
            same recorded tensors, so rounding of activations does not weaken the bound; rounding of
            the float32 sums themselves is outside this statement.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        l2_clip_norm: float,
        fallback_modules: Collection[str] = (),
        strategy: Strategy = "bookkeeping",
    ) -> None:
        self._l2_clip_norm = positive_finite(
            "l2_clip_norm", l2_clip_norm, remedy="Values between 0.1 and 10 are usual; 1.0 is a good start."
        )
        self._recorded: tuple[Recorded, ...] = plan_recording(model, fallback_modules)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._layouts: dict[str, bool] = {}
        self._sums: dict[str, Tensor] = {}
        self._strategy = checked_strategy(strategy)
        self._uses: dict[str, int] = {}
        self._recording = False
        self._partly_added = False
        self._statistics = modules_with_batch_statistics(model)

    @property
    def sensitivity(self) -> Sensitivity:
        """The L2 sensitivity of ``sums``: C under add-or-remove-one."""
        return Sensitivity(l2=self._l2_clip_norm, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)

    @property
    def sums(self) -> dict[str, Tensor]:
        """The clipped sums since the last reset, by parameter name; float32 or better.

        Raises:
            RunStateError: If an ``add`` broke off while it was adding.
        """
        self._check_whole()
        for name in self._parameters.keys() - self._sums.keys():
            self._sums[name] = self._empty(name).zero_()
        return {name: self._sums[name] for name in self._parameters}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The clipped parameters by name, each once, in the order of ``named_parameters``."""
        return dict(self._parameters)

    def reset(self) -> None:
        """Sets the sums to zero."""
        self._sums.clear()
        self._partly_added = False

    def add(
        self, loss_fn: Callable[[], Tensor], *, batch_size: int, weights: Tensor | None = None
    ) -> MicrobatchNorms:
        """Adds one microbatch's clipped gradients to the sums.

        Args:
            loss_fn: Runs the model and returns one loss for each example, shape [B]. It is called
                once, with ``two_pass`` twice. Batch dimension first; no loss may depend on another example.
            batch_size: B, padding included.
            weights: Shape [B], 1 for a real example and 0 for padding; None means all ones.

        Returns:
            Norms and losses of the examples. They are private data.

        Raises:
            ExampleCouplingError: If the losses do not have shape [B], or rows cannot be credited.
            MissingRuleError: If a parameter saw no gradient, or was used outside its module's rule.
            InvalidInputError: If a weight is neither 0 nor 1.
            RunStateError: If an earlier ``add`` broke off while it was adding (only ``reset`` helps), or if two passes
                give different losses.
        """
        self._check_whole()
        if self._strategy == "two_pass" and self._uses:
            return self._add_in_two_passes(loss_fn, batch_size=batch_size, weights=weights)
        tape, losses = self.record(loss_fn, batch_size=batch_size)
        weights_B = self.checked_weights(weights, batch_size=batch_size, device=losses.device)
        return self._add_clipped(tape, losses, weights_B)

    def _add_clipped(self, tape: Tape, losses: Tensor, weights_B: Tensor) -> MicrobatchNorms:
        with full_precision(losses.device):
            sq_norms_B = self.sq_norms_of(tape)
            clip = flat_clip_factors(sq_norms_B, l2_clip_norm=self._l2_clip_norm, weights_B=weights_B)
            drop = bool(clip.not_finite_B.any())
            # Adding it again after running out of memory here would count an example twice.
            self._partly_added = True
            for name in self._parameters:
                out, fresh = self._sum_of(name)
                contributions = tape.contributions.pop(name)
                while contributions:
                    # Popping frees each layer's activations as soon as they are used.
                    contribution: Contribution = contributions.pop()
                    if drop:
                        contribution = contribution.without(clip.not_finite_B)
                    contribution.add_weighted_sum(clip.factors_B, out, fresh=fresh)
                    fresh = False
            self._partly_added = False
        return MicrobatchNorms(norms=sq_norms_B.sqrt(), losses=losses)

    def _add_in_two_passes(
        self, loss_fn: Callable[[], Tensor], *, batch_size: int, weights: Tensor | None
    ) -> MicrobatchNorms:
        device = next(iter(self._parameters.values())).device
        batch_size = positive_int("batch_size", batch_size, remedy="Pass the microbatch's number of rows.")
        weights_B = self.checked_weights(weights, batch_size=batch_size, device=device)
        refuse_batch_statistics(self._statistics)
        random_state = RandomState(device)
        first = NormTape(uses=self._uses, device=device, batch_size=batch_size, layouts=self._layouts)
        losses = self._run(loss_fn, first)
        sq_norms_B = torch.stack([first.sq_norms(name) for name in self._parameters]).sum(0)
        clip = flat_clip_factors(sq_norms_B, l2_clip_norm=self._l2_clip_norm, weights_B=weights_B)
        random_state.rewind()
        second = SumTape(clip=clip, sum_of=self._sum_of, batch_size=batch_size, layouts=self._layouts)

        def check(again: Tensor) -> None:
            if not torch.equal(again.nan_to_num(), losses.nan_to_num()):
                raise RunStateError(
                    "the second forward pass gave other losses than the first, so its gradients are not those that were "
                    "measured; nothing was added. A loss function must give the same result when called twice: use the "
                    "strategy 'bookkeeping', or take out what changes between calls (state, random numbers of your own)."
                )
            self._partly_added = True

        self._run(loss_fn, second, check)
        self._partly_added = False
        return MicrobatchNorms(norms=sq_norms_B.sqrt(), losses=losses)

    def _sum_of(self, name: str) -> tuple[Tensor, bool]:
        """Returns a parameter's sum, made where there is none, and whether it holds nothing yet."""
        fresh = name not in self._sums
        if fresh:
            self._sums[name] = self._empty(name)
        return self._sums[name], fresh

    def record(
        self, loss_fn: Callable[[], Tensor], *, batch_size: int, probing: bool = False
    ) -> tuple[Tape, Tensor]:
        """Runs forward and backward and returns the tape and the losses; the sums stay as they are.

        ``add`` is what most callers want. The start-up check uses this to look at raw norms.

        Raises:
            ExampleCouplingError: As ``add``.
            MissingRuleError: As ``add``.
        """
        batch_size = positive_int("batch_size", batch_size, remedy="Pass the microbatch's number of rows.")
        refuse_batch_statistics(self._statistics)
        tape = Tape(batch_size=batch_size, layouts=self._layouts, probing=probing)
        losses = self._run(loss_fn, tape)
        self._uses = {name: len(tape.contributions[name]) for name in self._parameters}
        return tape, losses

    def _run(
        self, loss_fn: Callable[[], Tensor], tape: Tape, check: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Runs forward and backward on a tape; ``check`` sees the losses between the two."""
        with self._patched(tape), torch.enable_grad():
            losses = loss_fn()
            _check_losses(losses, tape.batch_size)
            if check is not None:
                check(losses.detach())
            # Autocast belongs to the forward pass: here it would narrow the float32 sums that rules record.
            with torch.autocast(losses.device.type, enabled=False):
                losses.sum().backward()
            self._check_complete(tape)
        return losses.detach()

    def sq_norms_of(self, tape: Tape) -> Tensor:
        """Returns each example's squared gradient norm over all parameters, shape [B]."""
        return torch.stack(list(self.sq_norms_by_parameter(tape).values())).sum(0)

    def sq_norms_by_parameter(self, tape: Tape) -> dict[str, Tensor]:
        """Returns each example's squared gradient norm of each parameter, shape [B] each."""
        device = next(iter(self._parameters.values())).device
        with full_precision(device):
            return {name: combined_sq_norms(tape.contributions[name]) for name in self._parameters}

    def clipped_sums(self, tape: Tape, weights_B: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Returns a microbatch's clipped sums by parameter name and its squared norms; ``sums`` stays as it is.

        For finite gradients only: a factor of 0 does not drop a NaN.
        """
        device = next(iter(self._parameters.values())).device
        sq_norms_B = self.sq_norms_of(tape)
        clip = flat_clip_factors(sq_norms_B, l2_clip_norm=self._l2_clip_norm, weights_B=weights_B)
        sums = {}
        with full_precision(device):
            for name in self._parameters:
                sums[name] = self._empty(name)
                for k, contribution in enumerate(reversed(tape.contributions[name])):
                    contribution.add_weighted_sum(clip.factors_B, sums[name], fresh=k == 0)
        return sums, sq_norms_B

    def add_sums(self, sums: dict[str, Tensor]) -> None:
        """Adds what ``clipped_sums`` returned, which belongs to the accumulator from now on."""
        self._check_whole()
        self._partly_added = True
        for name, total in sums.items():
            self._sums[name] = self._sums[name].add_(total) if name in self._sums else total
        self._partly_added = False

    def bound_to(self, model: nn.Module) -> ClippedGradientAccumulator:
        """Returns an accumulator of the same rules whose parameters are those that ``model`` holds now.

        While ``torch.func.functional_call`` runs, a module's parameters are others than it was built with.
        """
        bound = copy.copy(self)
        # Tied weights have several names; the module is asked for the ones that are clipped.
        held = dict(model.named_parameters(remove_duplicate=False))
        bound._parameters = {name: held[name] for name in self._parameters}
        bound._sums = {}
        return bound

    def _check_whole(self) -> None:
        if self._partly_added:
            raise RunStateError(
                "an earlier add() broke off while it was adding, so the sums hold a part of a microbatch and adding it "
                "again would count an example twice. Call reset() and begin the step anew (in a session: ask steps() "
                "again)."
            )

    def _empty(self, name: str) -> Tensor:
        """Returns uninitialised, row-major memory for a sum; the first contribution overwrites it."""
        parameter = self._parameters[name]
        return torch.empty(parameter.shape, dtype=accumulation_dtype(parameter), device=parameter.device)

    def checked_weights(self, weights: Tensor | None, *, batch_size: int, device: torch.device) -> Tensor:
        """Returns the weights that ``add`` uses.

        Raises:
            InvalidInputError: If a weight is neither 0 nor 1, or their number is not ``batch_size``.
        """
        if weights is None:
            return torch.ones(batch_size, device=device)
        if weights.shape != (batch_size,) or not bool(((weights == 0) | (weights == 1)).all()):
            raise InvalidInputError(
                "weights",
                tuple(weights.shape),
                bound=f"{batch_size} numbers, each 0 (padding) or 1 (a real example)",
                remedy="Scaling an example's gradient belongs into its loss, before clipping.",
            )
        return weights

    @contextmanager
    def _patched(self, tape: Tape) -> Iterator[None]:
        """Replaces the forwards for the duration of one microbatch."""
        if self._recording:
            raise RunStateError("A microbatch is already being recorded; call add() outside of loss_fn.")
        for item in self._recorded:
            if "forward" in item.module.__dict__:
                raise MissingRuleError(
                    f"the forward of module {item.name!r} ({type(item.module).__name__}) was replaced on the object, by a "
                    f"hook or a patched kernel, and its rule knows the class's own only. Remove the replacement before "
                    f"making the model private."
                )
        before = {name: p.grad for name, p in self._parameters.items()}
        self._recording = True
        try:
            for parameter in self._parameters.values():
                parameter.grad = None
            for item in self._recorded:
                item.module.__dict__["forward"] = item.rule.recording_forward(
                    item.module, name=item.name, parameters=item.parameters, tape=tape
                )
            yield
        finally:
            for item in self._recorded:
                item.module.__dict__.pop("forward", None)
            for name, parameter in self._parameters.items():
                parameter.grad = before[name]
            self._recording = False

    def _check_complete(self, tape: Tape) -> None:
        outside = [name for name, p in self._parameters.items() if p.grad is not None]
        if outside:
            raise MissingRuleError(
                f"{_listed(outside)} took part in the loss outside the module that owns it, where no rule sees it. "
                f"Call the module instead of using its weight directly, or name the enclosing module in "
                f"fallback_modules."
            )
        unseen = [name for name in self._parameters if not tape.has_seen(name)]
        if unseen:
            raise MissingRuleError(
                f"{_listed(unseen)} is trainable but saw no gradient in this microbatch. Freeze it with "
                f"requires_grad_(False) before making the model private, or use it in the loss."
            )


def _check_losses(losses: object, batch_size: int) -> None:
    if not isinstance(losses, Tensor) or losses.shape != (batch_size,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ExampleCouplingError(
            f"the loss has shape {shape}, but it must have one entry for each of the {batch_size} examples. Use "
            f"reduction='none' and divide each example's sum by its own number of tokens."
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"parameter {shown}{more}"
