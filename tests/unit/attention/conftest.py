"""What several tests of attention need: the call that a plan stands for, as the reference takes it."""

import pytest
import torch

from dp_flash_attention.attention import AttentionCall


@pytest.fixture
def call_of():
    """Returns a function from tensors, a plan and noise to the call that the reference reads."""

    def make(tensors, plan, stream=None, hidden=None):
        query, key, value = (each.to(plan.compute_dtype) for each in tensors)
        return AttentionCall(
            query=query,
            key=key,
            value=value,
            norms=plan.norms,
            scale=plan.scale,
            score_bound=plan.score_bound,
            causal=plan.is_causal,
            hidden=hidden,
            null_rows=plan.bounds.null_rows,
            stddev=plan.stddev,
            noise=stream,
            out_dtype=torch.float32,
        )

    return make
