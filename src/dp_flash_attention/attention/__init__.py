"""DP attention: a flash-attention call that is a private mechanism over its key/value rows.

    noise = CallNoise.from_os()
    bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=100_000)
    output, release = dp_flash_attention(query, key, value, bounds=bounds, budget=budget, noise=noise)

docs/attention.md has the theorems and their proofs.
"""

from dp_flash_attention.attention.backends import available_backends
from dp_flash_attention.attention.bounds import AttentionBounds, Contexts
from dp_flash_attention.attention.calls import CallNoise
from dp_flash_attention.attention.functional import dp_flash_attention, release_attention
from dp_flash_attention.attention.interface import (
    AttentionBackend,
    AttentionCall,
    NoiseStream,
    Rounding,
    RowNorms,
)
from dp_flash_attention.attention.module import DPFlashAttention
from dp_flash_attention.attention.planning import AttentionPlan, plan_attention_release
from dp_flash_attention.attention.reference import reference_attention
from dp_flash_attention.attention.release import Release

__all__ = [
    "AttentionBackend",
    "AttentionBounds",
    "AttentionCall",
    "AttentionPlan",
    "CallNoise",
    "Contexts",
    "DPFlashAttention",
    "NoiseStream",
    "Release",
    "Rounding",
    "RowNorms",
    "available_backends",
    "dp_flash_attention",
    "plan_attention_release",
    "reference_attention",
    "release_attention",
]
