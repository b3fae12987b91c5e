"""Row factors against float64, at every edge; they are what bounds the sensitivity."""

import math

import numpy as np
import pytest
import torch

from dp_flash_attention.attention.kernels.operands import row_factors
from dp_flash_attention.attention.sensitivity import clip_threshold

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact_factors(rows, norm):
    lengths = torch.linalg.vector_norm(rows.double(), dim=-1)
    return norm / lengths.clamp_min(norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (17, 24), (300, 64), (129, 80), (5, 256)])
def test_the_factors_are_those_of_float64(dtype, num_rows, width):
    rows = (torch.randn(2, 3, num_rows, width) * torch.logspace(-2, 2, num_rows)[:, None]).to(dtype)
    got = row_factors(rows, 1.5).double()
    # The sum of squares has width + 1 roundings, halved by the root, and root and quotient one each.
    error = (got / exact_factors(rows, 1.5) - 1).abs().max()
    assert error <= (width + 5) / 2 * 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clipped_row_obeys_the_public_bound_exactly(dtype):
    width, bound = 64, 1.0
    rows = torch.randn(1, 1, 500, width).to(dtype)
    threshold = clip_threshold(bound, dtype, width)
    factors = row_factors(rows, threshold)
    # As the kernel uses it: one product in float32, one rounding to the dtype; the norm in exact arithmetic.
    clipped = (rows.float() * factors[..., None]).to(dtype)
    longest = max(math.fsum(x * x for x in row) for row in clipped.double()[0, 0].tolist())
    assert longest <= bound**2
    # The room that is left is not large: it is the rounding, and no more.
    assert longest >= (bound * (1 - 4 * float(torch.finfo(dtype).eps) - 1e-4)) ** 2
    # Planted: a clip that aims at the public bound itself.
    clipped = (rows.float() * row_factors(rows, bound)[..., None]).to(dtype)
    assert max(math.fsum(x * x for x in row) for row in clipped.double()[0, 0].tolist()) > bound**2


def test_short_rows_have_the_factor_one_and_zero_rows_too():
    rows = torch.zeros(1, 1, 3, 16)
    rows[0, 0, 1, 0], rows[0, 0, 2, 5] = 1.0, 0.5
    assert row_factors(rows, 1.0).tolist() == [[[1.0, 1.0, 1.0]]]


@pytest.mark.parametrize("size", [2.0**41, 1e19, 1e30, 3e38])
def test_a_row_beyond_float32_s_squares_counts_as_zero(size):
    rows = torch.full((1, 1, 1, 16), size)
    with np.errstate(over="ignore"):  # on a device the square is infinite without a word
        assert row_factors(rows, 1.0).tolist() == [[[0.0]]]


def test_any_strides_and_nothing_left_unwritten(monkeypatch):
    rows = torch.randn(2, 50, 3, 20).transpose(1, 2)  # [B, K, G, D] seen as [B, G, K, D]
    empty = torch.empty
    poisoned = []

    def poison(*args, **kwargs):
        poisoned.append(args)
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poison)
    got = row_factors(rows, 2.0)
    assert len(poisoned) == 1
    monkeypatch.undo()
    torch.testing.assert_close(got.double(), exact_factors(rows, 2.0), rtol=1e-5, atol=0)


def test_no_rows_need_no_launch():
    assert row_factors(torch.empty(2, 3, 0, 16), 1.0).shape == (2, 3, 0)
