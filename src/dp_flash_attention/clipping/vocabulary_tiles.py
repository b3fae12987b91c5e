"""Softmax and cross entropy over a large vocabulary in tiles: logits [B, T, V] are never stored.

A tile is a group of whole examples by a range of vocabulary rows. Its logits are computed into scratch of a bounded
size, used and forgotten; a later pass computes them again by the same products, so that it sees the same numbers.
Whatever is kept between passes is O(B·T): the largest logit of each token and the sum of the exponentials above it.

Shape suffixes: B examples, N examples of a group, T rows (tokens) an example, D inputs, V vocabulary rows, C rows of V
in a tile.

Source: the running maximum and sum are those of Milakov and Gimelshein 2018, "Online normalizer calculation for
softmax", section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_flash_attention.clipping.norms import accumulation_dtype

# One example of 512 tokens over a vocabulary of 50k in float32 is 98 MiB. Where an example's logits fit as a whole,
# the exponentials of the loss serve its gradient, and one of the three products with the head is saved.
SCRATCH_BYTES = 128 * 2**20

# Rows of the vocabulary in a tile where they do not fit.
_TILE_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """What is kept of each token's softmax.

    Attributes:
        largest_BT: The largest logit m.
        total_BT: ``Σ_v exp(z_v - m)``, at least 1.
    """

    largest_BT: Tensor
    total_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class Head:
    """One use of a head: rows times a weight, and the token that should have come out.

    Attributes:
        h_BTD: The head's inputs, in the dtype that the product reads.
        weight_VD: The weight as it is stored.
        bias_V: The bias as it is stored, or None.
        targets_BT: Token ids in 0..V-1; any of them where the coefficient of the token's loss is 0.
        scratch_bytes: Most bytes of logits held at once.
    """

    h_BTD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    targets_BT: Tensor
    scratch_bytes: int = SCRATCH_BYTES

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits, gradients of logits and sums: float32 or float64."""
        return accumulation_dtype(self.h_BTD, self.weight_VD)

    @property
    def tile_rows(self) -> int:
        """Vocabulary rows in a tile: all of them where an example's logits fit into the scratch."""
        num_rows, vocabulary = self.h_BTD.shape[1], self.weight_VD.shape[0]
        fitting = self.scratch_bytes // (self.dtype.itemsize * max(1, num_rows))
        return vocabulary if fitting >= vocabulary else max(1, min(vocabulary, fitting, _TILE_ROWS))

    def groups(self) -> Iterator[slice]:
        """Yields ranges of examples."""
        size, num_rows = self.targets_BT.shape
        example_bytes = self.dtype.itemsize * max(1, num_rows) * self.tile_rows
        group = max(1, self.scratch_bytes // example_bytes)
        yield from (slice(start, min(size, start + group)) for start in range(0, size, group))

    def tiles(self) -> Iterator[slice]:
        """Yields ranges of vocabulary rows."""
        vocabulary, rows = self.weight_VD.shape[0], self.tile_rows
        yield from (slice(start, min(vocabulary, start + rows)) for start in range(0, vocabulary, rows))

    def rows(self, group: slice) -> Tensor:
        """Returns the group's inputs in the logits' dtype, [N, T, D]."""
        return self.h_BTD[group].to(self.dtype)

    def weight(self, tile: slice | Tensor) -> Tensor:
        """Returns rows of the weight as the product reads them, in the logits' dtype."""
        # Rounded to the inputs' dtype first: under autocast the product reads a narrow weight.
        return self.weight_VD[tile].to(self.h_BTD.dtype).to(self.dtype)

    def bias(self, tile: slice | Tensor) -> Tensor | None:
        """Returns entries of the bias as the product reads them, in the logits' dtype."""
        return None if self.bias_V is None else self.bias_V[tile].to(self.h_BTD.dtype).to(self.dtype)

    def logits(self, group: slice, tile: slice) -> Tensor:
        """Returns the logits of one tile, [N, T, C], in fresh memory."""
        return torch.nn.functional.linear(self.rows(group), self.weight(tile), self.bias(tile))

    def softmax(self) -> tuple[Softmax, Tensor]:
        """Returns what is kept of each token's softmax, and each token's cross entropy, [B, T]."""
        parts = [self.softmax_of(group)[:2] for group in self.groups()]
        if not parts:
            empty = self.h_BTD.new_empty(self.targets_BT.shape, dtype=self.dtype)
            return Softmax(largest_BT=empty, total_BT=empty), empty
        kept = Softmax(
            largest_BT=torch.cat([part.largest_BT for part, _ in parts]),
            total_BT=torch.cat([part.total_BT for part, _ in parts]),
        )
        return kept, torch.cat([loss for _, loss in parts])

    def softmax_of(self, group: slice) -> tuple[Softmax, Tensor, Tensor | None]:
        """Returns a group's softmax and cross entropy, and ``exp(z - m)`` [N, T, V] if one tile holds all of it."""
        targets_NT = self.targets_BT[group]
        largest = torch.full(targets_NT.shape, -torch.inf, dtype=self.dtype, device=self.h_BTD.device)
        total, picked = torch.zeros_like(largest), torch.zeros_like(largest)
        z_NTC = None
        for tile in self.tiles():
            z_NTC = self.logits(group, tile)
            local = targets_NT - tile.start
            inside = (local >= 0) & (local < z_NTC.shape[2])
            found = z_NTC.gather(2, local.clamp(0, z_NTC.shape[2] - 1)[:, :, None])[:, :, 0]
            picked = torch.where(inside, found, picked)
            raised = torch.maximum(largest, z_NTC.amax(2))
            z_NTC.sub_(raised[:, :, None]).exp_()
            total = total * (largest - raised).exp() + z_NTC.sum(2)
            largest = raised
        whole = z_NTC if self.tile_rows == self.weight_VD.shape[0] else None
        return Softmax(largest_BT=largest, total_BT=total), largest + total.log() - picked, whole

    def gradient(
        self, group: slice, tile: slice, kept: Softmax, scale_BT: Tensor, *, above: Tensor | None = None
    ) -> Tensor:
        """Returns ``scale · (softmax(z) - onehot(target))`` for one tile, [N, T, C].

        Args:
            group: The examples.
            tile: The rows of the vocabulary.
            kept: Of all examples.
            scale_BT: The derivative of the sum of losses by each token's cross entropy.
            above: ``exp(z - m)`` of this tile if the caller holds it; it is overwritten.
        """
        scale_NT = scale_BT[group].to(self.dtype)
        if above is None:
            above = self.logits(group, tile).sub_(kept.largest_BT[group][:, :, None]).exp_()
        g_NTC = above.mul_((scale_NT / kept.total_BT[group])[:, :, None])
        local = self.targets_BT[group] - tile.start
        inside = (local >= 0) & (local < g_NTC.shape[2])
        taken = torch.where(inside, scale_NT, torch.zeros_like(scale_NT)).neg()
        return g_NTC.scatter_add_(
            2, local.clamp(0, max(0, g_NTC.shape[2] - 1))[:, :, None], taken[:, :, None]
        )
