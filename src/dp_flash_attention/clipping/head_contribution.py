"""What a head under cross entropy adds to each example's gradient, without its logits or their gradients.

A linear map's record is (x, g), and a head's g has B·T·V entries. It is a function of what is small: the head's inputs,
the softmax's two numbers a token and the target. So these are recorded, and both the norm and the weighted
sum form g tile by tile from them.

Shape suffixes: see ``vocabulary_tiles``; S is T of another use of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dp_flash_attention.clipping.contributions import Contribution, EmbeddingContribution
from dp_flash_attention.clipping.norms import SCRATCH_BYTES, cancelled_examples
from dp_flash_attention.clipping.vocabulary_tiles import Head, Softmax
from dp_flash_attention.core.errors import RunStateError

# Rows of a strip of the gram matrix: a strip meets itself and what lies after it, so that half is computed.
_STRIP_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class HeadNorms:
    """Each example's squared norm of the head's weight gradient, and the sum of its rows' norms, [B] each."""

    sq_norms_B: Tensor
    mass_B: Tensor

    def scaled(self, factors_B: Tensor) -> HeadNorms:
        """Returns those of the gradients times ``factors_B``."""
        factors_B = factors_B.to(self.mass_B).abs()
        return HeadNorms(sq_norms_B=self.sq_norms_B * factors_B.square(), mass_B=self.mass_B * factors_B)


class HeadNormSum:
    """Adds up the norms of a group's weight gradients over the tiles of a vocabulary.

    Args:
        h_NTD: The group's inputs, in the dtype of sums.
    """

    def __init__(self, h_NTD: Tensor) -> None:
        self._h_NTD = h_NTD
        size, num_rows, num_inputs = h_NTD.shape
        # Half of the gram matrices against the gradient itself, once each over the whole vocabulary.
        self._use_gram = num_rows <= num_inputs
        self._grams = [
            h_NTD.new_zeros(size, min(_STRIP_ROWS, num_rows - start), num_rows - start)
            for start in (range(0, num_rows, _STRIP_ROWS) if self._use_gram else ())
        ]
        self._outer_N = h_NTD.new_zeros(size)
        self._row_sq_norms_NT = h_NTD.new_zeros(size, num_rows)

    def add(self, g_NTC: Tensor) -> None:
        """Takes the logits' gradients of one tile."""
        if not self._use_gram:
            self._row_sq_norms_NT += torch.linalg.vecdot(g_NTC, g_NTC)
            self._outer_N += _outer_sq_norms(self._h_NTD, g_NTC)
        for k, gram in enumerate(self._grams):
            start = k * _STRIP_ROWS
            gram.baddbmm_(g_NTC[:, start : start + gram.shape[1]], g_NTC[:, start:].mT)

    def norms(self) -> HeadNorms:
        """Returns the norms; an example whose rows cancel has a rough one, see ``cancelled_examples``."""
        total_N = self._outer_N.clone()
        for k, gram in enumerate(self._grams):
            start, rows = k * _STRIP_ROWS, gram.shape[1]
            self._row_sq_norms_NT[:, start : start + rows] = gram.diagonal(dim1=1, dim2=2)
            of_h = torch.bmm(self._h_NTD[:, start : start + rows], self._h_NTD[:, start:].mT)
            of_h *= gram
            total_N += 2.0 * of_h.sum((1, 2)) - of_h[:, :, :rows].sum((1, 2))
        lengths_NT = torch.linalg.vector_norm(self._h_NTD, dim=2)
        mass_N = torch.linalg.vecdot(lengths_NT, self._row_sq_norms_NT.sqrt())
        return HeadNorms(sq_norms_B=total_N, mass_B=mass_N)


def _outer_sq_norms(h_NTD: Tensor, g_NTC: Tensor) -> Tensor:
    num_inputs = h_NTD.shape[2]
    width = max(1, SCRATCH_BYTES // max(1, num_inputs * h_NTD.element_size()))
    sq_norms_N = h_NTD.new_zeros(h_NTD.shape[0])
    for n in range(h_NTD.shape[0]):
        for start in range(0, g_NTC.shape[2], width):
            piece = (g_NTC[n, :, start : start + width].mT @ h_NTD[n]).view(-1)
            sq_norms_N[n] += torch.dot(piece, piece)
    return sq_norms_N


@dataclass(frozen=True, kw_only=True)
class HeadContribution:
    """A head's weight under cross entropy: ``gᵀh`` with ``g = scale · (softmax(hWᵀ + b) - onehot(target))``.

    Attributes:
        head: Inputs, weight and targets.
        kept: The softmax's two numbers of each token.
        scale_BT: The derivative of the sum of losses by each token's cross entropy.
        norms: Of the weight's gradients, as the forward pass found them.
        version: The weight's and bias's count of in-place changes at that time.
        dropped_B: Examples whose gradients count as zero; None for none.
    """

    head: Head
    kept: Softmax
    scale_BT: Tensor
    norms: HeadNorms
    version: int
    dropped_B: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """T, the rows that add up to an example's gradient."""
        return self.head.h_BTD.shape[1]

    def sq_norms(self) -> Tensor:
        """Returns each example's squared gradient norm, shape [B], float32 or wider."""
        sq_norms_B = self.norms.sq_norms_B.clone()
        if self.dropped_B is not None:
            sq_norms_B = sq_norms_B.masked_fill(self.dropped_B, 0)
        for i in cancelled_examples(sq_norms_B, self.mass(), num_rows=self.num_rows).tolist():
            example = slice(i, i + 1)
            h_1TD = self.head.rows(example)
            sq_norms_B[i] = sum(
                float(_outer_sq_norms(h_1TD, self._gradient(example, tile))) for tile in self.head.tiles()
            )
        return sq_norms_B

    def mass(self) -> Tensor:
        """Returns ``Σ_t ‖h_t‖‖g_t‖`` for each example, shape [B]."""
        mass_B = self.norms.mass_B
        return mass_B if self.dropped_B is None else mass_B.masked_fill(self.dropped_B, 0)

    def add_weighted_sum(self, factors_B: Tensor, out: Tensor, *, fresh: bool) -> None:
        """Adds ``Σ_i factors[i] · gradient_i`` to ``out``; ``fresh`` means that ``out`` holds nothing yet."""
        if fresh:
            out.zero_()
        # Nothing here needs an example's whole row of logits, so tiles are small enough to stay in a cache.
        head = replace(self.head, scratch_bytes=min(self.head.scratch_bytes, SCRATCH_BYTES))
        for tile in head.tiles():
            for group in head.groups():
                g_NTC = self._gradient(group, tile)
                h_NTD = self._rows(group) * factors_B[group, None, None].to(g_NTC)
                out[tile].addmm_(g_NTC.flatten(0, 1).mT, h_NTD.flatten(0, 1))

    def dense(self, start: int, stop: int) -> Tensor:
        """Returns the gradients of examples ``start`` to ``stop`` in full, [stop - start, *shape]."""
        group = slice(start, stop)
        h_NTD = self._rows(group)
        return torch.cat(
            [torch.bmm(self._gradient(group, tile).mT, h_NTD) for tile in self.head.tiles()], dim=1
        )

    def without(self, dropped_B: Tensor) -> HeadContribution:
        """Returns the contribution with the gradients of the marked examples set to zero."""
        return replace(self, dropped_B=dropped_B if self.dropped_B is None else self.dropped_B | dropped_B)

    def inner_products(self, other: Contribution) -> Tensor | None:
        """Returns ``⟨this_i, other_i⟩`` for each example, [B], or None where there is no cheap way.

        For a table tied to the head it is ``Σ_{t,s} g_t[id_s]⟨h_t, e_s⟩``: logits are computed for the ids of
        the example's own tokens, so nothing of size V appears.
        """
        if not isinstance(other, EmbeddingContribution):
            return None
        head, dtype = self.head, self.head.dtype
        size, num_ids = other.ids_BT.shape
        numbers = num_ids * (head.h_BTD.shape[2] + 3 * self.num_rows)
        chunk = max(1, SCRATCH_BYTES // max(1, numbers * dtype.itemsize))
        parts = []
        for start in range(0, size, chunk):
            part = slice(start, start + chunk)
            scores_NTS = torch.bmm(self._rows(part), other.g_BTD[part].to(dtype).mT)
            parts.append((self._gradient_of_ids(part, other.ids_BT[part]) * scores_NTS).sum((1, 2)))
        return torch.cat(parts) if parts else head.h_BTD.new_zeros(0, dtype=dtype)

    def _gradient_of_ids(self, part: slice, ids_NS: Tensor) -> Tensor:
        """Returns the columns ``ids_NS`` of the logits' gradients, [N, T, S]."""
        self._check_unchanged()
        head, dtype = self.head, self.head.dtype
        z_NTS = torch.bmm(head.rows(part), head.weight(ids_NS).mT)
        bias_NS = head.bias(ids_NS)
        if bias_NS is not None:
            z_NTS += bias_NS[:, None, :]
        scale_NT = self.scale_BT[part].to(dtype)
        g_NTS = z_NTS.sub_(self.kept.largest_BT[part][:, :, None]).exp_()
        g_NTS *= (scale_NT / self.kept.total_BT[part])[:, :, None]
        is_target_NTS = head.targets_BT[part][:, :, None] == ids_NS[:, None, :]
        return self._without_dropped(g_NTS.sub_(scale_NT[:, :, None] * is_target_NTS), part)

    def _gradient(self, group: slice, tile: slice) -> Tensor:
        self._check_unchanged()
        return self._without_dropped(self.head.gradient(group, tile, self.kept, self.scale_BT), group)

    def _rows(self, group: slice) -> Tensor:
        return self._without_dropped(self.head.rows(group), group)

    def _without_dropped(self, values: Tensor, group: slice) -> Tensor:
        # A product with 0 would keep NaN and infinity; masked_fill does not.
        return values if self.dropped_B is None else values.masked_fill(self.dropped_B[group, None, None], 0)

    def _check_unchanged(self) -> None:
        if version_of(self.head) != self.version:
            raise RunStateError(
                "the head's weight changed between the forward pass and the clipped sum, so the sum would not be of the "
                "gradients whose norms were taken. Step the optimizer after add() has returned."
            )


def version_of(head: Head) -> int:
    """Returns how often the weight and the bias have been written to in place."""
    return head.weight_VD._version + (0 if head.bias_V is None else head.bias_V._version)
