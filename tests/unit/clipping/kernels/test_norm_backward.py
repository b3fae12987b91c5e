"""The norm layers' backward kernel, under the interpreter, against float64, autograd and the rules' own paths."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dp_flash_attention.clipping import ClippedGradientAccumulator, norm_layers, norms
from dp_flash_attention.clipping.kernels import norm_backward, selfcheck
from dp_flash_attention.clipping.kernels.norm_backward import NormGradients
from dp_flash_attention.clipping.kernels.selfcheck import exact_norm_backward, norm_layer_disagreement
from dp_flash_attention.clipping.reference import clipped_sum, per_example_gradients
from dp_flash_attention.core.errors import KernelMismatchError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 1, 6), (2, 5, 7), (2, 64, 32), (2, 65, 130), (1, 131, 33), (1, 3, 2050)]
module = importlib.import_module("dp_flash_attention.clipping.kernels.norm_backward")


def drawn(size, rows, width, dtype=torch.float32, *, centred=True):
    x, g = (torch.randn(size, rows, width).to(dtype) for _ in range(2))
    mean, rstd = 0.3 * torch.randn(size, rows), 0.5 + torch.rand(size, rows)
    return x, g, mean if centred else None, rstd, torch.randn(width)


def launched(x, g, mean, rstd, weight, **settings):
    return norm_backward(x, g, mean_BT=mean, rstd_BT=rstd, weight_D=weight, **settings)


def assert_exact(got, x, g, mean, rstd, weight):
    """Sums of T or D terms in float32, each rounded a few times: a bound of the sum of their sizes."""
    want = exact_norm_backward(x, g, mean, rstd, weight)
    unit = 2.0**-24
    x_hat = (
        (x.double().abs() + (0 if mean is None else mean.double().abs()[:, :, None])) * rstd[:, :, None]
    ).double()
    of_row = (weight * g).double().abs()
    gains = (x.shape[1] + 8) * unit * (g.double().abs() * x_hat).sum(1)
    biases = (x.shape[1] + 8) * unit * g.double().abs().sum(1)
    size = of_row + x_hat * (of_row * x_hat).mean(2, keepdim=True) + of_row.mean(2, keepdim=True)
    inputs = (x.shape[2] + 16) * unit * size * rstd[:, :, None]
    if (
        x.dtype is not torch.float32
    ):  # rounded once when stored; half of the smallest number where float16 is subnormal
        inputs = inputs + torch.finfo(x.dtype).eps / 2 * want[0].abs() + 2.0**-25
    for found, exact, bound in zip(got, want, (inputs, gains, biases), strict=True):
        assert (found is None) == (exact is None)
        if exact is not None:
            assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradients_are_those_of_float64(shape, dtype, centred):
    values = drawn(*shape, dtype, centred=centred)
    got = launched(*values)
    assert got.x_BTD.dtype is dtype
    assert got.gains_BD.dtype is torch.float32
    assert_exact(got, *values)


@pytest.mark.parametrize("centred", [True, False])
def test_the_formula_is_autograd_s(centred):
    x, g, weight = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 7).double(), torch.randn(7).double()
    mean = x.mean(2) if centred else None
    centre = 0 if mean is None else mean[:, :, None]
    rstd = ((x - centre).square().mean(2) + 1e-5).rsqrt()
    leaves = [x.clone().requires_grad_(), weight.expand(2, 1, 7).clone().requires_grad_()]
    norm = F.layer_norm(leaves[0], (7,), eps=1e-5) if centred else F.rms_norm(leaves[0], (7,), eps=1e-5)
    grads = torch.autograd.grad(norm * leaves[1], leaves, g)
    want = exact_norm_backward(x, g, mean, rstd, weight)
    torch.testing.assert_close(want[0], grads[0])
    torch.testing.assert_close(want[1], grads[1][:, 0])


def test_any_strides_and_no_input_gradient():
    x, g, mean, rstd, weight = drawn(2, 9, 12)
    got = launched(x, g, mean, rstd, weight)
    strided = launched(
        x.mT.contiguous().mT,
        g.transpose(0, 1).contiguous().transpose(0, 1),
        mean.mT.contiguous().mT,
        rstd,
        weight,
    )
    assert all(torch.equal(a, b) for a, b in zip(got, strided, strict=True))
    without = launched(x, g, mean, rstd, weight, with_input=False)
    assert without.x_BTD is None
    assert torch.equal(without.gains_BD, got.gains_BD)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty_shapes_have_no_gradient(shape):
    got = launched(*drawn(*shape))
    assert got.x_BTD.shape == shape
    assert torch.equal(got.gains_BD, torch.zeros(shape[0], shape[2]))
    assert torch.equal(got.biases_BD, torch.zeros(shape[0], shape[2]))


def test_sums_are_not_narrowed_with_their_inputs():
    ones = torch.ones(1, 513, 1, dtype=torch.bfloat16)  # a bfloat16 sum would stop at 256
    got = launched(ones, ones, torch.zeros(1, 513), torch.ones(1, 513), torch.ones(1))
    assert float(got.gains_BD) == float(got.biases_BD) == 513.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's; a GPU says nothing
def test_a_number_that_is_not_finite_stays_in_its_own_example(bad):
    values = drawn(2, 70, 5)
    clean = launched(*values)
    values[1][0, 4, 2] = bad
    got = launched(*values)
    for found, before in zip(got, clean, strict=True):
        assert not torch.isfinite(found[0]).all()
        assert torch.equal(found[1], before[1])


@pytest.mark.parametrize("centred", [True, False])
def test_nothing_is_carried_over_from_call_to_call_or_read_before_it_is_written(poisoned, centred):
    values = drawn(2, 70, 20, centred=centred)
    cold = launched(*values)
    launched(100 * values[0], values[1].flip(1), *values[2:])
    warm = launched(*values)
    # Two pieces of 64 rows an example: nothing of the size of x but its own gradient.
    assert poisoned == [(2, 70, 20), *[(2, 2, 20)] * (2 if centred else 1)] * 3
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(cold, warm, strict=True))
    assert_exact(warm, *values)


def test_what_nobody_wrote_is_seen(poisoned, monkeypatch):
    kernel = module.norm_backward_kernel

    class OneProgramLess:
        def __getitem__(self, grid):
            return kernel[(grid[0] - 1,)]

    monkeypatch.setattr(module, "norm_backward_kernel", OneProgramLess())
    assert all(torch.isnan(found[1]).any() for found in launched(*drawn(2, 70, 20)))


def warm_sums():
    """Planted: gain and bias sums that are zeroed before the first call and never again."""
    kept = []

    def planted(*args, **kwargs):
        got = norm_backward(*args, **kwargs)
        kept.append(got.gains_BD)
        return got._replace(gains_BD=sum(kept)) if len({g.shape for g in kept}) == 1 else got

    return planted


def test_sums_that_begin_where_the_last_call_ended_are_seen(monkeypatch):
    planted, values = warm_sums(), drawn(2, 9, 6)
    arguments = {"mean_BT": values[2], "rstd_BT": values[3], "weight_D": values[4]}
    assert_exact(planted(*values[:2], **arguments), *values)
    with pytest.raises(AssertionError):
        assert_exact(planted(*values[:2], **arguments), *values)
    monkeypatch.setattr(selfcheck, "norm_backward", planted := warm_sums())
    planted(
        torch.ones(2, 1, 150),
        torch.ones(2, 1, 150),
        mean_BT=None,
        rstd_BT=torch.ones(2, 1),
        weight_D=torch.ones(150),
    )
    norm_layer_disagreement.cache_clear()
    assert "in gains_BD" in norm_layer_disagreement("cpu", torch.float32)
    norm_layer_disagreement.cache_clear()


@pytest.fixture
def on_kernel(monkeypatch):
    """Makes the rules take CPU tensors for CUDA tensors; records that the kernel ran."""
    norm_layer_disagreement.cache_clear()
    ran = []
    monkeypatch.setattr(norms, "_is_on_gpu", lambda tensor: True)
    # Only the norm layers are under test: other kernels would take minutes to interpret.
    monkeypatch.setattr(norms, "norm_path", lambda *tensors: "torch")
    monkeypatch.setattr(
        "dp_flash_attention.clipping.kernels.norm_backward",
        lambda *args, **kwargs: ran.append("norm layer") or norm_backward(*args, **kwargs),
    )
    yield ran
    norm_layer_disagreement.cache_clear()


class Scored(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, inputs):
        flat = self.inner(inputs).sin().flatten(1)
        return flat.square().mean(1) + flat[:, 0]


LAYERS = {
    "layer": lambda: nn.LayerNorm(6),
    "layer, no bias": lambda: nn.LayerNorm(6, bias=False),
    "layer, two dimensions": lambda: nn.LayerNorm((5, 6)),
    "rms": lambda: nn.RMSNorm(6, eps=1e-3),
}


@pytest.mark.parametrize("first", [True, False])  # the first layer's input needs no gradient
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 3, 5, 6)])
@pytest.mark.parametrize("name", LAYERS)
def test_which_path_ran_and_the_clipped_sums_are_exact(name, shape, first, on_kernel):
    model = Scored(*(() if first else (nn.Linear(6, 6),)), LAYERS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = torch.randn(shape)
    exact = Scored(*(() if first else (nn.Linear(6, 6),)), LAYERS[name]()).double()
    exact.load_state_dict(model.state_dict())
    gradients = per_example_gradients(exact, exact, inputs.double(), batch_size=4)
    _, lengths = clipped_sum(gradients, l2_clip_norm=1.0)
    clip = float(lengths.median())
    want, _ = clipped_sum(gradients, l2_clip_norm=clip)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=clip)
    for _ in range(2):  # cold and warm
        accumulator.reset()
        on_kernel.clear()
        seen = accumulator.add(lambda: model(inputs), batch_size=4)
        assert on_kernel == ["norm layer"]
        torch.testing.assert_close(seen.norms.double(), lengths, rtol=1e-5, atol=0)
        for key, total in want.items():
            torch.testing.assert_close(accumulator.sums[key].double(), total, rtol=0, atol=1e-5 * clip)


def test_what_the_kernel_does_not_take_keeps_its_own_path(on_kernel):
    model = Scored(nn.LayerNorm(6), nn.RMSNorm(6)).double()
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    accumulator.add(lambda: model(torch.randn(4, 5, 6).double()), batch_size=4)
    model = Scored(nn.LayerNorm(6), nn.RMSNorm(6))
    with norms.cancellation_deferred():  # a graph holds no launch
        accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
        accumulator.add(lambda: model(torch.randn(4, 5, 6)), batch_size=4)
    assert norm_layers.norm_layer_path(torch.zeros(1, 1, 9000), width=9000) == "torch"
    assert norm_layers.norm_layer_path(torch.zeros(1, 1, 8192), width=8192) == "triton"
    assert on_kernel == []


def test_the_cpu_keeps_its_own_path():
    assert norm_layers.norm_layer_path(torch.zeros(1, 1, 8), width=8) == "torch"


@pytest.mark.parametrize("part", NormGradients._fields)
@pytest.mark.parametrize("wrong", [lambda n: 1.05 * n, lambda n: n * float("nan")])
def test_a_wrong_gradient_stops_the_clipping(part, wrong, monkeypatch, on_kernel):
    def planted(*args, **kwargs):
        got = norm_backward(*args, **kwargs)
        value = getattr(got, part)
        return got if value is None else got._replace(**{part: wrong(value)})

    monkeypatch.setattr(selfcheck, "norm_backward", planted)
    model = Scored(nn.LayerNorm(6))
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    with pytest.raises(KernelMismatchError, match="misses float64"):
        accumulator.add(lambda: model(torch.randn(4, 5, 6)), batch_size=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_agrees(dtype):
    norm_layer_disagreement.cache_clear()
    assert norm_layer_disagreement("cpu", dtype) is None
