"""Runs the backward kernels on the tensors of a call."""

from __future__ import annotations

import math
from typing import Final

import torch
import triton
from torch import Tensor

from dp_flash_attention.attention.interface import AttentionCall
from dp_flash_attention.attention.kernels.backward import (
    dp_attention_bwd_query_kernel,
    dp_attention_bwd_rows_kernel,
)
from dp_flash_attention.attention.kernels.operands import LOG2_E, hidden_bytes, row_factors

NUM_STAGES: Final = 2
"""Tiles in flight. Not yet measured."""


# BLOCK_M, BLOCK_N and warps by the larger width and by whether a number has 32 bits. Not yet measured: these are, of those
# tried, the largest blocks for which next to no register is spilled on sm_90 (triton 3.7.1, NUM_STAGES as above), which
# tests/integration/test_kernels_compile.py checks.
_Blocks = tuple[int, int, int]
_QUERY_BLOCKS: Final[dict[tuple[int, bool], _Blocks]] = {
    (64, False): (128, 64, 8),
    (128, False): (128, 32, 8),
    (256, False): (32, 32, 8),
    (64, True): (64, 32, 8),
    (128, True): (16, 32, 4),
    (256, True): (16, 16, 4),
}
_ROW_BLOCKS: Final[dict[tuple[int, bool], _Blocks]] = {
    (64, False): (64, 128, 8),
    (128, False): (32, 64, 8),
    (256, False): (32, 32, 8),
    (64, True): (32, 32, 8),
    (128, True): (16, 32, 4),
    (256, True): (16, 16, 8),
}


def query_blocks(num_queries: int, width: int, value_width: int, dtype: torch.dtype) -> _Blocks:
    """Returns BLOCK_M, BLOCK_N and the number of warps of the queries' kernel."""
    block_m, block_n, num_warps = _QUERY_BLOCKS[_kind(width, value_width, dtype)]
    if block_m == 128 and num_queries <= 64:
        return 64, block_n, 4
    return block_m, block_n, num_warps


def row_blocks(width: int, value_width: int, dtype: torch.dtype) -> _Blocks:
    """Returns BLOCK_M, BLOCK_N and the number of warps of the rows' kernel."""
    return _ROW_BLOCKS[_kind(width, value_width, dtype)]


def _kind(width: int, value_width: int, dtype: torch.dtype) -> tuple[int, bool]:
    widest = max(width, value_width)
    return next(bound for bound in (64, 128, 256) if widest <= bound), dtype is torch.float32


def attention_backward(
    call: AttentionCall, grad_out: Tensor, *, needs_query: bool = True, needs_rows: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of query, key and value, contiguous and in their dtype; None where not asked for.

    They read the private rows without noise and are not private, that of the query included. Extra memory while it runs:
    the clipped queries, and two float32 numbers for each query of each head and each row of each key/value head.

    Args:
        call: The call of the forward pass; noise, deviations and ``out_dtype`` play no part.
        grad_out: [B, H, Q, E], the gradient with respect to the noisy output, of any dtype and strides. It is brought to
            the inputs' dtype first, as by the other back ends.
        needs_query: Whether the gradient of the query is wanted.
        needs_rows: Whether those of key and value are.
    """
    query, key, value = call.query, call.key, call.value
    batch, num_heads, num_queries, width = query.shape
    num_groups, num_rows, value_width = key.shape[1], key.shape[2], value.shape[3]
    device, dtype = query.device, query.dtype
    grads = grad_out.to(dtype).contiguous()
    grad_query = torch.empty(query.shape, dtype=dtype, device=device) if needs_query else None
    grad_key = torch.empty(key.shape, dtype=dtype, device=device) if needs_rows else None
    grad_value = torch.empty(value.shape, dtype=dtype, device=device) if needs_rows else None
    clipped = torch.empty(query.shape, dtype=dtype, device=device)
    inverses = torch.empty((batch, num_heads, num_queries), device=device)
    deltas = torch.empty((batch, num_heads, num_queries), device=device)
    key_factors, value_factors = row_factors(key, call.norms.key), row_factors(value, call.norms.value)
    hidden = hidden_bytes(call)
    rows = (key_factors, value_factors, key if hidden is None else hidden)
    strides = (*key.stride(), *value.stride(), *((0, 0) if hidden is None else hidden.stride()))
    scores = (call.scale, call.scale * LOG2_E, call.score_bound * LOG2_E)
    variant = {
        "WIDTH": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "BLOCK_E": value_width,
        "CAUSAL": call.causal,
        "HAS_HIDDEN": hidden is not None,
        "PRECISION": "ieee",
        "num_stages": NUM_STAGES,
    }
    with torch.cuda.device_of(query):
        if query.numel() > 0:
            block_m, block_n, num_warps = query_blocks(num_queries, width, value_width, dtype)
            dp_attention_bwd_query_kernel[(triton.cdiv(num_queries, block_m) * batch * num_heads,)](
                query,
                key,
                value,
                grads,
                clipped if grad_query is None else grad_query,
                clipped,
                inverses,
                deltas,
                *rows,
                *query.stride(),
                *strides,
                num_heads,
                num_heads // num_groups,
                num_queries,
                num_rows,
                call.norms.query,
                *scores,
                call.null_rows * math.exp(-call.score_bound),
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                NEEDS_QUERY=needs_query,
                num_warps=num_warps,
                **variant,
            )
        if grad_key is not None and grad_value is not None and grad_key.numel() > 0:
            block_m, block_n, num_warps = row_blocks(width, value_width, dtype)
            dp_attention_bwd_rows_kernel[(triton.cdiv(num_rows, block_n) * batch * num_groups,)](
                key,
                value,
                grads,
                clipped,
                inverses,
                deltas,
                grad_key,
                grad_value,
                *rows,
                *strides,
                num_groups,
                num_heads // num_groups,
                num_queries,
                num_rows,
                call.norms.key,
                call.norms.value,
                *scores,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=num_warps,
                **variant,
            )
    return grad_query, grad_key, grad_value
