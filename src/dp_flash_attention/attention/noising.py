"""Adds a call's noise to an exact output that is kept in memory, row by row with its own scale."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dp_flash_attention.attention.grid_noising import add_on_grid, add_on_grid_into
from dp_flash_attention.attention.interface import NoiseStream
from dp_flash_attention.noise.device import has_triton
from dp_flash_attention.noise.targets import runs_on_kernel


def add_noise(exact: Tensor, stddev: Tensor, noise: NoiseStream, out_dtype: torch.dtype) -> Tensor:
    """Returns ``exact + stddev·z`` in float32, rounded to ``out_dtype``; where gradients are recorded.

    With noise ``"exact"``, what ``grid_noising`` says in its place.

    Args:
        exact: [B, H, Q, E].
        stddev: [B, H, Q], float32, may be expanded.
        noise: Where z comes from.
        out_dtype: Dtype of the result: float32, bfloat16 or float16.

    Returns:
        [B, H, Q, E]. Its gradient with respect to ``exact`` is the identity.
    """
    if noise.name == "exact":
        return add_on_grid(exact, stddev, noise, out_dtype)
    with torch.no_grad():
        z = torch.zeros(exact.shape, dtype=torch.float32, device=exact.device)
        add_noise_into(z, z, stddev, noise)
    return (exact.to(torch.float32) + z).to(out_dtype).contiguous()


def noise_path(out: Tensor, noise: NoiseStream) -> Literal["triton", "host"]:
    """Returns where the noise of ``out`` is made: by one kernel on its device, or by the CPU's generator.

    The kernel needs a CUDA device, triton, normals, and a cipher other than AES. The numbers are the same up to their last
    bits; by the host, a head's output goes there and back (with ``"exact"``, whole numbers go there).
    """
    has_kernel = noise.name == "fast" or (noise.name == "secure" and noise.cipher == "chacha20")
    return "triton" if has_kernel and runs_on_kernel(out) and has_triton() else "host"


def add_noise_into(
    out: Tensor, exact: Tensor, stddev: Tensor, noise: NoiseStream, *, entry: int = 0, head: int = 0
) -> None:
    """Writes ``exact`` plus noise to ``out``, one head at a time, so that scratch is one head's output.

    Args:
        out: [B, H, Q, E], contiguous; may be ``exact`` itself.
        exact: A slice of B′ entries and H′ heads of the call, [B′, H′, Q, E].
        stddev: [B, H, Q] of the whole call.
        noise: Where z comes from.
        entry: First batch entry of the slice.
        head: First head of the slice.
    """
    if noise.name == "exact":
        add_on_grid_into(out, exact, stddev, noise, entry=entry, head=head)
        return
    if noise_path(out, noise) == "triton":
        from dp_flash_attention.attention.kernels.add_noise import add_noise_on_device
        from dp_flash_attention.attention.kernels.launch import kernel_key

        add_noise_on_device(out, exact, stddev, kernel_key(noise), entry=entry, head=head)
        return
    generator = noise.generator
    assert generator is not None, "only exact noise has no generator"
    on_host = out.dtype is torch.float32 and out.device.type == "cpu"
    for b in range(exact.shape[0]):
        for h in range(exact.shape[1]):
            source, target = exact[b, h], out[entry + b, head + h]
            rows = target if on_host else torch.empty(source.shape, dtype=torch.float32)
            if rows.data_ptr() != source.data_ptr():
                rows.copy_(source)
            generator.add_row_normal_(
                rows,
                row_stddev=stddev[entry + b, head + h].to("cpu").contiguous(),
                step=noise.call_id,
                stream=(entry + b) * out.shape[1] + head + h,
            )
            if not on_host:
                target.copy_(rows)
