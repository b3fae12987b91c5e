"""What one use of a parameter adds to each example's gradient.

A rule records a contribution instead of a gradient: enough to compute each example's squared norm
and, later, the clipped sum, without a gradient for each example in memory. Contributions of one
parameter (tied weights, reused modules) are combined exactly, cross terms included.

Shape suffixes: B examples, T rows (tokens) an example, D inputs, P outputs, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dp_flash_attention.clipping.norms import (
    SCRATCH_BYTES,
    accumulation_dtype,
    cancelled_examples,
    embedding_kernel_sq_norms,
    embedding_norm_path,
    gram_cross,
    kernel_tied_cross,
    linear_sq_norms,
    row_mass,
    tied_cross_path,
)
from dp_flash_attention.clipping.precision import full_precision


class Contribution(Protocol):
    """One use's part of each example's gradient of one parameter."""

    @property
    def num_rows(self) -> int:
        """T, the rows that add up to an example's gradient."""
        ...

    def sq_norms(self) -> Tensor:
        """Returns the squared norm for each example, shape [B], float32 or better."""
        ...

    def mass(self) -> Tensor:
        """Returns the sum of the norms of each example's rows, at least the norm, shape [B]."""
        ...

    def add_weighted_sum(self, factors_B: Tensor, out: Tensor, *, fresh: bool) -> None:
        """Adds ``Σ_i factors[i] · gradient_i`` to ``out``, which has the parameter's shape.

        Args:
            factors_B: Clip factors.
            out: The parameter's sum; with ``fresh`` its content is undefined and is overwritten.
            fresh: Whether this is the first contribution.
        """
        ...

    def dense(self, start: int, stop: int) -> Tensor:
        """Returns the gradients of examples start..stop, shape [stop - start, *parameter.shape]."""
        ...

    def without(self, dropped_B: Tensor) -> Contribution:
        """Returns a copy in which the dropped examples' gradients are exactly zero."""
        ...


@runtime_checkable
class PairsWithOthers(Protocol):
    """A contribution of another file that has cheap inner products with some kinds."""

    def inner_products(self, other: Contribution) -> Tensor | None:
        """Returns ``⟨this_i, other_i⟩`` for each example, shape [B], or None where there is no cheap way."""
        ...


def _zero_examples(values: Tensor, dropped_B: Tensor) -> Tensor:
    # A product with 0 would keep NaN and infinity; masked_fill does not.
    return values.masked_fill(dropped_B.view(-1, *[1] * (values.dim() - 1)), 0)


@dataclass(frozen=True, kw_only=True)
class LinearContribution:
    """A linear map's weight: ``gᵀx``, or ``xᵀg`` when the weight is stored input-first.

    Attributes:
        x_BTD: Inputs.
        g_BTP: Output gradients.
        weight_shape: The parameter's shape; a convolution's is [P, channels, kernel...].
        input_first: True for a weight of shape [D, P] (Hugging Face ``Conv1D``).
    """

    x_BTD: Tensor
    g_BTP: Tensor
    weight_shape: torch.Size
    input_first: bool = False

    @property
    def num_rows(self) -> int:
        """T, the rows that add up to an example's gradient."""
        return self.x_BTD.shape[1]

    def sq_norms(self) -> Tensor:
        """Returns each example's squared gradient norm, shape [B], float32 or wider."""
        return linear_sq_norms(self.x_BTD, self.g_BTP)

    def mass(self) -> Tensor:
        """Returns ``Σ_t ‖x_t‖‖g_t‖`` for each example, shape [B]."""
        return row_mass(self.x_BTD, self.g_BTP)

    def add_weighted_sum(self, factors_B: Tensor, out: Tensor, *, fresh: bool) -> None:
        """Adds ``Σ_i factors[i] · gradient_i`` to ``out``; ``fresh`` means that ``out`` holds nothing yet."""
        x_BTD, g_BTP = self.x_BTD, self.g_BTP
        out_2d = out.view(self._shape_2d())
        for start, stop in self._row_chunks():
            x, g = x_BTD[start:stop].to(out.dtype), g_BTP[start:stop].to(out.dtype)
            factors = factors_B[start:stop, None, None].to(out.dtype)
            # Scale the narrower side: it is the cheaper pass over memory.
            if x.shape[2] <= g.shape[2]:
                x = x * factors
            else:
                g = g * factors
            x_nD, g_nP = x.reshape(-1, x.shape[2]), g.reshape(-1, g.shape[2])
            # beta = 0 ignores what the memory holds, NaN included.
            beta = 0.0 if fresh and start == 0 else 1.0
            if self.input_first:
                out_2d.addmm_(x_nD.mT, g_nP, beta=beta)
            else:
                out_2d.addmm_(g_nP.mT, x_nD, beta=beta)

    def dense(self, start: int, stop: int) -> Tensor:
        """Returns the gradients of examples ``start`` to ``stop`` in full, [stop - start, *shape]."""
        dtype = accumulation_dtype(self.x_BTD, self.g_BTP)
        x, g = self.x_BTD[start:stop].to(dtype), self.g_BTP[start:stop].to(dtype)
        grads = torch.bmm(x.mT, g) if self.input_first else torch.bmm(g.mT, x)
        return grads.view(stop - start, *self.weight_shape)

    def without(self, dropped_B: Tensor) -> LinearContribution:
        """Returns the contribution with the gradients of the marked examples set to zero."""
        return LinearContribution(
            x_BTD=_zero_examples(self.x_BTD, dropped_B),
            g_BTP=_zero_examples(self.g_BTP, dropped_B),
            weight_shape=self.weight_shape,
            input_first=self.input_first,
        )

    def _shape_2d(self) -> tuple[int, int]:
        num_inputs, num_outputs = self.x_BTD.shape[2], self.g_BTP.shape[2]
        return (num_inputs, num_outputs) if self.input_first else (num_outputs, num_inputs)

    def _row_chunks(self) -> Iterator[tuple[int, int]]:
        """Yields ranges of examples: all at once in full precision, bounded when widened."""
        size, num_rows, num_inputs = self.x_BTD.shape
        dtype = accumulation_dtype(self.x_BTD, self.g_BTP)
        chunk = size
        if not self.x_BTD.dtype == self.g_BTP.dtype == dtype:
            width = num_rows * (num_inputs + self.g_BTP.shape[2]) * dtype.itemsize
            chunk = max(1, SCRATCH_BYTES // max(1, width))
        for start in range(0, size, max(1, chunk)):
            yield start, min(size, start + chunk)


def linear_contribution(
    *, x_BTD: Tensor, g_BTP: Tensor, weight_shape: torch.Size, input_first: bool = False
) -> LinearContribution | DenseContribution:
    """Returns whichever record of a linear map's weight is smaller.

    Where an example's gradient holds no more than its inputs and output gradients, D·P ≤ T·(D + P) in one
    precision, it is formed at once. The outer form would form it for the norm and the weighted gradient once
    more; formed once, both are one pass over it: at (B, T, D, P) = (8, 512, 256, 1024) 26 ms instead of 50
    (one core of an AMD EPYC). Arguments are those of ``LinearContribution``.
    """
    record = LinearContribution(x_BTD=x_BTD, g_BTP=g_BTP, weight_shape=weight_shape, input_first=input_first)
    num_inputs, num_outputs = x_BTD.shape[2], g_BTP.shape[2]
    gradient_bytes = num_inputs * num_outputs * accumulation_dtype(x_BTD, g_BTP).itemsize
    recorded_bytes = x_BTD.shape[1] * (num_inputs * x_BTD.itemsize + num_outputs * g_BTP.itemsize)
    if gradient_bytes > recorded_bytes:
        return record
    # This runs during the backward pass, where the caller's autocast may still be on.
    with full_precision(x_BTD.device):
        parts = [record.dense(start, stop) for start, stop in record._row_chunks()]
        return DenseContribution(grads_B=torch.cat(parts) if len(parts) != 1 else parts[0])


@dataclass(frozen=True, kw_only=True)
class EmbeddingContribution:
    """An embedding table: row ``ids[t]`` receives ``g[t]``; repeated ids add up.

    Attributes:
        ids_BT: Row numbers.
        g_BTD: Gradients of the looked-up rows, already zero where the table is not trained
            (padding index) and scaled where the module scales.
        weight_shape: [V, D].
    """

    ids_BT: Tensor
    g_BTD: Tensor
    weight_shape: torch.Size

    @property
    def num_rows(self) -> int:
        """T, the rows that add up to an example's gradient."""
        return self.ids_BT.shape[1]

    def sq_norms(self) -> Tensor:
        """Returns each example's squared gradient norm, shape [B], float32 or wider."""
        dtype = accumulation_dtype(self.g_BTD)
        size = self.ids_BT.shape[0]
        sq_norms_B = torch.zeros(size, dtype=dtype, device=self.g_BTD.device)
        if self.ids_BT.numel() == 0:
            return sq_norms_B
        if embedding_norm_path(self.g_BTD) == "triton":
            return embedding_kernel_sq_norms(self.ids_BT, self.g_BTD)
        # Equal ids of one example share a slot; their gradients add before the norm is taken.
        example_B1 = torch.arange(size, device=self.ids_BT.device)[:, None]
        keys, slots = torch.unique(self.ids_BT + example_B1 * self.weight_shape[0], return_inverse=True)
        rows = torch.zeros(keys.numel(), self.g_BTD.shape[2], dtype=dtype, device=self.g_BTD.device)
        rows.index_add_(0, slots.view(-1), self.g_BTD.reshape(-1, self.g_BTD.shape[2]).to(dtype))
        example_of_row = keys.div(self.weight_shape[0], rounding_mode="floor")
        return sq_norms_B.index_add_(0, example_of_row, torch.linalg.vecdot(rows, rows))

    def mass(self) -> Tensor:
        """Returns ``Σ_t ‖g_t‖`` for each example, shape [B]."""
        row_norms_BT: Tensor = torch.linalg.vector_norm(
            self.g_BTD, dim=2, dtype=accumulation_dtype(self.g_BTD)
        )
        return row_norms_BT.sum(1)

    def add_weighted_sum(self, factors_B: Tensor, out: Tensor, *, fresh: bool) -> None:
        """Adds ``Σ_i factors[i] · gradient_i`` to ``out``; ``fresh`` means that ``out`` holds nothing yet."""
        if fresh:
            out.zero_()
        g = self.g_BTD.to(out.dtype) * factors_B[:, None, None].to(out.dtype)
        out.index_add_(0, self.ids_BT.reshape(-1), g.view(-1, g.shape[2]))

    def dense(self, start: int, stop: int) -> Tensor:
        """Returns the gradients of examples ``start`` to ``stop`` in full, [stop - start, *shape]."""
        g = self.g_BTD[start:stop].to(accumulation_dtype(self.g_BTD))
        grads = torch.zeros(stop - start, *self.weight_shape, dtype=g.dtype, device=g.device)
        ids = self.ids_BT[start:stop, :, None].expand_as(g)
        return grads.scatter_add_(1, ids, g)

    def without(self, dropped_B: Tensor) -> EmbeddingContribution:
        """Returns the contribution with the gradients of the marked examples set to zero."""
        return EmbeddingContribution(
            ids_BT=self.ids_BT,
            g_BTD=_zero_examples(self.g_BTD, dropped_B),
            weight_shape=self.weight_shape,
        )


@dataclass(frozen=True, kw_only=True)
class DenseContribution:
    """A gradient small enough to keep for each example: biases, gains, broadcast parameters.

    Attributes:
        grads_B: Shape [B, *parameter.shape].
    """

    grads_B: Tensor

    @property
    def num_rows(self) -> int:
        """T, the rows that add up to an example's gradient."""
        return 1

    def sq_norms(self) -> Tensor:
        """Returns each example's squared gradient norm, shape [B], float32 or wider."""
        flat = self.grads_B.flatten(1).to(accumulation_dtype(self.grads_B))
        sq_norms_B: Tensor = torch.linalg.vecdot(flat, flat)
        return sq_norms_B

    def mass(self) -> Tensor:
        """Returns the norm for each example, shape [B]: the gradient is one row."""
        return self.sq_norms().sqrt()

    def add_weighted_sum(self, factors_B: Tensor, out: Tensor, *, fresh: bool) -> None:
        """Adds ``Σ_i factors[i] · gradient_i`` to ``out``; ``fresh`` means that ``out`` holds nothing yet."""
        flat = self.grads_B.flatten(1).to(out.dtype)
        out.view(-1).addmv_(flat.mT, factors_B.to(out.dtype), beta=0.0 if fresh else 1.0)

    def dense(self, start: int, stop: int) -> Tensor:
        """Returns the gradients of examples ``start`` to ``stop`` in full, [stop - start, *shape]."""
        return self.grads_B[start:stop].to(accumulation_dtype(self.grads_B))

    def without(self, dropped_B: Tensor) -> DenseContribution:
        """Returns the contribution with the gradients of the marked examples set to zero."""
        return DenseContribution(grads_B=_zero_examples(self.grads_B, dropped_B))


def combined_sq_norms(contributions: Sequence[Contribution]) -> Tensor:
    """Returns each example's squared norm of the *sum* of a parameter's contributions, shape [B].

    ``‖Σ_k a_k‖² = Σ_k ‖a_k‖² + 2 Σ_{k<l} ⟨a_k, a_l⟩``. Kinds that have a cheap inner product use
    it; for the others the per-example gradients are formed one example at a time, and so they are for
    examples whose uses cancel.
    """
    if len(contributions) == 1:
        return contributions[0].sq_norms()
    merged = _merge(contributions)
    total = merged[0].sq_norms()
    for k, second in enumerate(merged):
        if k > 0:
            total = total + second.sq_norms()
        for first in merged[:k]:
            total = total + 2.0 * _inner_products(first, second)
    mass_B = torch.stack([c.mass() for c in merged]).sum(0)
    for i in cancelled_examples(total, mass_B, num_rows=sum(c.num_rows for c in merged)).tolist():
        gradient = torch.stack([c.dense(i, i + 1).reshape(-1) for c in merged]).sum(0)
        total[i] = torch.dot(gradient, gradient)
    return total


def _merge(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Joins contributions of the same kind that join exactly (look-ups, dense gradients)."""
    lookups = [c for c in contributions if isinstance(c, EmbeddingContribution)]
    dense = [c for c in contributions if isinstance(c, DenseContribution)]
    others = [c for c in contributions if not isinstance(c, (EmbeddingContribution, DenseContribution))]
    if lookups:
        others.append(
            EmbeddingContribution(
                ids_BT=torch.cat([c.ids_BT for c in lookups], 1),
                g_BTD=torch.cat([c.g_BTD for c in lookups], 1),
                weight_shape=lookups[0].weight_shape,
            )
        )
    if dense:
        others.append(DenseContribution(grads_B=torch.stack([c.grads_B for c in dense]).sum(0)))
    return others


def _inner_products(first: Contribution, second: Contribution) -> Tensor:
    """Returns ``⟨first_i, second_i⟩`` for each example i, shape [B]."""
    for one, other in ((first, second), (second, first)):
        if isinstance(one, PairsWithOthers):
            products_B = one.inner_products(other)
            if products_B is not None:
                return products_B
    if isinstance(first, LinearContribution):
        if isinstance(second, LinearContribution) and first.input_first == second.input_first:
            dtype = accumulation_dtype(first.x_BTD, first.g_BTP)
            return gram_cross(
                first.x_BTD.to(dtype), first.g_BTP.to(dtype), second.x_BTD.to(dtype), second.g_BTP.to(dtype)
            )
        if isinstance(second, EmbeddingContribution) and not first.input_first:
            return _linear_embedding_inner_products(first, second)
    return _dense_inner_products(first, second)


def _linear_embedding_inner_products(head: LinearContribution, table: EmbeddingContribution) -> Tensor:
    """Returns ``Σ_{t,s} g_s[id_t] ⟨e_t, h_s⟩`` for each example, the tied weight's cross term.

    ``e_t`` is the embedding's gradient at token t, ``h_s`` the head's input and ``g_s`` the logits'
    gradient at token s; columns ``id_t`` of g are gathered, so nothing of size V×D appears.
    """
    if tied_cross_path(table.g_BTD, head.x_BTD, head.g_BTP) == "triton":
        return kernel_tied_cross(table.ids_BT, table.g_BTD, head.x_BTD, head.g_BTP)
    dtype = accumulation_dtype(head.g_BTP, table.g_BTD)
    size, num_rows = table.ids_BT.shape
    parts = []
    chunk = max(1, SCRATCH_BYTES // max(1, 2 * num_rows * head.g_BTP.shape[1] * dtype.itemsize))
    for start in range(0, size, chunk):
        part = slice(start, start + chunk)
        g_BSP, ids_BT = head.g_BTP[part], table.ids_BT[part]
        columns = ids_BT[:, None, :].expand(-1, g_BSP.shape[1], -1)
        picked_BST = g_BSP.gather(2, columns).to(dtype)
        scores_BST = torch.bmm(head.x_BTD[part].to(dtype), table.g_BTD[part].to(dtype).mT)
        parts.append((picked_BST * scores_BST).sum((1, 2)))
    return torch.cat(parts)


def _dense_inner_products(first: Contribution, second: Contribution) -> Tensor:
    size = first.sq_norms().shape[0]
    return torch.stack(
        [
            torch.dot(first.dense(i, i + 1).reshape(-1), second.dense(i, i + 1).reshape(-1))
            for i in range(size)
        ]
    )
