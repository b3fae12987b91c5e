"""Squared per-example norms of linear maps' gradients, tile by tile.

For one example with inputs ``x_TD`` and output gradients ``g_TP`` the weight gradient is
``gᵀx``, and its squared Frobenius norm has two forms of equal value and different cost:

- *gram*:  ``Σ_{t,s} ⟨x_t, x_s⟩ ⟨g_t, g_s⟩``, symmetric in (t, s), so half of the tiles do;
- *outer*: ``‖gᵀx‖²``, the gradient itself, formed piece by piece and never kept.

Shape suffixes: B examples, T rows (tokens) an example, D inputs, P outputs.

Rounding: the gram form errs by about 1e-7 of ``(Σ_t ‖x_t‖‖g_t‖)²``, whatever the result. Where the
rows' gradients cancel to a hundredth of that sum, the outer form takes over: it errs like the clipped
sum itself, so an example whose rows cancel cannot pass with a norm that is too small.

Source: Goodfellow 2015 (T = 1); Li et al. 2022, "Large language models can be strong
differentially private learners", section 4 (gram form).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Literal

import torch
from torch import Tensor

from dp_flash_attention.noise.device import has_triton

# Scratch for one chunk of work, bytes. 16 MiB keeps two tiles in the last-level cache of the
# machines measured (32 MiB L3) and is small beside any model's activations.
SCRATCH_BYTES = 16 * 2**20

# Rows of a strip of the gram form. Narrow strips leave less to compute twice but make smaller
# products: of 32, 64 and 128, 64 was the fastest at T = 128 and 256 (EPYC 7003, MKL), at 0.75 to 0.85
# of the time of the whole square.
_STRIP_ROWS = 64

# Below this share of (Σ_t ‖x_t‖‖g_t‖)² the gram form's rounding (measured: 3e-8 of it in float32, T = 16
# to 256) could show in the third digit. Rows that do not cancel have a share of about 1 / T.
_CANCELLED_SHARE = 1e-4
_deferred: ContextVar[list[Tensor] | None] = ContextVar("deferred cancellation", default=None)
_KERNEL_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns float64 if any tensor is float64, else float32: norms are never narrower."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _dot_B(a_Bmn: Tensor, b_Bmn: Tensor) -> Tensor:
    """Returns the inner product of two matrices for each example."""
    dots_B: Tensor = torch.linalg.vecdot(a_Bmn.flatten(1), b_Bmn.flatten(1))
    return dots_B


def gram_cross(x_BTD: Tensor, g_BTP: Tensor, y_BSD: Tensor, h_BSP: Tensor) -> Tensor:
    """Returns ``⟨gᵀx, hᵀy⟩`` for each example, shape [B], for two uses of one weight.

    Args:
        x_BTD: Inputs of the first use.
        g_BTP: Output gradients of the first use.
        y_BSD: Inputs of the second use; S may differ from T.
        h_BSP: Output gradients of the second use.
    """
    total_B = x_BTD.new_zeros(x_BTD.shape[0])
    for start in range(0, x_BTD.shape[1], _STRIP_ROWS):
        strip = slice(start, start + _STRIP_ROWS)
        total_B += _dot_B(torch.bmm(x_BTD[:, strip], y_BSD.mT), torch.bmm(g_BTP[:, strip], h_BSP.mT))
    return total_B


def gram_sq_norms(x_BTD: Tensor, g_BTP: Tensor) -> Tensor:
    """Returns ``‖gᵀx‖²_F`` for each example, shape [B], by the symmetric gram form.

    Examples whose rows cancel are computed by the outer form, see above.

    Each strip of rows meets itself and the rows after it; what lies after it counts twice. Scratch
    is one strip of the two gram matrices, O(T).
    """
    total_B, mass_B = x_BTD.new_zeros(x_BTD.shape[0]), x_BTD.new_zeros(x_BTD.shape[0])
    for start in range(0, x_BTD.shape[1], _STRIP_ROWS):
        x_strip, g_strip = x_BTD[:, start : start + _STRIP_ROWS], g_BTP[:, start : start + _STRIP_ROWS]
        rows = x_strip.shape[1]
        x_gram = torch.bmm(x_strip, x_BTD[:, start:].mT)
        g_gram = torch.bmm(g_strip, g_BTP[:, start:].mT)
        total_B += 2.0 * _dot_B(x_gram, g_gram) - _dot_B(x_gram[:, :, :rows], g_gram[:, :, :rows])
        # The diagonals hold ‖x_t‖² and ‖g_t‖².
        row_sq_norms = x_gram.diagonal(dim1=1, dim2=2) * g_gram.diagonal(dim1=1, dim2=2)
        mass_B += row_sq_norms.sqrt().sum(1)
    cancelled = cancelled_examples(total_B, mass_B, num_rows=x_BTD.shape[1])
    if len(cancelled):
        total_B[cancelled] = outer_sq_norms(x_BTD[cancelled], g_BTP[cancelled])
    return total_B


def cancelled_examples(sq_norms_B: Tensor, mass_B: Tensor, *, num_rows: int) -> Tensor:
    """Returns which examples' gradients are too small beside their parts to be told by inner products.

    Args:
        sq_norms_B: Squared norms, as inner products gave them.
        mass_B: Sum of the norms of the parts.
        num_rows: How many rows the parts had.

    Returns:
        Their numbers, int64, usually none; always none under ``cancellation_deferred``.
    """
    share = min(_CANCELLED_SHARE, 0.125 / max(1, num_rows))
    cancelled_B = sq_norms_B < share * mass_B.square()
    deferred = _deferred.get()
    if deferred is None:
        return torch.nonzero(cancelled_B).flatten()
    deferred.append(cancelled_B)
    return torch.empty(0, dtype=torch.int64, device=sq_norms_B.device)


@contextmanager
def cancellation_deferred() -> Iterator[list[Tensor]]:
    """Collects which examples cancel, [B] each, instead of computing their norms anew.

    For a graph, whose course cannot depend on values. Norms computed inside must not be used where any of the
    collected tensors is true.
    """
    collected: list[Tensor] = []
    token = _deferred.set(collected)
    try:
        yield collected
    finally:
        _deferred.reset(token)


def row_mass(x_BTD: Tensor, g_BTP: Tensor) -> Tensor:
    """Returns ``Σ_t ‖x_t‖‖g_t‖`` for each example, which its gradient's norm cannot exceed, shape [B]."""
    dtype = accumulation_dtype(x_BTD, g_BTP)
    x_BT = torch.linalg.vector_norm(x_BTD, dim=2, dtype=dtype)
    mass_B: Tensor = torch.linalg.vecdot(x_BT, torch.linalg.vector_norm(g_BTP, dim=2, dtype=dtype))
    return mass_B


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


def norm_path(x_BTD: Tensor, g_BTP: Tensor) -> Literal["triton", "torch"]:
    """Returns what ``linear_sq_norms`` runs: Triton's kernels, or torch's products.

    The kernels take CUDA tensors of one dtype of at most 32 bits where triton is installed. Everything else, and
    what becomes part of a graph, runs in torch, which gives the same norms up to rounding and needs scratch for its
    products: slower, and no less exact.
    """
    return "triton" if kernels_take(x_BTD, g_BTP) else "torch"


def weighted_grad_path(x_BTD: Tensor, g_BTP: Tensor) -> Literal["triton", "torch"]:
    """Returns what a linear map's weighted gradient runs.

    The kernel takes 16-bit CUDA tensors, where float32 products would leave the tensor cores idle. Products of float32 are
    torch's own.
    """
    fits = x_BTD.dtype.itemsize == 2 and norm_path(x_BTD, g_BTP) == "triton"
    return "triton" if fits else "torch"


def embedding_norm_path(g_BTD: Tensor) -> Literal["triton", "torch"]:
    """Returns what an embedding's norm runs, as ``norm_path`` does for a linear map's."""
    return "triton" if kernels_take(g_BTD) else "torch"


def tied_cross_path(e_BTD: Tensor, h_BSD: Tensor, g_BSV: Tensor) -> Literal["triton", "torch"]:
    """Returns what a tied weight's cross term runs, as ``norm_path`` does; dtypes may differ here."""
    return "triton" if all(map(kernels_take, (e_BTD, h_BSD, g_BSV))) else "torch"


def kernel_tied_cross(ids_BT: Tensor, e_BTD: Tensor, h_BSD: Tensor, g_BSV: Tensor) -> Tensor:
    """Returns ``Σ_{t,s} g_s[id_t] ⟨e_t, h_s⟩`` for each example by Triton's kernel, [B], float32.

    Raises:
        KernelMismatchError: If the kernel disagrees with float64 at its first use here.
    """
    from dp_flash_attention.clipping import kernels

    kernels.require_tied_agreement(e_BTD, h_BSD, g_BSV)
    return kernels.tied_cross(ids_BT, e_BTD, h_BSD, g_BSV)


def kernels_take(*tensors: Tensor) -> bool:
    """Whether Triton's kernels run on tensors: one dtype of at most 32 bits, on a GPU, outside of a graph."""
    dtype = tensors[0].dtype
    fits = dtype in _KERNEL_DTYPES and all(tensor.dtype is dtype for tensor in tensors)
    return fits and _deferred.get() is None and all(map(_is_on_gpu, tensors)) and has_triton()


def embedding_kernel_sq_norms(ids_BT: Tensor, g_BTD: Tensor) -> Tensor:
    """Returns ``Σ_v ‖Σ_{t: id_t = v} g_t‖²`` for each example by Triton's kernel, [B], float32.

    Raises:
        KernelMismatchError: If the kernel disagrees with float64 at its first use here.
    """
    from dp_flash_attention.clipping import kernels

    kernels.require_embedding_agreement(g_BTD)
    return kernels.embedding_norm(ids_BT, g_BTD)


def kernel_weighted_grad(
    x_BTD: Tensor, g_BTP: Tensor, factors_B: Tensor, out_PD: Tensor, *, fresh: bool
) -> None:
    """Adds ``Σ_i f_i · g_iᵀx_i`` to ``out_PD`` by Triton's kernel, see there.

    Raises:
        KernelMismatchError: If the kernel disagrees with float64 at its first use here.
    """
    from dp_flash_attention.clipping import kernels

    kernels.require_weighted_grad_agreement(x_BTD)
    kernels.weighted_grad(x_BTD, g_BTP, factors_B.to(torch.float32), out_PD, fresh=fresh)


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def linear_sq_norms(
    x_BTD: Tensor,
    g_BTP: Tensor,
    *,
    scratch_bytes: int = SCRATCH_BYTES,
    form: Literal["gram", "outer"] | None = None,
) -> Tensor:
    """Returns the squared norm of a linear map's gradient for each example, shape [B].

    Both forms run in float32 or better over chunks of examples; the choice between them depends
    on shapes and on synthetic measurements alone (``norm_forms``), so it reveals nothing. ``norm_path`` says whether
    kernels run.

    Args:
        x_BTD: Inputs [B, T, D] of any floating dtype.
        g_BTP: Output gradients [B, T, P].
        scratch_bytes: Most bytes of scratch for products and for widened copies.
        form: Which of the two; None takes the one with fewer products.

    Raises:
        KernelMismatchError: If kernels run here and disagree with float64 at their first use.
    """
    size, num_rows, num_inputs = x_BTD.shape
    num_outputs = g_BTP.shape[2]
    dtype = accumulation_dtype(x_BTD, g_BTP)
    use_gram = gram_is_cheaper(num_rows, num_inputs, num_outputs) if form is None else form == "gram"
    if norm_path(x_BTD, g_BTP) == "triton":
        return _kernel_sq_norms(x_BTD, g_BTP, use_gram=use_gram)
    widened = 0 if x_BTD.dtype == g_BTP.dtype == dtype else num_rows * (num_inputs + num_outputs)
    products = 2 * min(num_rows, _STRIP_ROWS) * num_rows if use_gram else 0
    chunk = max(1, scratch_bytes // (dtype.itemsize * max(1, widened + products)))
    sq_norms = gram_sq_norms if use_gram else outer_sq_norms
    parts = [
        sq_norms(x_BTD[start : start + chunk].to(dtype), g_BTP[start : start + chunk].to(dtype))
        for start in range(0, size, chunk)
    ]
    return torch.cat(parts) if parts else x_BTD.new_zeros(0, dtype=dtype)


def _kernel_sq_norms(x_BTD: Tensor, g_BTP: Tensor, *, use_gram: bool) -> Tensor:
    from dp_flash_attention.clipping import kernels

    kernels.require_agreement(x_BTD)
    if not use_gram:
        return kernels.outer_norm(x_BTD, g_BTP)
    total_B = kernels.gram_norm(x_BTD, g_BTP)
    cancelled = cancelled_examples(total_B, row_mass(x_BTD, g_BTP), num_rows=x_BTD.shape[1])
    if len(cancelled):
        total_B[cancelled] = kernels.outer_norm(x_BTD[cancelled], g_BTP[cancelled])
    return total_B
