"""Clips a group of parameters and adds it to the sums, during the backward pass or after it.

Per-layer clipping needs the norm of one group alone, and that is known as soon as the group's last use was recorded.
``GroupTape`` therefore clips and adds a group in the backward pass and lets its activations and output gradients
go: with activation checkpointing the step holds one layer's record at a time, and runs forward and backward once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dp_flash_attention.clipping.clip import flat_clip_factors
from dp_flash_attention.clipping.clip_groups import BoundedGroups
from dp_flash_attention.clipping.combined_norms import combined_sq_norms
from dp_flash_attention.clipping.contributions import Contribution
from dp_flash_attention.clipping.precision import full_precision
from dp_flash_attention.clipping.sums import ClippedSums
from dp_flash_attention.clipping.tape import Tape
from dp_flash_attention.core.errors import MissingRuleError


def add_group(
    contributions: dict[str, list[Contribution]],
    parameters: Sequence[str],
    *,
    l2_clip_norm: float,
    weights_B: Tensor,
    sums: ClippedSums,
) -> Tensor:
    """Adds each example's gradient of a group, clipped to its bound, to the sums; takes its contributions.

    Args:
        contributions: By parameter; those of the group are removed.
        parameters: The group.
        l2_clip_norm: C_k.
        weights_B: 1 for a real example, 0 for padding.
        sums: Marked as begun; whoever adds all groups of a microbatch calls ``end``.

    Returns:
        Each example's squared norm over the group, [B].

    Guarantees: an example adds a vector of norm at most C_k, which depends on that example alone; nothing where its
        norm is not finite, whatever becomes of it in other groups.
    """
    sq_norms_B = group_sq_norms(contributions, parameters)
    clip = flat_clip_factors(sq_norms_B, l2_clip_norm=l2_clip_norm, weights_B=weights_B)
    drop = bool(clip.not_finite_B.any())
    sums.begin()
    for name in parameters:
        out, fresh = sums.of(name)
        uses = contributions.pop(name)
        while uses:
            # Popping frees each layer's activations as soon as they are used.
            contribution = uses.pop()
            if drop:
                contribution = contribution.without(clip.not_finite_B)
            contribution.add_weighted_sum(clip.factors_B, out, fresh=fresh)
            fresh = False
    return sq_norms_B


def group_sq_norms(contributions: Mapping[str, Sequence[Contribution]], parameters: Sequence[str]) -> Tensor:
    """Returns each example's squared norm over a group, all uses of all its parameters, [B]."""
    return torch.stack([combined_sq_norms(contributions[name]) for name in parameters]).sum(0)


class GroupTape(Tape):
    """Clips and adds each group the moment its last use is recorded.

    Args:
        groups: The partition and its bounds.
        uses: How often each parameter was used in an earlier microbatch; a group waits for as many.
        weights_B: 1 for a real example, 0 for padding.
        sums: Where groups are added.
        batch_size: As for ``Tape``.
        layouts: As for ``Tape``.
    """

    def __init__(
        self,
        *,
        groups: BoundedGroups,
        uses: Mapping[str, int],
        weights_B: Tensor,
        sums: ClippedSums,
        batch_size: int,
        layouts: dict[str, bool],
    ) -> None:
        super().__init__(batch_size=batch_size, layouts=layouts)
        self._groups, self._index_of, self._uses = groups, groups.index_of(), uses
        self._weights_B, self._sums = weights_B, sums
        self._sq_norms: dict[int, Tensor] = {}

    def record(self, parameter: str, contribution: Contribution) -> None:
        """Keeps a use, and adds its group if that was the last one it waited for.

        Raises:
            MissingRuleError: If the group was added before: its norm left this use out.
        """
        k = self._index_of[parameter]
        if k in self._sq_norms:
            raise MissingRuleError(
                f"parameter {parameter!r} is used more often in this microbatch than its {self._uses.get(parameter)} times "
                f"in the first, after its group was clipped. Train with clipping 'flat' or the strategy 'one_example', "
                f"which do not depend on it."
            )
        super().record(parameter, contribution)
        if all(
            len(self.contributions.get(p, ())) >= self._uses[p] for p in self._groups.groups[k].parameters
        ):
            self._add(k)

    def has_seen(self, parameter: str) -> bool:
        """Whether a use of the parameter was recorded."""
        return self._index_of[parameter] in self._sq_norms or super().has_seen(parameter)

    def finish(self) -> Tensor:
        """Adds the groups that saw fewer uses than before; returns all squared norms by group, [K, B]."""
        for k in range(len(self._groups.groups)):
            if k not in self._sq_norms:
                self._add(k)
        return torch.stack([self._sq_norms[k] for k in range(len(self._groups.groups))])

    def _add(self, k: int) -> None:
        # Most of this runs during the backward pass, where the caller's autocast may still be on.
        with full_precision(self._weights_B.device):
            self._sq_norms[k] = add_group(
                self.contributions,
                self._groups.groups[k].parameters,
                l2_clip_norm=self._groups.l2_clip_norms[k],
                weights_B=self._weights_B,
                sums=self._sums,
            )
