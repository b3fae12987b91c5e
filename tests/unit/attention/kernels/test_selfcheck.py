"""The check of the attention kernel before its first use: it agrees, sees mistakes, and makes the back end refuse."""

import dataclasses

import pytest
import torch

from dp_flash_attention.attention.interface import AttentionCall, RowNorms
from dp_flash_attention.attention.kernels import backend, selfcheck
from dp_flash_attention.attention.kernels.backend import TritonBackend
from dp_flash_attention.attention.kernels.launch import attention_forward
from dp_flash_attention.attention.kernels.launch_backward import attention_backward
from dp_flash_attention.attention.kernels.selfcheck import (
    disagreement,
    gradient_disagreement,
    split_disagreement,
)


@pytest.fixture(autouse=True)
def _fresh():
    checks = (disagreement, gradient_disagreement, split_disagreement)
    for check in checks:
        check.cache_clear()
    yield
    for check in checks:
        check.cache_clear()


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_agrees(dtype):
    assert disagreement("cpu", dtype) is None
    assert gradient_disagreement("cpu", dtype) is None
    assert split_disagreement("cpu", dtype) is None


mistakes = pytest.mark.parametrize(
    "change",
    [
        {"null_rows": 0.0},
        {"hidden": None},
        {"scale": 0.25},
        {"norms": RowNorms(query=2.0, key=3.0, value=3.0)},
        {"norms": RowNorms(query=20.0, key=30.0, value=1.5)},
    ],
)


@mistakes
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_sees_mistakes(change, dtype, monkeypatch):
    monkeypatch.setattr(
        selfcheck,
        "attention_forward",
        lambda call, **kwargs: attention_forward(dataclasses.replace(call, **change), **kwargs),
    )
    assert "misses the reference" in disagreement("cpu", dtype)
    assert "misses the reference" in split_disagreement("cpu", dtype)


@mistakes
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_sees_mistakes_of_gradients(change, dtype, monkeypatch):
    monkeypatch.setattr(
        selfcheck,
        "attention_backward",
        lambda call, grad: attention_backward(dataclasses.replace(call, **change), grad),
    )
    assert "misses the reference" in gradient_disagreement("cpu", dtype)


def call():
    return AttentionCall(
        query=torch.zeros(1, 1, 1, 16),
        key=torch.zeros(1, 1, 1, 16),
        value=torch.zeros(1, 1, 1, 16),
        norms=RowNorms(query=1.0, key=1.0, value=1.0),
        scale=1.0,
        score_bound=1.0,
        causal=False,
        hidden=None,
        null_rows=0.0,
        stddev=None,
        noise=None,
        out_dtype=torch.float32,
    )


def test_a_failed_check_makes_the_back_end_refuse(monkeypatch):
    assert TritonBackend().refusal(call(), needs_grad=False) is None
    monkeypatch.setattr(selfcheck, "disagreement", lambda *args: "it misses the reference by 1")
    assert TritonBackend().refusal(call(), needs_grad=False) == "it misses the reference by 1"
    assert backend._failed_check(call(), needs_grad=False) is not None
