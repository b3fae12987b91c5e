"""bfloat16 in the interpreter means what it means on a GPU."""

import torch
import triton
import triton.language as tl

from dp_flash_attention.attention.kernels.narrow import dot, rounded


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
