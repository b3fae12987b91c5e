"""Runs the attention kernel on the tensors of a call."""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
import triton
from torch import Tensor

from dp_flash_attention.attention.interface import PASS_ROWS, AttentionCall, NoiseStream
from dp_flash_attention.attention.kernels.forward import dp_attention_fwd_kernel
from dp_flash_attention.attention.kernels.launch_split import attention_split, default_splits
from dp_flash_attention.attention.kernels.operands import LOG2_E, hidden_bytes, on_device, row_factors
from dp_flash_attention.core.errors import NoiseUnavailableError
from dp_flash_attention.noise import FastNormalGenerator, SecureNormalGenerator
from dp_flash_attention.noise.device import KernelKey
from dp_flash_attention.noise.kernels.writer import refuse_graph_capture
from dp_flash_attention.noise.keystream import TILE_NUMBERS

NUM_STAGES: Final = 2
"""Tiles of keys and values in flight. Not yet measured."""

Factors = Literal["inline", "ahead"]


def kernel_key(noise: NoiseStream) -> KernelKey:
    """Returns the key of a call's noise.

    Raises:
        NoiseUnavailableError: If no kernel makes the numbers of its cipher, or of its kind.
    """
    if noise.name == "exact":
        raise NoiseUnavailableError(
            "The attention kernel adds normals, and noise 'exact' is whole numbers on a grid. Use back end 'auto'."
        )
    if noise.name == "fast":
        return FastNormalGenerator(noise.key).kernel_key(noise.call_id)
    return SecureNormalGenerator(noise.key, cipher=noise.cipher).kernel_key(noise.call_id)


def block_shape(
    num_queries: int, width: int, value_width: int, dtype: torch.dtype, *, inline: bool
) -> tuple[int, int, int]:
    """Returns BLOCK_M, BLOCK_N and the number of warps.

    BLOCK_M rows are whole tiles of noise, and no more than the queries need. There are no more threads than noise has
    units of words, so that its layout is kept (``transform._anchored_lanes``), but at least 4 warps.

    Not yet measured. With ``NUM_STAGES`` these are the largest blocks for which no register is spilled on sm_90
    (triton 3.7.1), which ``tests/integration/test_kernels_compile.py`` checks.
    """
    widest = max(width, value_width)
    most = 64 if dtype is torch.float32 or widest > 128 else 128
    block_m = max(16, TILE_NUMBERS // value_width, min(most, int(triton.next_power_of_2(num_queries))))
    narrow = dtype is torch.float32 or widest > 128 or (inline and widest > 64)
    num_tiles = block_m * value_width // TILE_NUMBERS
    return block_m, 32 if narrow else 64, max(4, min(8, 2 * num_tiles))


def default_factors(call: AttentionCall) -> Factors:
    """Returns whether the row factors of keys and values are computed by each program or once, ahead.

    Not yet measured. By count of operations, computing them from the tiles costs a quarter of a program's
    products at widths of 128; ahead, one more pass over keys and values. So: inline if few programs read a row.
    """
    _, num_heads, num_queries, width = call.query.shape
    block, _, _ = block_shape(num_queries, width, call.value.shape[3], call.query.dtype, inline=True)
    readers = num_heads // call.key.shape[1] * math.ceil(num_queries / block)
    return "inline" if readers <= 4 else "ahead"


def attention_forward(
    call: AttentionCall,
    *,
    factors: Factors | None = None,
    splits: int | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns the call's output, [B, H, Q, E], and the logarithms of the denominators, float32 [B, H, Q].

    The logarithms depend on the data without noise: they are for a backward pass and for tests, never for release.

    Args:
        call: A call that ``TritonBackend.refusal`` has nothing against.
        factors: Where row factors are computed; None chooses by shape.
        splits: Into how many ranges of rows the work is cut, each of whole passes; None chooses by shape, and more
            than there are passes means one for each. 1 for a causal call.
        with_lse: Whether the logarithms are wanted; None is returned in their place if not.

    Raises:
        NoiseReuseError: If a CUDA graph is being captured: its replays would add the same noise again.
        NoiseUnavailableError: If no kernel makes the numbers of the call's cipher.
    """
    query, key, value = call.query, call.key, call.value
    batch, num_heads, num_queries, width = query.shape
    num_groups, num_rows, value_width = key.shape[1], key.shape[2], value.shape[3]
    refuse_graph_capture(query)
    out = torch.empty((batch, num_heads, num_queries, value_width), dtype=call.out_dtype, device=query.device)
    lse = torch.empty((batch, num_heads, num_queries), device=query.device) if with_lse else None
    if out.numel() == 0:
        return out, lse
    noise = None if call.noise is None else kernel_key(call.noise)
    stddev = query.new_zeros(1, 1, 1, dtype=torch.float32) if call.stddev is None else call.stddev
    stddev = on_device(stddev, query.device)
    hidden = hidden_bytes(call)
    inline = (default_factors(call) if factors is None else factors) == "inline"
    block_m, block_n, num_warps = block_shape(num_queries, width, value_width, query.dtype, inline=inline)
    parts = default_splits(call) if splits is None else splits
    with torch.cuda.device_of(query):
        key_factors = key if inline else row_factors(key, call.norms.key)
        value_factors = value if inline else row_factors(value, call.norms.value)
        if parts > 1:
            attention_split(
                call,
                out,
                lse,
                splits=parts,
                factors=None if inline else (key_factors, value_factors),
                hidden=hidden,
                stddev=stddev,
                noise=noise,
            )
            return out, lse
        dp_attention_fwd_kernel[(triton.cdiv(num_queries, block_m) * batch * num_heads,)](
            query,
            key,
            value,
            out,
            out if lse is None else lse,
            key_factors,
            value_factors,
            key if hidden is None else hidden,
            stddev,
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *((0, 0) if hidden is None else hidden.stride()),
            *stddev.stride(),
            num_heads,
            num_heads // num_groups,
            num_queries,
            num_rows,
            call.norms.query,
            call.norms.key,
            call.norms.value,
            call.scale * LOG2_E,
            call.score_bound * LOG2_E,
            call.null_rows * math.exp(-call.score_bound),
            *((0,) * 8 if noise is None else noise.words),
            0 if noise is None else noise.step,
            WIDTH=width,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            BLOCK_E=value_width,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            # The second set of sums costs registers, so it is compiled in only where it is needed.
            PASS_ROWS=None if call.causal or num_rows <= PASS_ROWS else PASS_ROWS,
            CAUSAL=call.causal,
            HAS_HIDDEN=hidden is not None,
            INLINE_FACTORS=inline,
            STORE_LSE=lse is not None,
            CIPHER=None if noise is None else noise.cipher,
            # float32 rows are multiplied as float32: TF32 would round them a second time.
            PRECISION="ieee",
            num_warps=num_warps,
            num_stages=NUM_STAGES,
        )
    return out, lse
