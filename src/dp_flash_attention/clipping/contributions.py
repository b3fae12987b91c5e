"""What one use of a parameter adds to each example's gradient.

A rule records a contribution instead of a gradient: enough to compute each example's squared norm
and, later, the clipped sum, without a gradient for each example in memory. Contributions of one
parameter (tied weights, reused modules) are combined exactly, cross terms included.

Shape suffixes: B examples, T rows (tokens) an example, D inputs, P outputs, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dp_flash_attention.clipping.norm_forms import NormForms, NormShape, form_by_formula
from dp_flash_attention.clipping.norms import (
    SCRATCH_BYTES,
    accumulation_dtype,
    embedding_kernel_sq_norms,
    embedding_norm_path,
    kernel_weighted_grad,
    linear_sq_norms,
    row_mass,
    weighted_grad_path,
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
        form: How its norm is computed, see ``norm_forms``; None leaves it to the formula.
    """

    x_BTD: Tensor
    g_BTP: Tensor
    weight_shape: torch.Size
    input_first: bool = False
    form: Literal["gram", "outer"] | None = None

    @property
    def num_rows(self) -> int:
        """T, the rows that add up to an example's gradient."""
        return self.x_BTD.shape[1]

    def sq_norms(self) -> Tensor:
        """Returns each example's squared gradient norm, shape [B], float32 or wider."""
        return linear_sq_norms(self.x_BTD, self.g_BTP, form=self.form)

    def mass(self) -> Tensor:
        """Returns ``Σ_t ‖x_t‖‖g_t‖`` for each example, shape [B]."""
        return row_mass(self.x_BTD, self.g_BTP)

    def add_weighted_sum(self, factors_B: Tensor, out: Tensor, *, fresh: bool) -> None:
        """Adds ``Σ_i factors[i] · gradient_i`` to ``out``; ``fresh`` means that ``out`` holds nothing yet."""
        x_BTD, g_BTP = self.x_BTD, self.g_BTP
        out_2d = out.view(self._shape_2d())
        if weighted_grad_path(x_BTD, g_BTP) == "triton" and out.dtype is torch.float32:
            first, second = (g_BTP, x_BTD) if self.input_first else (x_BTD, g_BTP)
            kernel_weighted_grad(first, second, factors_B, out_2d, fresh=fresh)
            return
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
            form=self.form,
        )

    def formed(self) -> DenseContribution:
        """Returns each example's gradient instead of what it is made of."""
        # This runs during the backward pass, where the caller's autocast may still be on.
        with full_precision(self.x_BTD.device):
            parts = [self.dense(start, stop) for start, stop in self._row_chunks()]
            return DenseContribution(grads_B=torch.cat(parts) if len(parts) != 1 else parts[0])

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
    *,
    x_BTD: Tensor,
    g_BTP: Tensor,
    weight_shape: torch.Size,
    input_first: bool = False,
    forms: NormForms | None = None,
) -> LinearContribution | DenseContribution:
    """Returns the record of a linear map's weight, in the form that is chosen for its shape; see ``norm_forms``.

    Args:
        x_BTD: As for ``LinearContribution``.
        g_BTP: As for ``LinearContribution``.
        weight_shape: As for ``LinearContribution``.
        input_first: As for ``LinearContribution``.
        forms: What was chosen; None is the formula, which keeps the smaller record.
    """
    shape = NormShape.of(x_BTD, g_BTP)
    form = form_by_formula(shape) if forms is None else forms.form_of(shape)
    if form == "formed" and weighted_grad_path(x_BTD, g_BTP) == "triton":
        form = "outer"  # kernels form it on the tensor cores and keep it in registers
    record = LinearContribution(
        x_BTD=x_BTD,
        g_BTP=g_BTP,
        weight_shape=weight_shape,
        input_first=input_first,
        form=None if form == "formed" else form,
    )
    return record.formed() if form == "formed" else record


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
