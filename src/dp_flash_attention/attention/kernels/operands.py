"""What the attention kernels are given besides a call's tensors."""

from __future__ import annotations

import math
from typing import Final

import torch
import triton
from torch import Tensor

from dp_flash_attention.attention.interface import AttentionCall
from dp_flash_attention.attention.kernels.row_factors import row_factors_kernel

LOG2_E: Final = math.log2(math.e)
_FACTOR_BLOCK_NUMBERS: Final = 8192


def hidden_bytes(call: AttentionCall) -> Tensor | None:
    """Returns which rows are hidden, one byte for each, on the call's device; None if the call hides none."""
    return None if call.hidden is None else call.hidden.to(call.query.device).view(torch.uint8)


def on_device(stddev: Tensor, device: torch.device) -> Tensor:
    """Returns an expanded tensor on a device; what is expanded is not copied."""
    own = stddev
    for dim, stride in enumerate(stddev.stride()):
        if stride == 0 and own.shape[dim] > 1:
            own = own.narrow(dim, 0, 1)
    return own.to(device).expand(stddev.shape)


def row_factors(rows: Tensor, norm: float) -> Tensor:
    """Returns min(1, norm/‖x‖) for each row of [B, G, K, width], float32 [B, G, K]."""
    batch, num_groups, num_rows, width = rows.shape
    out = torch.empty((batch, num_groups, num_rows), device=rows.device)
    if out.numel() == 0:
        return out
    block_width = triton.next_power_of_2(width)
    block = max(1, _FACTOR_BLOCK_NUMBERS // block_width)
    row_factors_kernel[(triton.cdiv(num_rows, block) * batch * num_groups,)](
        rows,
        out,
        *rows.stride(),
        num_groups,
        num_rows,
        norm,
        WIDTH=width,
        BLOCK_WIDTH=block_width,
        BLOCK_ROWS=block,
        num_warps=4,
    )
    return out
