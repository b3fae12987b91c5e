"""Compares the kernels of clipping with float64 on a device, before their first use there."""

from __future__ import annotations

from functools import lru_cache

import torch

from dp_flash_attention.clipping.kernels.embedding_norm import embedding_norm
from dp_flash_attention.clipping.kernels.gram_norm import gram_norm
from dp_flash_attention.clipping.kernels.norm_backward import (
    ROWS_PER_PROGRAM,
    NormGradients,
    norm_backward,
)
from dp_flash_attention.clipping.kernels.outer_norm import outer_norm
from dp_flash_attention.clipping.kernels.tied_cross import tied_cross
from dp_flash_attention.clipping.kernels.weighted_grad import weighted_grad
from dp_flash_attention.core.errors import KernelMismatchError

# Sums of 130 products in float32; a missing tile or a stale sum is off by a tenth.
_TOLERANCE = 1e-4


@lru_cache(maxsize=64)
def disagreement(device: str, dtype: torch.dtype) -> str | None:
    """Returns by how much a kernel misses float64 on a small problem, as a clause, or None if both agree."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 130, 150, generator=generator).to(device, dtype)
    g = torch.randn(2, 130, 70, generator=generator).to(device, dtype)
    exact = torch.einsum("btp,btd->bpd", g.cpu().double(), x.cpu().double()).square().sum((1, 2))
    for norm in (gram_norm, outer_norm):
        error = float((norm(x, g).cpu().double() / exact - 1.0).abs().max())
        if not error <= _TOLERANCE:  # a NaN is not
            return f"{norm.__name__} misses float64 by a share of {error:.3g} on {device!r} in {dtype}"
    return None


def require_agreement(tensor: torch.Tensor) -> None:
    """Raises if the kernels are wrong where ``tensor`` lies; the first call for a device and dtype runs them.

    Raises:
        KernelMismatchError: If they are. Clipping by a wrong norm would break the guarantee.
    """
    _raise_for(disagreement(str(tensor.device), tensor.dtype))


@lru_cache(maxsize=64)
def embedding_disagreement(device: str, dtype: torch.dtype) -> str | None:
    """Returns by how much the embedding's kernel misses float64 on a small problem, or None if it agrees."""
    generator = torch.Generator().manual_seed(12)
    ids = torch.randint(0, 20, (2, 70), generator=generator)  # 20 ids at 70 places repeat
    g = torch.randn(2, 70, 150, generator=generator).to(dtype)
    rows = torch.zeros(2, 20, 150, dtype=torch.float64).scatter_add_(
        1, ids[:, :, None].expand(-1, -1, 150), g.double()
    )
    got = embedding_norm(ids.to(device), g.to(device)).cpu().double()
    error = float((got / rows.square().sum((1, 2)) - 1.0).abs().max())
    if not error <= _TOLERANCE:  # a NaN is not
        return f"{embedding_norm.__name__} misses float64 by a share of {error:.3g} on {device!r} in {dtype}"
    return None


def require_embedding_agreement(tensor: torch.Tensor) -> None:
    """As ``require_agreement``, for the embedding's kernel."""
    _raise_for(embedding_disagreement(str(tensor.device), tensor.dtype))


@lru_cache(maxsize=64)
def weighted_grad_disagreement(device: str, dtype: torch.dtype) -> str | None:
    """Returns by how much the weighted gradient misses float64 on a small problem, or None if it agrees."""
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(3, 70, 150, generator=generator).to(dtype)
    g = torch.randn(3, 70, 140, generator=generator).to(dtype)
    factors = torch.tensor([0.25, 0.0, 1.0])
    exact = torch.einsum("b,btp,btd->pd", factors.double(), g.double(), x.double())
    out = torch.full((140, 150), float("nan"), device=device)
    arguments = (x.to(device), g.to(device), factors.to(device), out)
    weighted_grad(*arguments, fresh=True)
    weighted_grad(*arguments, fresh=False)
    error = float((out.cpu().double() - 2 * exact).norm() / (2 * exact).norm())
    if not error <= _TOLERANCE:  # a NaN is not
        return f"{weighted_grad.__name__} misses float64 by a share of {error:.3g} on {device!r} in {dtype}"
    return None


def require_weighted_grad_agreement(tensor: torch.Tensor) -> None:
    """As ``require_agreement``, for the weighted gradient."""
    _raise_for(weighted_grad_disagreement(str(tensor.device), tensor.dtype))


@lru_cache(maxsize=64)
def tied_disagreement(device: str, *dtypes: torch.dtype) -> str | None:
    """Returns by how much the tied cross term's kernel misses float64 on a small problem, or None if it agrees.

    Args:
        device: Where.
        dtypes: Of the embedding's gradients, the head's inputs and its outputs' gradients.
    """
    generator = torch.Generator().manual_seed(13)
    ids = torch.randint(0, 40, (2, 70), generator=generator)
    e, h, g = (
        torch.randn(2, rows, width, generator=generator).to(dtype)
        for rows, width, dtype in zip((70, 130, 130), (150, 150, 40), dtypes, strict=True)
    )
    picked = g.double().gather(2, ids[:, None, :].expand(-1, 130, -1))
    terms = picked * (h.double() @ e.double().mT)
    got = tied_cross(ids.to(device), e.to(device), h.to(device), g.to(device)).cpu().double()
    # The terms have either sign: the scale of their sum is the root of their squares' sum.
    error = float(((got - terms.sum((1, 2))).abs() / terms.square().sum((1, 2)).sqrt()).max())
    if not error <= _TOLERANCE:  # a NaN is not
        return f"{tied_cross.__name__} misses float64 by a share of {error:.3g} on {device!r} in {dtypes}"
    return None


def require_tied_agreement(e: torch.Tensor, h: torch.Tensor, g: torch.Tensor) -> None:
    """As ``require_agreement``, for the tied cross term's kernel."""
    _raise_for(tied_disagreement(str(e.device), e.dtype, h.dtype, g.dtype))


@lru_cache(maxsize=64)
def norm_layer_disagreement(device: str, dtype: torch.dtype) -> str | None:
    """Returns by how much the norm layers' kernel misses float64 on a small problem, or None if it agrees."""
    generator = torch.Generator().manual_seed(14)
    shape = (2, ROWS_PER_PROGRAM + 7, 150)  # two programs an example, the second with rows beyond the end
    x, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight, mean = torch.randn(shape[2], generator=generator), torch.randn(shape[:2], generator=generator)
    rstd = 0.5 + torch.rand(shape[:2], generator=generator)
    for centre in (mean, None):
        got = norm_backward(
            x.to(device),
            g.to(device),
            mean_BT=None if centre is None else centre.to(device),
            rstd_BT=rstd.to(device),
            weight_D=weight.to(device),
        )
        want = exact_norm_backward(x, g, centre, rstd, weight)
        # The input's gradient is rounded to its dtype; the others are not.
        rounding = _TOLERANCE + (0.0 if dtype is torch.float32 else torch.finfo(dtype).eps)
        for name, found, exact, allowed in zip(
            NormGradients._fields, got, want, (rounding, _TOLERANCE, _TOLERANCE), strict=True
        ):
            if found is None or exact is None:
                continue
            error = float((found.cpu().double() - exact).abs().max() / exact.abs().max())
            if not error <= allowed:  # a NaN is not
                return f"{norm_backward.__name__} misses float64 by a share of {error:.3g} in {name} on {device!r} in {dtype}"
    return None


def exact_norm_backward(
    x: torch.Tensor, g: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns what ``norm_backward`` is to return, float64: the formula of its file with the same mean and rstd."""
    x, g, weight = x.double(), g.double(), weight.double()
    scale = rstd.double()[:, :, None]
    x_hat = (x if mean is None else x - mean.double()[:, :, None]) * scale
    of_row = weight * g
    of_x = of_row - x_hat * (of_row * x_hat).mean(2, keepdim=True)
    if mean is not None:
        of_x = of_x - of_row.mean(2, keepdim=True)
    return of_x * scale, (g * x_hat).sum(1), None if mean is None else g.sum(1)


def require_norm_layer_agreement(tensor: torch.Tensor) -> None:
    """As ``require_agreement``, for the norm layers' kernel."""
    _raise_for(norm_layer_disagreement(str(tensor.device), tensor.dtype))


def _raise_for(problem: str | None) -> None:
    if problem is not None:
        raise KernelMismatchError(
            f"The kernels of clipping failed their check ({problem}). Uninstall triton to use torch's products, and report this "
            "device and the versions of triton and torch."
        )
