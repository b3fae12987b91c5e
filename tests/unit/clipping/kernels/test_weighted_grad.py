"""The kernel of clipped sums, under the interpreter, against float64 and against the CPU's path."""

import importlib

import pytest
import torch

from dp_flash_attention.clipping import ClippedGradientAccumulator, norms
from dp_flash_attention.clipping.contributions import LinearContribution, linear_contribution
from dp_flash_attention.clipping.kernels import selfcheck, weighted_grad
from dp_flash_attention.core.errors import KernelMismatchError

module = importlib.import_module("dp_flash_attention.clipping.kernels.weighted_grad")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1, 1),
    (2, 17, 5, 3),
    (5, 64, 64, 64),  # one tile, shared out over five runs
    (2, 129, 130, 65),
    (3, 3, 129, 257),  # six tiles
]


def drawn(size, rows, inputs, outputs, dtype=torch.bfloat16):
    x, g = torch.randn(size, rows, inputs).to(dtype), torch.randn(size, rows, outputs).to(dtype)
    return x, g, torch.rand(size)


def exact(x, g, factors):
    return torch.einsum("b,btp,btd->pd", factors.double(), g.double(), x.double())


def assert_close(got, x, g, factors):
    """Sums of B·T products in float32: the error is within T + B + 8 roundings of the products' absolute sum."""
    size = torch.einsum("b,btp,btd->pd", factors.double(), g.double().abs(), x.double().abs())
    bound = (x.shape[1] + len(x) + 8) * 2.0**-24 * size
    assert ((got.double() - exact(x, g, factors)).abs() <= bound).all()


def poisoned(*shape):
    return torch.full(shape, float("nan"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_is_that_of_float64_fresh_and_added(shape, dtype):
    x, g, factors = drawn(*shape, dtype)
    out = poisoned(shape[3], shape[2])
    weighted_grad(x, g, factors, out, fresh=True)
    assert_close(out, x, g, factors)
    weighted_grad(x, g, factors, out, fresh=False)
    assert_close(out / 2, x, g, factors)


def test_few_runs_and_many_give_the_sum_and_scratch_is_bounded(monkeypatch, request):
    x, g, factors = drawn(7, 20, 130, 40)
    found = []
    for enough in (1, 5, 1000):
        monkeypatch.setattr(module, "_ENOUGH_PROGRAMS", enough)
        found.append(poisoned(40, 130))
        shapes = request.getfixturevalue("poisoned")
        del shapes[:]
        weighted_grad(x, g, factors, found[-1], fresh=True)
        assert_close(found[-1], x, g, factors)
        # Two tiles: 1, 3 and 7 runs; one run writes where it belongs.
        assert shapes == {1: [], 5: [(3, 40, 130)], 1000: [(7, 40, 130)]}[enough]


def test_any_strides_and_the_same_bits_every_time():
    x, g, factors = drawn(2, 70, 20, 30)
    want, got = poisoned(30, 20), poisoned(30, 20)
    weighted_grad(x, g, factors, want, fresh=True)
    strided = (x.mT.contiguous().mT, g.transpose(0, 1).contiguous().transpose(0, 1))
    weighted_grad(*strided, factors, got, fresh=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_shapes_add_nothing(shape):
    x, g, factors = drawn(*shape)
    out = poisoned(shape[3], shape[2])
    weighted_grad(x, g, factors, out, fresh=True)
    assert torch.equal(out, torch.zeros(shape[3], shape[2]))
    weighted_grad(x, g, factors, out.fill_(2.0), fresh=False)
    assert (out == 2.0).all()


def test_an_example_of_factor_zero_counts_as_nothing_whatever_it_holds():
    x, g, factors = drawn(3, 10, 8, 9)
    factors[1] = 0.0
    x[1, 2], g[1, 3] = float("nan"), float("nan")
    out = poisoned(9, 8)
    weighted_grad(x, g, factors, out, fresh=True)
    others = [0, 2]
    assert_close(out, x[others], g[others], factors[others])


def test_a_program_that_did_not_run_is_seen(monkeypatch):
    kernel = module.weighted_grad_kernel

    class OneProgramLess:
        def __getitem__(self, grid):
            return kernel[(grid[0] - 1,)]

    monkeypatch.setattr(module, "weighted_grad_kernel", OneProgramLess())
    x, g, factors = drawn(2, 10, 130, 20)
    out = poisoned(20, 130)
    monkeypatch.setattr(module, "_ENOUGH_PROGRAMS", 1)
    weighted_grad(x, g, factors, out, fresh=True)
    assert torch.isnan(out).any()


def test_what_is_added_is_what_the_norm_was_taken_of():
    # The rows' gradients cancel but for a part in 2^8. Factors that are rounded into x leave a rest of another size than
    # the norm says, up to a tenth here; a factor that meets the float32 sum does not.
    one = torch.randn(1, 1, 64).bfloat16()
    x = torch.cat([one, one], 1)
    g = torch.cat([torch.ones(1, 1, 8), -torch.ones(1, 1, 8) * (1 - 2.0**-8)], 1).bfloat16()
    norm = float(exact(x, g, torch.ones(1)).norm())
    factors = torch.tensor([0.7 / norm])
    out = poisoned(8, 64)
    weighted_grad(x, g, factors, out, fresh=True)
    assert abs(float(out.double().norm()) / 0.7 - 1) < 1e-5
    g_rounded = (g * factors).bfloat16()
    planted = float(torch.einsum("btp,btd->pd", g_rounded.double(), x.double()).norm())
    assert abs(planted / 0.7 - 1) > 1e-3


@pytest.fixture
def on_kernel(monkeypatch):
    """Takes CPU tensors for CUDA tensors; records the kernel's calls."""
    ran = []
    monkeypatch.setattr(norms, "_is_on_gpu", lambda tensor: True)

    def recorded(x, g, *rest, **named):
        ran.append((x.shape[2], g.shape[2]))
        weighted_grad(x, g, *rest, **named)

    monkeypatch.setattr("dp_flash_attention.clipping.kernels.weighted_grad", recorded)
    return ran


@pytest.mark.parametrize("input_first", [False, True])
def test_a_contribution_of_16_bits_runs_on_the_kernel(input_first, on_kernel):
    x, g, factors = drawn(3, 12, 20, 40)
    shape = torch.Size((20, 40) if input_first else (40, 20))
    record = LinearContribution(x_BTD=x, g_BTP=g, weight_shape=shape, input_first=input_first)
    out = poisoned(*shape)
    record.add_weighted_sum(factors, out, fresh=True)
    assert on_kernel == [(40, 20) if input_first else (20, 40)]
    assert_close(out.mT if input_first else out, x, g, factors)


def test_what_the_kernel_does_not_take_runs_in_torch(on_kernel, monkeypatch):
    x, g, factors = drawn(3, 12, 20, 40)
    shape = torch.Size((40, 20))
    for a, b in ((x.float(), g.float()), (x, g.float()), (x.half(), g)):
        assert norms.weighted_grad_path(a, b) == "torch"
        LinearContribution(x_BTD=a, g_BTP=b, weight_shape=shape).add_weighted_sum(
            factors, poisoned(*shape), fresh=True
        )
    monkeypatch.setattr(norms, "has_triton", lambda: False)
    assert norms.weighted_grad_path(x, g) == "torch"
    assert on_kernel == []


def test_small_gradients_are_not_formed_where_the_kernel_runs(on_kernel):
    x, g, _ = drawn(2, 50, 4, 4)
    assert isinstance(
        linear_contribution(x_BTD=x, g_BTP=g, weight_shape=torch.Size((4, 4))), LinearContribution
    )


def test_a_step_under_autocast_is_that_of_the_cpu_s_path(on_kernel, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3))
    rows = torch.randn(4, 6, 12) * 10

    def sums():
        accumulator = ClippedGradientAccumulator(model, l2_clip_norm=0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            accumulator.add(lambda: model(rows).float().square().sum((1, 2)), batch_size=4)
        return accumulator.sums

    found = sums()
    assert on_kernel == [(12, 20), (20, 3)]
    monkeypatch.setattr(norms, "_is_on_gpu", lambda tensor: False)
    for name, want in sums().items():
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-5)


def test_a_wrong_kernel_stops_the_clipping(monkeypatch, on_kernel):
    def planted(x, g, factors, out, *, fresh):
        weighted_grad(x, g, factors, out, fresh=True)  # forgets what was there

    selfcheck.weighted_grad_disagreement.cache_clear()
    monkeypatch.setattr(selfcheck, "weighted_grad", planted)
    x, g, factors = drawn(2, 4, 20, 20)
    with pytest.raises(KernelMismatchError, match="planted misses float64"):
        LinearContribution(x_BTD=x, g_BTP=g, weight_shape=torch.Size((20, 20))).add_weighted_sum(
            factors, poisoned(20, 20), fresh=True
        )
    selfcheck.weighted_grad_disagreement.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_agrees(dtype):
    selfcheck.weighted_grad_disagreement.cache_clear()
    assert selfcheck.weighted_grad_disagreement("cpu", dtype) is None
