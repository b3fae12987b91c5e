"""Two passes over a microbatch, so that no layer's inputs and output gradients outlive its backward.

Book-keeping holds what every layer recorded until all norms are known. Here the first pass keeps a layer's squared
norms and frees its record at once; the second runs forward and backward again and adds each layer's weighted
gradient the moment it is recorded. With activation checkpointing, where records are most of what is held, that is
near the memory of the non-private step; without, the peak is at the start of the backward pass, where no record exists
yet, and little is gained. Time is about 1.7 of book-keeping's.

**What is clipped is what is released**: both passes record by the same rules at the same parameters, with the same
dropout masks, so the second sees the numbers whose norms the first took. Losses that differ in a single bit between
the two show that it does not, and nothing is added.

Parameters used more than once (tied weights, reused modules) need cross terms, so their records are kept to the end
of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dp_flash_attention.clipping.clip import ClipFactors
from dp_flash_attention.clipping.combined_norms import combined_sq_norms
from dp_flash_attention.clipping.contributions import Contribution
from dp_flash_attention.clipping.precision import full_precision
from dp_flash_attention.clipping.tape import Tape
from dp_flash_attention.core.errors import MissingRuleError, RunStateError


class NormTape(Tape):
    """Keeps squared norms of parameters that are used once, and the records of the others.

    Args:
        uses: How often each parameter was used in an earlier microbatch.
        device: The model's.
        batch_size: As for ``Tape``.
        layouts: As for ``Tape``.
    """

    def __init__(
        self, *, uses: Mapping[str, int], device: torch.device, batch_size: int, layouts: dict[str, bool]
    ) -> None:
        super().__init__(batch_size=batch_size, layouts=layouts)
        self._uses, self._device = uses, device
        self._sq_norms: dict[str, Tensor] = {}

    def record(self, parameter: str, contribution: Contribution) -> None:
        """Takes the norms of a parameter's only use; keeps the record of one that has several.

        Raises:
            MissingRuleError: If a parameter that was used once before is used again: its first record is gone, and
                with it the cross term.
        """
        if parameter in self._sq_norms:
            raise MissingRuleError(
                f"parameter {parameter!r} is used again in this microbatch, but was used once in the first. Train with "
                f"the strategy 'bookkeeping', which does not depend on it."
            )
        if self._uses.get(parameter) == 1:
            self._sq_norms[parameter] = self._norms_of([contribution])
        else:
            super().record(parameter, contribution)

    def has_seen(self, parameter: str) -> bool:
        """Whether a use of the parameter was recorded."""
        return parameter in self._sq_norms or super().has_seen(parameter)

    def sq_norms(self, parameter: str) -> Tensor:
        """Returns each example's squared norm of a parameter's gradient, shape [B]; frees what was kept for it."""
        found = self._sq_norms.get(parameter)
        return self._norms_of(self.contributions.pop(parameter)) if found is None else found

    def _norms_of(self, contributions: list[Contribution]) -> Tensor:
        # Most of this runs during the backward pass, where the caller's autocast may still be on.
        with full_precision(self._device):
            return combined_sq_norms(contributions)


class SumTape(Tape):
    """Adds each weighted gradient the moment it is recorded.

    Args:
        clip: Factors of the first pass.
        sum_of: Returns a parameter's sum and whether it holds nothing yet.
        batch_size: As for ``Tape``.
        layouts: As for ``Tape``.
    """

    def __init__(
        self,
        *,
        clip: ClipFactors,
        sum_of: Callable[[str], tuple[Tensor, bool]],
        batch_size: int,
        layouts: dict[str, bool],
    ) -> None:
        super().__init__(batch_size=batch_size, layouts=layouts)
        self._clip, self._sum_of = clip, sum_of
        self._drop = bool(clip.not_finite_B.any())
        self._seen: set[str] = set()

    def record(self, parameter: str, contribution: Contribution) -> None:
        """Adds the contribution, times the clip factors, to the parameter's sum."""
        if self._drop:
            contribution = contribution.without(self._clip.not_finite_B)
        out, fresh = self._sum_of(parameter)
        with full_precision(out.device):
            contribution.add_weighted_sum(self._clip.factors_B, out, fresh=fresh)
        self._seen.add(parameter)

    def has_seen(self, parameter: str) -> bool:
        """Whether a use of the parameter was recorded."""
        return parameter in self._seen


def check_same_losses(first_B: Tensor, second_B: Tensor) -> None:
    """Checks that the second pass is the first again.

    Raises:
        RunStateError: If a loss differs in a single bit.
    """
    if not torch.equal(second_B.nan_to_num(), first_B.nan_to_num()):
        raise RunStateError(
            "the second forward pass gave other losses than the first, so its gradients are not those that were "
            "measured; nothing was added. A loss function must give the same result when called twice: use the "
            "strategy 'bookkeeping', or take out what changes between calls (state, random numbers of your own)."
        )
