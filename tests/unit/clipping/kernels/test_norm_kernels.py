"""The norm kernels, under the interpreter, against float64 and against ``clipping.norms``."""

import importlib

import pytest
import torch

from dp_flash_attention.clipping import norms
from dp_flash_attention.clipping.kernels import gram_norm, outer_norm

KERNELS = {"gram": gram_norm, "outer": outer_norm}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1, 1),
    (2, 17, 5, 3),
    (3, 64, 64, 64),
    (2, 129, 130, 65),
    (1, 200, 33, 130),  # four strips: two pairs
    (2, 130, 16, 16),  # three strips: the middle one alone
]


def exact(x, g):
    return torch.einsum("btp,btd->bpd", g.double(), x.double()).square().sum((1, 2))


def drawn(size, rows, inputs, outputs, dtype=torch.float32):
    return torch.randn(size, rows, inputs).to(dtype), torch.randn(size, rows, outputs).to(dtype)


def tolerance(x, g):
    """Relative: sums of T·max(D, P) products in float32, in blocks of 64, of terms that mostly add up (squares)."""
    return (64 + x.shape[1]) * 2.0**-24 + 8 * 2.0**-24


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norms_are_those_of_float64_and_of_the_torch_path(name, shape, dtype):
    x, g = drawn(*shape, dtype)
    got = KERNELS[name](x, g)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), exact(x, g), rtol=tolerance(x, g), atol=0)
    torch.testing.assert_close(got, norms.linear_sq_norms(x, g), rtol=2 * tolerance(x, g), atol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_any_strides(name):
    x, g = drawn(2, 70, 20, 30)
    strided = KERNELS[name](x.mT.contiguous().mT, g.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(strided, KERNELS[name](x, g))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_shapes_have_norm_zero(name, shape):
    assert torch.equal(KERNELS[name](*drawn(*shape)), torch.zeros(shape[0]))


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_carried_over_from_call_to_call_or_read_before_it_is_written(name, poisoned):
    x, g = drawn(2, 130, 200, 70)
    cold = KERNELS[name](x, g)
    KERNELS[name](100 * x, g)
    warm = KERNELS[name](x, g)
    # Scratch is O(batch): pairs of strips of 64 rows, or tiles of 128×128, never T×T or D×P.
    assert poisoned == [(2, 2)] * 3
    assert torch.equal(cold, warm)
    torch.testing.assert_close(cold.double(), exact(x, g), rtol=tolerance(x, g), atol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_a_partial_sum_that_nobody_wrote_is_seen(name, poisoned, monkeypatch):
    # Planted: published kernels summed into buffers that held what the last call had left.
    module = importlib.import_module(f"dp_flash_attention.clipping.kernels.{name}_norm")
    kernel = getattr(module, f"{name}_norm_kernel")

    class OneProgramLess:
        def __getitem__(self, grid):
            return kernel[(grid[0] - 1,)]

    monkeypatch.setattr(module, f"{name}_norm_kernel", OneProgramLess())
    assert torch.isnan(KERNELS[name](*drawn(2, 130, 70, 70))).any()


def test_a_forgotten_half_of_the_tiles_is_seen():
    x, g = drawn(1, 130, 16, 16)
    diagonal = sum(gram_norm(x[:, t : t + 64], g[:, t : t + 64]) for t in (0, 64, 128))
    assert not torch.allclose(diagonal.double(), exact(x, g), rtol=tolerance(x, g))


def test_norms_are_not_narrowed_with_their_inputs():
    x = torch.ones(1, 513, 1, dtype=torch.bfloat16)  # a bfloat16 sum would stop at 256
    assert float(gram_norm(x, x)) == 513.0**2
    assert float(outer_norm(x, x)) == 513.0**2


@pytest.fixture
def on_kernel(monkeypatch):
    """Makes ``linear_sq_norms`` take CPU tensors for CUDA tensors; records which kernel ran."""
    ran = []
    monkeypatch.setattr(norms, "_is_on_gpu", lambda tensor: True)
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(
            f"dp_flash_attention.clipping.kernels.{name}_norm",
            lambda x, g, name=name, kernel=kernel: ran.append(name) or kernel(x, g),
        )
    return ran


@pytest.mark.parametrize(("shape", "form"), [((2, 4, 40, 40), "gram"), ((2, 100, 8, 8), "outer")])
def test_which_path_ran(shape, form, on_kernel):
    x, g = drawn(*shape)
    assert norms.norm_path(x, g) == "triton"
    got = norms.linear_sq_norms(x, g)
    assert on_kernel == [form]
    torch.testing.assert_close(got.double(), exact(x, g), rtol=tolerance(x, g), atol=0)


def test_the_cpu_keeps_its_own_path():
    x, g = drawn(2, 4, 8, 8)
    assert norms.norm_path(x, g) == "torch"


def test_what_the_kernels_do_not_take_runs_in_torch(on_kernel, monkeypatch):
    x, g = drawn(2, 4, 8, 8)
    for a, b in ((x.double(), g.double()), (x.bfloat16(), g), (x, g.bfloat16())):
        assert norms.norm_path(a, b) == "torch"
        norms.linear_sq_norms(a, b)
    monkeypatch.setattr(norms, "has_triton", lambda: False)
    assert norms.norm_path(x, g) == "torch"
    torch.testing.assert_close(norms.linear_sq_norms(x, g).double(), exact(x, g), rtol=1e-5, atol=0)
    assert on_kernel == []


def test_an_example_whose_rows_cancel_is_computed_by_the_outer_kernel(on_kernel):
    x, g = drawn(2, 4, 40, 40)
    # Row 1 takes back row 0 but for a part in a thousand, so the gram form subtracts equal numbers.
    x[1, 2:], g[1, 2:] = 0.0, 0.0
    x[1, 1], g[1, 1] = x[1, 0], -g[1, 0] * (1.0 - 1e-3)
    got = norms.linear_sq_norms(x, g)
    assert on_kernel == ["gram", "outer"]
    torch.testing.assert_close(got.double(), exact(x, g), rtol=1e-3, atol=0)
