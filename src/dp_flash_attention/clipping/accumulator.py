"""Exact per-example clipping by book-keeping: one forward and one backward pass.

While a microbatch runs, every module with trainable parameters records its inputs and output
gradients instead of computing a weight gradient. Afterwards each example's gradient norm is known
exactly, and the weight gradient is computed once, already weighted by the clip factors. Where groups of parameters
are clipped each to a bound of its own, that happens group by group during the backward pass (``group_clipping``).

Source: Bu et al. 2023, "Differentially private optimization on large model at small cost"
(book-keeping); Li et al. 2022 (ghost norms); the exact cross terms of tied weights are ours, see
``combined_norms``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.clip import flat_clip_factors
from dp_flash_attention.clipping.clip_groups import BoundedGroups, ClipGroup, Clipping, bounded_groups
from dp_flash_attention.clipping.combined_norms import combined_sq_norms
from dp_flash_attention.clipping.coverage import (
    Recorded,
    modules_with_batch_statistics,
    plan_recording,
    refuse_batch_statistics,
    trainable_parameters,
)
from dp_flash_attention.clipping.group_clipping import GroupTape, add_group, group_sq_norms
from dp_flash_attention.clipping.one_example import check_one_example, record_one_example
from dp_flash_attention.clipping.precision import full_precision
from dp_flash_attention.clipping.random_state import RandomState
from dp_flash_attention.clipping.recording import (
    check_all_seen,
    check_losses,
    check_no_gradient_outside,
    recording_forwards,
)
from dp_flash_attention.clipping.strategies import Strategy, checked_strategy
from dp_flash_attention.clipping.sums import ClippedSums
from dp_flash_attention.clipping.tape import Tape
from dp_flash_attention.clipping.two_pass import NormTape, SumTape, check_same_losses
from dp_flash_attention.core.errors import InvalidInputError, RunStateError
from dp_flash_attention.core.privacy import NeighboringRelation, Sensitivity
from dp_flash_attention.core.validation import positive_finite, positive_int


@dataclass(frozen=True, kw_only=True)
class MicrobatchNorms:
    """What a microbatch showed of each example. Private data: never release it.

    Attributes:
        norms: Gradient norms before clipping, shape [B], float32 or better.
        losses: Per-example losses, shape [B].
        clipped: Whether any group's norm was above its bound or not finite, shape [B].
    """

    norms: Tensor
    losses: Tensor
    clipped: Tensor


class ClippedGradientAccumulator:
    """Sums per-example gradients, each clipped to an L2 norm of at most C over all parameters together.

    Args:
        model: Any module; its trainable parameters (``requires_grad``) at this moment are clipped.
        l2_clip_norm: C, in the unit of the gradient.
        fallback_modules: Names of modules, as in ``model.named_modules()``, to run under
            ``torch.func.vmap`` with one parameter copy for each example. Slower, exact for any module; ``"one_example"``
            does that for all.
        strategy: ``"bookkeeping"``, one pass that holds what all layers record; ``"two_pass"``, which frees them
            layer by layer, for checkpointed models, in about 1.7 of the time; or ``"one_example"``, microbatches of one
            example and no rules. Each is exact. The first microbatch, or the start-up check, shows how often parameters
            are used and is book-kept.
        clipping: ``"flat"``, one norm over all parameters; or ``"per_layer"``, one for each group of parameters, whose
            bounds C_k have ``Σ C_k² = C²`` (``clip_groups``).
        clip_groups: The groups of ``"per_layer"``; None means one of equal weight for each module.

    Raises:
        InvalidInputError: If the clip norm is not a positive finite number, or a name is unknown.
        MissingRuleError: If a trainable parameter has no per-example rule.
        ExampleCouplingError: If the model holds a module that mixes examples (BatchNorm, routers).

    Guarantees:
        neighbouring relation: add or remove one example.
        privacy unit: one example, that is one row of the microbatch.
        sensitivity: ``sums`` moves by at most C in L2 norm over all parameters together.
        public: the model's architecture, C, and the shapes of microbatches.
        theorem: each summand has parts ``g_ik · min(1, C_k/‖g_ik‖)`` in groups k, flat clipping having one, and
            depends on example i alone; its norm is at most ``sqrt(Σ C_k²) = C`` (Abadi et al. 2016, section 3.1;
            McMahan et al. 2018, section 2.2). Norm and summand are computed from the same recorded tensors, so
            rounding of activations does not weaken the bound; rounding of the float32 sums themselves is outside
            this statement.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        l2_clip_norm: float,
        fallback_modules: Collection[str] = (),
        strategy: Strategy = "bookkeeping",
        clipping: Clipping = "flat",
        clip_groups: Sequence[ClipGroup] | None = None,
    ) -> None:
        self._l2_clip_norm = positive_finite(
            "l2_clip_norm", l2_clip_norm, remedy="Values between 0.1 and 10 are usual; 1.0 is a good start."
        )
        self._strategy = checked_strategy(strategy, clipping=clipping)
        self._parameters = trainable_parameters(model)
        self._recorded: tuple[Recorded, ...] = ()
        if self._strategy != "one_example":
            self._recorded = plan_recording(model, fallback_modules)
        self._groups = bounded_groups(
            model, l2_clip_norm=self._l2_clip_norm, clipping=clipping, groups=clip_groups
        )
        self._layouts: dict[str, bool] = {}
        self._sums = ClippedSums(self._parameters)
        self._uses: dict[str, int] = {}
        self._recording = False
        self._statistics = modules_with_batch_statistics(model)
        refuse_batch_statistics(self._statistics)

    @property
    def groups(self) -> BoundedGroups:
        """What is clipped together, and to which bounds; flat clipping has one group."""
        return self._groups

    @property
    def strategy(self) -> Strategy:
        """How the sums are computed."""
        return self._strategy

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
        return self._sums.all()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The clipped parameters by name, each once, in the order of ``named_parameters``."""
        return dict(self._parameters)

    def reset(self) -> None:
        """Sets the sums to zero."""
        self._sums.reset()

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
        self._sums.check_whole()
        if self._uses and self._strategy == "two_pass":
            return self._add_in_two_passes(loss_fn, batch_size=batch_size, weights=weights)
        if self._uses and self._strategy == "bookkeeping" and len(self._groups.groups) > 1:
            return self._add_by_groups(loss_fn, batch_size=batch_size, weights=weights)
        tape, losses = self.record(loss_fn, batch_size=batch_size)
        weights_B = self.checked_weights(weights, batch_size=batch_size, device=losses.device)
        with full_precision(losses.device):
            sq_norms_KB = torch.stack(
                [
                    add_group(
                        tape.contributions,
                        group.parameters,
                        l2_clip_norm=bound,
                        weights_B=weights_B,
                        sums=self._sums,
                    )
                    for group, bound in self._bounds()
                ]
            )
        self._sums.end()
        return self.seen(sq_norms_KB, losses)

    def _add_by_groups(
        self, loss_fn: Callable[[], Tensor], *, batch_size: int, weights: Tensor | None
    ) -> MicrobatchNorms:
        batch_size, weights_B = self._begin(batch_size, weights)
        tape = GroupTape(
            groups=self._groups,
            uses=self._uses,
            weights_B=weights_B,
            sums=self._sums,
            batch_size=batch_size,
            layouts=self._layouts,
        )
        losses = self._run(loss_fn, tape)
        sq_norms_KB = tape.finish()
        self._sums.end()
        return self.seen(sq_norms_KB, losses)

    def _add_in_two_passes(
        self, loss_fn: Callable[[], Tensor], *, batch_size: int, weights: Tensor | None
    ) -> MicrobatchNorms:
        batch_size, weights_B = self._begin(batch_size, weights)
        device = weights_B.device
        random_state = RandomState(device)
        first = NormTape(uses=self._uses, device=device, batch_size=batch_size, layouts=self._layouts)
        losses = self._run(loss_fn, first)
        sq_norms_B = torch.stack([first.sq_norms(name) for name in self._parameters]).sum(0)
        clip = flat_clip_factors(sq_norms_B, l2_clip_norm=self._l2_clip_norm, weights_B=weights_B)
        random_state.rewind()
        second = SumTape(clip=clip, sum_of=self._sums.of, batch_size=batch_size, layouts=self._layouts)

        def check(again: Tensor) -> None:
            check_same_losses(losses, again)
            self._sums.begin()

        self._run(loss_fn, second, check)
        self._sums.end()
        return self.seen(sq_norms_B[None], losses)

    def seen(self, sq_norms_KB: Tensor, losses: Tensor) -> MicrobatchNorms:
        """Returns what a microbatch showed, from each group's squared norms [K, B] and the losses [B]."""
        bounds_K1 = sq_norms_KB.new_tensor(self._groups.l2_clip_norms)[:, None]
        clipped_B = ~(sq_norms_KB.sqrt() <= bounds_K1).all(0)
        return MicrobatchNorms(norms=sq_norms_KB.sum(0).sqrt(), losses=losses, clipped=clipped_B)

    def _bounds(self) -> Iterator[tuple[ClipGroup, float]]:
        return zip(self._groups.groups, self._groups.l2_clip_norms, strict=True)

    def _begin(self, batch_size: int, weights: Tensor | None) -> tuple[int, Tensor]:
        batch_size = positive_int("batch_size", batch_size, remedy="Pass the microbatch's number of rows.")
        refuse_batch_statistics(self._statistics)
        device = next(iter(self._parameters.values())).device
        return batch_size, self.checked_weights(weights, batch_size=batch_size, device=device)

    def record(
        self, loss_fn: Callable[[], Tensor], *, batch_size: int, probing: bool = False
    ) -> tuple[Tape, Tensor]:
        """Runs forward and backward and returns the tape and the losses; the sums stay as they are.

        ``add`` is what most callers want. The start-up check uses this to look at raw norms.

        Raises:
            ExampleCouplingError: As ``add``.
            MissingRuleError: As ``add``.
        """
        batch_size, _ = self._begin(batch_size, None)
        if self._strategy == "one_example":
            return self._record_one(loss_fn, batch_size)
        tape = Tape(batch_size=batch_size, layouts=self._layouts, probing=probing)
        losses = self._run(loss_fn, tape)
        self._uses = {name: len(tape.contributions[name]) for name in self._parameters}
        return tape, losses

    def _record_one(self, loss_fn: Callable[[], Tensor], batch_size: int) -> tuple[Tape, Tensor]:
        check_one_example(batch_size)
        with self._alone():
            tape, losses = record_one_example(loss_fn, parameters=self._parameters)
        check_all_seen(self._parameters, tape)
        return tape, losses

    def _run(
        self, loss_fn: Callable[[], Tensor], tape: Tape, check: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Runs forward and backward on a tape; ``check`` sees the losses between the two."""
        with (
            self._alone(),
            recording_forwards(self._recorded, self._parameters, tape),
            torch.enable_grad(),
        ):
            losses = loss_fn()
            check_losses(losses, tape.batch_size)
            if check is not None:
                check(losses.detach())
            # Autocast belongs to the forward pass: here it would narrow the float32 sums that rules record.
            with torch.autocast(losses.device.type, enabled=False):
                losses.sum().backward()
            check_no_gradient_outside(self._parameters)
            check_all_seen(self._parameters, tape)
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
        """Returns a microbatch's clipped sums by parameter name and squared norms [K, B]; ``sums`` stays as it is.

        For finite gradients only: a factor of 0 does not drop a NaN.
        """
        device = next(iter(self._parameters.values())).device
        sums, sq_norms = {}, []
        with full_precision(device):
            for group, bound in self._bounds():
                sq_norms_B = group_sq_norms(tape.contributions, group.parameters)
                clip = flat_clip_factors(sq_norms_B, l2_clip_norm=bound, weights_B=weights_B)
                sq_norms.append(sq_norms_B)
                for name in group.parameters:
                    sums[name] = self._sums.empty(name)
                    for k, contribution in enumerate(reversed(tape.contributions[name])):
                        contribution.add_weighted_sum(clip.factors_B, sums[name], fresh=k == 0)
        return {name: sums[name] for name in self._parameters}, torch.stack(sq_norms)

    def add_sums(self, sums: dict[str, Tensor]) -> None:
        """Adds what ``clipped_sums`` returned, which belongs to the accumulator from now on."""
        self._sums.add(sums)

    def bound_to(self, model: nn.Module) -> ClippedGradientAccumulator:
        """Returns an accumulator of the same rules whose parameters are those that ``model`` holds now.

        While ``torch.func.functional_call`` runs, a module's parameters are others than it was built with.
        """
        bound = copy.copy(self)
        # Tied weights have several names; the module is asked for the ones that are clipped.
        held = dict(model.named_parameters(remove_duplicate=False))
        bound._parameters = {name: held[name] for name in self._parameters}
        bound._sums = ClippedSums(bound._parameters)
        return bound

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
    def _alone(self) -> Iterator[None]:
        """Refuses a microbatch inside another: its example would count twice."""
        if self._recording:
            raise RunStateError("A microbatch is already being recorded; call add() outside of loss_fn.")
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
