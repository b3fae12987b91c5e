"""bfloat16 in the interpreter means what it means on a GPU."""

import torch
import triton
import triton.language as tl

from dp_flash_attention.attention.kernels.narrow import dot, rounded, short, weighted_sum


@triton.jit
def round_kernel(x, out, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out + lane, rounded(tl.load(x + lane), out.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr):
    lane = tl.arange(0, N)
    square = lane[:, None] * N + lane[None, :]
    total = dot(tl.load(a + square), tl.load(b + square), tl.zeros([N, N], tl.float32), "ieee")
    tl.store(out + square, total)


def test_rounding_is_to_the_nearest_and_ties_to_even():
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-23, -(1 + 2.0**-8), 0.0, 3e38, 1e-30]
    x = torch.cat([torch.tensor(ties), torch.randn(1024 - len(ties))])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = torch.full((1024,), float("nan"), dtype=dtype)
        keep = x.abs() < 6e4  # float16 ends there
        source = x if dtype is not torch.float16 else torch.where(keep, x, 0.0)
        round_kernel[(1,)](source, out, 1024)
        assert torch.equal(out, source.to(dtype))


def test_products_of_bfloat16_are_exact_and_summed_in_float32():
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    out = torch.full((32, 32), float("nan"))
    dot_kernel[(1,)](a, b, out, 32)
    exact = a.double() @ b.double()
    # 32 additions, relative to the sum of magnitudes.
    assert ((out - exact).abs() <= 32 * 2.0**-24 * (a.double().abs() @ b.double().abs())).all()


@triton.jit
def short_kernel(x, out, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out + lane, short(tl.load(x + lane)))


@triton.jit
def weighted_sum_kernel(weights, rows, out, N: tl.constexpr):
    lane = tl.arange(0, N)
    square = lane[:, None] * N + lane[None, :]
    total = weighted_sum(
        tl.load(weights + square), tl.load(rows + square), tl.zeros([N, N], tl.float32), "ieee"
    )
    tl.store(out + square, total)


def test_short_numbers_have_the_digits_of_float16_and_the_range_of_float32():
    ties = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-23, 0.0, 2.0**-98, 1.0]
    x = torch.cat(
        [torch.tensor(ties), torch.rand(1024 - len(ties)) * torch.logspace(-25, 0, 1024 - len(ties))]
    )
    out = torch.full((1024,), float("nan"))
    short_kernel[(1,)](x, out, 1024)
    # Moved into float16's normal range, a power of two away, they are what float16 rounds to.
    powers = torch.exp2(torch.floor(torch.log2(x.double().clamp_min(1e-30))))
    assert torch.equal(out.double(), (x.double() / powers).half().double() * powers)


def test_weights_are_rounded_once_to_the_digits_of_the_rows():
    weights = torch.rand(32, 32) * torch.logspace(-12, 0, 32)[:, None]  # far below float16's numbers
    for dtype, unit in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-24)):
        rows = torch.rand(32, 32).to(dtype)
        out = torch.full((32, 32), float("nan"))
        weighted_sum_kernel[(1,)](weights, rows, out, 32)
        exact = weights.double() @ rows.double()
        assert float((out / exact - 1).abs().max()) <= unit + 32 * 2.0**-24
        assert float((out / exact - 1).abs().max()) > 0.01 * unit
