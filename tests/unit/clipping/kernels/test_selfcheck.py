"""The check of the norm kernels before their first use: it agrees, sees mistakes, and stops the clipping."""

import pytest
import torch

from dp_flash_attention.clipping import norms
from dp_flash_attention.clipping.kernels import gram_norm, selfcheck
from dp_flash_attention.clipping.kernels.selfcheck import disagreement
from dp_flash_attention.core.errors import KernelMismatchError


@pytest.fixture(autouse=True)
def _fresh():
    disagreement.cache_clear()
    yield
    disagreement.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_agrees(dtype):
    assert disagreement("cpu", dtype) is None


@pytest.mark.parametrize("wrong", [lambda n: 1.001 * n, lambda n: n * float("nan")])
def test_a_wrong_norm_stops_the_clipping(wrong, monkeypatch):
    def planted(x, g):
        return wrong(gram_norm(x, g))

    monkeypatch.setattr(selfcheck, "gram_norm", planted)
    monkeypatch.setattr(norms, "_is_on_gpu", lambda tensor: True)
    x, g = torch.randn(2, 4, 20), torch.randn(2, 4, 20)
    with pytest.raises(KernelMismatchError, match="planted misses float64"):
        norms.linear_sq_norms(x, g)
