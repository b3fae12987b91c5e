"""Squared per-example norms of linear maps' gradients, tile by tile.

For one example with inputs ``x_TD`` and output gradients ``g_TP`` the weight gradient is
``gᵀx``, and its squared Frobenius norm has two forms of equal value and different cost:

- *gram*:  ``Σ_{t,s} ⟨x_t, x_s⟩ ⟨g_t, g_s⟩``, symmetric in (t, s), so half of the tiles do;
- *outer*: ``‖gᵀx‖²``, the gradient itself, formed piece by piece and never kept.

Shape suffixes: B examples, T rows (tokens) an example, D inputs, P outputs.

Source: Goodfellow 2015 (T = 1); Li et al. 2022, "Large language models can be strong
differentially private learners", section 4 (gram form).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scratch for one chunk of work, bytes. 16 MiB keeps two tiles in the last-level cache of the
# machines measured (32 MiB L3) and is small beside any model's activations.
SCRATCH_BYTES = 16 * 2**20

# Cutting T in two halves again and again saves up to half of the gram form's products, but leaves
# smaller ones: below 64 rows the gain was lost (2-core EPYC 7003, MKL, T = 128 and 256).
_SMALLEST_TILE = 64

# No tile of a gram product is larger than this many rows and columns, so that long sequences need
# scratch of O(T), never of O(T²).
_LARGEST_TILE = 1024


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns float64 if any tensor is float64, else float32: norms are never narrower."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _dot_B(a_Bmn: Tensor, b_Bmn: Tensor) -> Tensor:
    """Returns the inner product of two matrices for each example, without a temporary."""
    size = a_Bmn.shape[0]
    return torch.bmm(a_Bmn.reshape(size, 1, -1), b_Bmn.reshape(size, -1, 1)).view(size)


def gram_cross(x_BTD: Tensor, g_BTP: Tensor, y_BSD: Tensor, h_BSP: Tensor) -> Tensor:
    """Returns ``⟨gᵀx, hᵀy⟩`` for each example, shape [B], for two uses of one weight.

    Args:
        x_BTD: Inputs of the first use.
        g_BTP: Output gradients of the first use.
        y_BSD: Inputs of the second use; S may differ from T.
        h_BSP: Output gradients of the second use.
    """
    total_B = x_BTD.new_zeros(x_BTD.shape[0])
    for t in range(0, x_BTD.shape[1], _LARGEST_TILE):
        x, g = x_BTD[:, t : t + _LARGEST_TILE], g_BTP[:, t : t + _LARGEST_TILE]
        for s in range(0, y_BSD.shape[1], _LARGEST_TILE):
            y, h = y_BSD[:, s : s + _LARGEST_TILE], h_BSP[:, s : s + _LARGEST_TILE]
            total_B += _dot_B(torch.bmm(x, y.mT), torch.bmm(g, h.mT))
    return total_B


def gram_sq_norms(x_BTD: Tensor, g_BTP: Tensor) -> Tensor:
    """Returns ``‖gᵀx‖²_F`` for each example, shape [B], by the symmetric gram form.

    A block of rows is cut into halves: the product of the two halves counts twice, and each half is
    cut again, so that no tile and its mirror image are both computed.
    """
    num_rows = x_BTD.shape[1]
    if num_rows < 2 * _SMALLEST_TILE:
        return gram_cross(x_BTD, g_BTP, x_BTD, g_BTP)
    half = num_rows // 2
    upper = gram_cross(x_BTD[:, :half], g_BTP[:, :half], x_BTD[:, half:], g_BTP[:, half:])
    if num_rows % 2 == 0 and x_BTD.is_contiguous() and g_BTP.is_contiguous():
        # Both halves of every example go through one batched product.
        size = x_BTD.shape[0]
        halves = gram_sq_norms(
            x_BTD.view(2 * size, half, x_BTD.shape[2]), g_BTP.view(2 * size, half, g_BTP.shape[2])
        )
        return halves.view(size, 2).sum(1) + 2.0 * upper
    first = gram_sq_norms(x_BTD[:, :half], g_BTP[:, :half])
    second = gram_sq_norms(x_BTD[:, half:], g_BTP[:, half:])
    return first + second + 2.0 * upper


def outer_sq_norms(x_BTD: Tensor, g_BTP: Tensor, *, scratch_bytes: int = SCRATCH_BYTES) -> Tensor:
    """Returns ``‖gᵀx‖²_F`` for each example, shape [B], by the outer form in bounded scratch.

    Args:
        x_BTD: Inputs.
        g_BTP: Output gradients.
        scratch_bytes: Most bytes of the gradient's pieces held at once.
    """
    num_inputs, num_outputs = x_BTD.shape[2], g_BTP.shape[2]
    rows = max(1, min(num_outputs, scratch_bytes // (num_inputs * x_BTD.element_size())))
    sq_norms_B = x_BTD.new_zeros(x_BTD.shape[0])
    for b in range(x_BTD.shape[0]):
        for start in range(0, num_outputs, rows):
            piece = g_BTP[b, :, start : start + rows].mT @ x_BTD[b]
            sq_norms_B[b] += torch.dot(piece.view(-1), piece.view(-1))
    return sq_norms_B


def gram_is_cheaper(num_rows: int, num_inputs: int, num_outputs: int) -> bool:
    """Whether the symmetric gram form needs fewer products than the outer form.

    Symmetric gram: ``T² (D + P)`` multiply-adds in the limit of many tiles, 1.3 times that with the
    few tiles of a short sequence; outer: ``2 T D P / 2`` plus writing and reading D·P numbers, which
    short sequences cannot hide.
    """
    return 0.65 * num_rows * (num_inputs + num_outputs) <= num_inputs * num_outputs


def linear_sq_norms(x_BTD: Tensor, g_BTP: Tensor, *, scratch_bytes: int = SCRATCH_BYTES) -> Tensor:
    """Returns the squared norm of a linear map's gradient for each example, shape [B].

    Both forms run in float32 or better over chunks of examples; the choice between them depends
    on shapes alone, so it reveals nothing.

    Args:
        x_BTD: Inputs [B, T, D] of any floating dtype.
        g_BTP: Output gradients [B, T, P].
        scratch_bytes: Most bytes of scratch for products and for widened copies.
    """
    size, num_rows, num_inputs = x_BTD.shape
    num_outputs = g_BTP.shape[2]
    dtype = accumulation_dtype(x_BTD, g_BTP)
    use_gram = gram_is_cheaper(num_rows, num_inputs, num_outputs)
    widened = 0 if x_BTD.dtype == g_BTP.dtype == dtype else num_rows * (num_inputs + num_outputs)
    products = min(num_rows, _LARGEST_TILE) ** 2 if use_gram else 0
    chunk = max(1, scratch_bytes // (dtype.itemsize * max(1, widened + products)))
    sq_norms = gram_sq_norms if use_gram else outer_sq_norms
    parts = [
        sq_norms(x_BTD[start : start + chunk].to(dtype), g_BTP[start : start + chunk].to(dtype))
        for start in range(0, size, chunk)
    ]
    return torch.cat(parts) if parts else x_BTD.new_zeros(0, dtype=dtype)
