"""Shared by the tests of the attention kernels: calls of odd shapes, and buffers that are not what they should be."""

import math

import pytest
import torch

from dp_flash_attention.attention.interface import AttentionCall, NoiseStream, RowNorms
from dp_flash_attention.noise import FastNormalGenerator, SecureNormalGenerator, TestKey

KEY = TestKey("attention kernel")
NORMS = RowNorms(query=2.0, key=3.0, value=1.5)


def _noise_stream(name="secure", call_id=5):
    generator = FastNormalGenerator(KEY) if name == "fast" else SecureNormalGenerator(KEY, cipher="chacha20")
    return NoiseStream(key=KEY, name=name, cipher="chacha20", call_id=call_id, generator=generator)


def _make_call(
    *,
    batch=1,
    heads=1,
    groups=1,
    queries=17,
    rows=33,
    width=16,
    value_width=16,
    dtype=torch.float32,
    causal=False,
    hides=False,
    null_rows=0.0,
    noise="secure",
    out_dtype=torch.float32,
    lengths=1.0,
):
    """Scores are bounded by 3. Rows are ``lengths`` as long as their bounds at the median, half of them longer."""

    def drawn(*shape, norm):
        x = torch.randn(shape) / math.sqrt(shape[-1])
        return (x * norm * torch.exp(torch.randn(*shape[:-1], 1)) * lengths).to(dtype)

    hidden = torch.rand(batch, rows) < 0.3 if hides else None
    return AttentionCall(
        query=drawn(batch, heads, queries, width, norm=NORMS.query),
        key=drawn(batch, groups, rows, width, norm=NORMS.key),
        value=drawn(batch, groups, rows, value_width, norm=NORMS.value),
        norms=NORMS,
        scale=0.5,
        score_bound=3.0,
        causal=causal,
        hidden=hidden,
        null_rows=null_rows,
        stddev=None if noise is None else torch.rand(batch, heads, queries) + 0.1,
        noise=None if noise is None else _noise_stream(noise),
        out_dtype=out_dtype,
    )


@pytest.fixture
def noise_stream():
    """Makes the noise of a call: ``noise_stream(name, call_id)``."""
    return _noise_stream


@pytest.fixture
def make_call():
    """Makes a call over random rows; see ``_make_call``."""
    return _make_call


@pytest.fixture
def poisoned(monkeypatch):
    """Fills every new buffer with NaN; returns the list of their shapes."""
    empty, shapes = torch.empty, []

    def poison(*args, **kwargs):
        buffer = empty(*args, **kwargs).fill_(float("nan"))
        shapes.append(tuple(buffer.shape))
        return buffer

    monkeypatch.setattr(torch, "empty", poison)
    return shapes
