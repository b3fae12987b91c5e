"""The kernels on a real device, against the same references as under the interpreter.

Run by hand: ``TRITON_INTERPRET=0 python -m pytest -m gpu tests/gpu``. None of it has been run yet: the machines that
this was written on have no GPU.
"""

import math

import pytest
import torch
import triton

from dp_flash_attention.attention.interface import AttentionCall, NoiseStream, RowNorms
from dp_flash_attention.attention.kernels.backend import make_backend
from dp_flash_attention.attention.kernels.launch import attention_forward
from dp_flash_attention.attention.kernels.launch_backward import attention_backward
from dp_flash_attention.attention.kernels.launch_split import default_splits
from dp_flash_attention.attention.noising import add_noise, noise_path
from dp_flash_attention.attention.reference import (
    reference_attention,
    reference_gradients,
    reference_noise,
)
from dp_flash_attention.clipping import ClippedGradientAccumulator, norms
from dp_flash_attention.clipping.kernels import (
    embedding_norm,
    gram_norm,
    norm_backward,
    outer_norm,
    tied_cross,
    weighted_grad,
)
from dp_flash_attention.clipping.kernels.selfcheck import exact_norm_backward
from dp_flash_attention.clipping.norm_layers import norm_layer_path
from dp_flash_attention.core.errors import NoiseReuseError, NoiseUnavailableError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import (
    DiscreteGaussianGenerator,
    FastNormalGenerator,
    SecureNormalGenerator,
    TestKey,
    make_generator,
)
from dp_flash_attention.noise.keystream import MAX_STEP, MAX_STREAM, TILE_NUMBERS
from dp_flash_attention.quantum import PostQuantumGaussian
from dp_flash_attention.training.noisy_adamw import NoisyAdamW

pytestmark = pytest.mark.gpu

KEY = TestKey("on a gpu")
GENERATORS = ("secure", "fast")
CLOSE = {"rtol": 16 * 2.0**-24, "atol": 2.0**-25}  # see tests/unit/noise/kernels/test_transform.py


@pytest.fixture(autouse=True)
def _on_a_device():
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    assert not triton.knobs.runtime.interpret, "set TRITON_INTERPRET=0: the interpreter runs on the CPU"


def generator_of(name):
    # Made by the test that needs it: without cryptography the secure ones fail, and the others still run.
    return make_generator(name, KEY, cipher="chacha20") if name == "secure" else make_generator(name, KEY)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("size", [1, 17, TILE_NUMBERS + 1, 1_000_003, 40_000_000])
@pytest.mark.parametrize(("step", "stream"), [(0, 0), (MAX_STEP, MAX_STREAM)])
def test_normals_are_those_of_the_cpu(name, size, step, stream):
    poisoned = torch.full((size + 7,), float("nan"), device="cuda")
    generator_of(name).fill_normal_(poisoned[:size], stddev=1.0, step=step, stream=stream)
    assert torch.isnan(poisoned[size:]).all()
    want = generator_of(name).fill_normal_(torch.empty(size), step=step, stream=stream)
    torch.testing.assert_close(poisoned[:size].cpu(), want, **CLOSE)


@pytest.mark.parametrize("name", GENERATORS)
def test_adding_and_another_device_s_order_change_nothing(name):
    start = torch.linspace(-1, 1, 500_000)
    where = {"stddev": 0.7, "step": 3, "stream": 1}
    added = generator_of(name).add_normal_(start.cuda(), **where)
    torch.testing.assert_close(added.cpu(), generator_of(name).add_normal_(start.clone(), **where), **CLOSE)


def test_aes_is_refused_on_the_device():
    with pytest.raises(NoiseUnavailableError, match="chacha20"):
        make_generator("secure", KEY).fill_normal_(torch.empty(5, device="cuda"), step=0, stream=0)


@pytest.mark.parametrize("stddev", [4, 24, 40, 300, 2**28])
@pytest.mark.parametrize("size", [1, 8191, 1_000_003])
def test_exact_noise_is_that_of_the_cpu_in_every_bit(stddev, size):
    made = DiscreteGaussianGenerator(KEY, stddev=stddev, cipher="chacha20")
    where = {"step": MAX_STEP, "stream": MAX_STREAM}
    poisoned = torch.full((size + 7,), -(2**63), device="cuda")
    made.fill_(poisoned[:size], **where)
    assert (poisoned[size:] == -(2**63)).all()
    want = made.fill_(torch.empty(size, dtype=torch.int64), **where)
    assert torch.equal(poisoned[:size].cpu(), want)
    start = torch.arange(size)
    assert torch.equal(made.add_(start.cuda(), **where).cpu(), start + want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_release_stays_on_the_device_and_is_the_host_s(dtype):
    one = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    budget = PrivacyBudget(epsilon=1.0, delta=1e-6)
    value = (torch.arange(40) * 3.3).to(dtype)
    found, want = (
        PostQuantumGaussian(key=KEY, cipher="chacha20", grid=2.0**-3).release(given, one, budget).value
        for given in (value.cuda(), value)
    )
    assert found.is_cuda
    assert torch.equal(found.cpu(), want)


def test_a_capture_is_refused():
    out = torch.zeros(4096, device="cuda")
    generator_of("fast").fill_normal_(out, step=0, stream=0)  # compiles outside of the capture
    with pytest.raises(NoiseReuseError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        generator_of("fast").fill_normal_(out, step=1, stream=0)


def make_call(queries, rows, width, dtype, *, heads=4, groups=2, causal, hides, name="secure"):
    generator = FastNormalGenerator(KEY) if name == "fast" else SecureNormalGenerator(KEY, cipher="chacha20")

    def drawn(*shape):
        lengths = 2 * torch.exp(torch.randn(*shape[:-1], 1)) / math.sqrt(shape[-1])
        return (torch.randn(shape) * lengths).to("cuda", dtype)

    return AttentionCall(
        query=drawn(2, heads, queries, width),
        key=drawn(2, groups, rows, width),
        value=drawn(2, groups, rows, width),
        norms=RowNorms(query=2.0, key=3.0, value=1.5),
        scale=0.5,
        score_bound=3.0,
        causal=causal,
        hidden=torch.rand(2, rows, device="cuda") < 0.3 if hides else None,
        null_rows=1.0,
        stddev=torch.rand(2, heads, queries) + 0.1,
        noise=NoiseStream(key=KEY, name=name, cipher="chacha20", call_id=7, generator=generator),
        out_dtype=torch.float32,
    )


# See tests/unit/attention/kernels/test_forward.tolerance; the noise adds its last bits.
CLOSE_ROWS = {
    torch.float32: 3e-5,
    torch.bfloat16: 2 * (2 * 2.0**-9 * 3 + 2 * 2.0**-9),
    torch.float16: 2 * (2 * 2.0**-12 * 3 + 2 * 2.0**-12),
}


def worst_row(got, want):
    return float(torch.linalg.vector_norm(got.cpu().double() - want, dim=-1).max()) / 1.5


@pytest.mark.parametrize("factors", ["inline", "ahead"])
@pytest.mark.parametrize("name", ["secure", "fast"])
@pytest.mark.parametrize("dtype", list(CLOSE_ROWS))
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize(
    ("queries", "rows", "causal", "hides"),
    [(1, 1, False, False), (17, 129, False, True), (300, 300, True, False), (129, 517, True, True)],
)
def test_attention_is_the_reference_and_the_noise(queries, rows, causal, hides, width, dtype, name, factors):
    call = make_call(queries, rows, width, dtype, causal=causal, hides=hides, name=name)
    got, _ = attention_forward(call, factors=factors)
    assert worst_row(got, reference_attention(call) + reference_noise(call)) <= CLOSE_ROWS[dtype]
    again, _ = attention_forward(call, factors=factors)
    assert torch.equal(got, again)


@pytest.mark.parametrize("name", ["secure", "fast"])
def test_noise_added_to_another_kernel_s_output(name):
    call = make_call(300, 40, 64, torch.float32, causal=False, hides=False, name=name)
    exact = torch.randn(2, 4, 300, 64, device="cuda")
    assert noise_path(exact, call.noise) == "triton"
    got = add_noise(exact, call.stddev, call.noise, torch.float32)
    want = exact.cpu().double() + reference_noise(call)
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-6, atol=2.0**-21)


def test_long_contexts_and_the_back_end_s_own_choice():
    call = make_call(64, 20_000, 64, torch.bfloat16, causal=False, hides=False)
    backend = make_backend()
    assert backend.refusal(call, needs_grad=False) is None
    want = reference_attention(call) + reference_noise(call)
    assert worst_row(backend.release(call), want) <= CLOSE_ROWS[torch.bfloat16]


@pytest.mark.parametrize("dtype", list(CLOSE_ROWS))
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("queries", [1, 30])
def test_few_queries_over_many_rows_in_any_number_of_ranges(queries, width, dtype):
    call = make_call(queries, 20_000, width, dtype, heads=2, groups=1, causal=False, hides=True, name="fast")
    assert default_splits(call) > 1
    want = reference_attention(call) + reference_noise(call)
    whole, _ = attention_forward(call, splits=1)
    for splits in (None, 2, 7, 20):
        got, _ = attention_forward(call, splits=splits)
        assert torch.equal(got, attention_forward(call, splits=splits)[0])
        assert worst_row(got, want) <= CLOSE_ROWS[dtype]
        assert worst_row(got, whole.cpu().double()) <= 2e-5  # a row's rounding is its own: only sums differ


# Each of a gradient's roundings is half a unit at most; see tests/unit/attention/kernels/test_backward.tolerance.
CLOSE_GRADIENTS = {torch.float32: 5e-6, torch.bfloat16: 4 * 2.0**-9, torch.float16: 4 * 2.0**-12}


@pytest.mark.parametrize("dtype", list(CLOSE_GRADIENTS))
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize(
    ("queries", "rows", "causal", "hides"),
    [(1, 1, False, False), (17, 129, False, True), (200, 200, True, False), (129, 317, True, True)],
)
def test_gradients_are_the_reference_s_every_time(queries, rows, causal, hides, width, dtype):
    call = make_call(queries, rows, width, dtype, causal=causal, hides=hides, name="fast")
    grad = torch.randn(2, 4, queries, width, device="cuda").to(dtype)
    found, again = attention_backward(call, grad), attention_backward(call, grad)
    for one, other, want in zip(found, again, reference_gradients(call, grad), strict=True):
        assert torch.equal(one, other)
        assert float((one.cpu().double() - want).norm() / want.norm()) <= CLOSE_GRADIENTS[dtype]


@pytest.mark.parametrize("dtype", list(CLOSE_GRADIENTS))
def test_autograd_goes_through_the_back_end(dtype):
    call = make_call(40, 50, 64, dtype, causal=False, hides=True, name="fast")
    inputs = [each.requires_grad_(True) for each in (call.query, call.key, call.value)]
    backend = make_backend()
    assert backend.refusal(call, needs_grad=True) is None
    grad = torch.randn(2, 4, 40, 64, device="cuda")
    found = torch.autograd.grad(backend.release(call), inputs, grad)
    for one, want in zip(found, reference_gradients(call, grad.to(dtype)), strict=True):
        assert float((one.cpu().double() - want).norm() / want.norm()) <= CLOSE_GRADIENTS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 17, 5, 300), (2, 129, 770, 65), (2, 1024, 768, 3072)])
def test_norms_are_those_of_float64(shape, dtype):
    size, rows, inputs, outputs = shape
    x = torch.randn(size, rows, inputs, device="cuda").to(dtype)
    g = torch.randn(size, rows, outputs, device="cuda").to(dtype)
    want = torch.einsum("btp,btd->bpd", g.double(), x.double()).square().sum((1, 2))
    for norm in (gram_norm, outer_norm):
        got = [norm(x, g) for _ in range(2)]
        assert torch.equal(*got)
        torch.testing.assert_close(got[0].double(), want, rtol=2 * (64 + rows) * 2.0**-24, atol=0)
    assert norms.norm_path(x, g) == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "rows", "width"), [(1, 1, 1), (3, 129, 65), (8, 1024, 768)])
def test_embedding_norms_are_those_of_float64_every_time(dtype, size, rows, width):
    ids = torch.randint(0, 50, (size, rows), device="cuda")
    g = torch.randn(size, rows, width, device="cuda").to(dtype)
    table = torch.zeros(size, 50, width, dtype=torch.float64, device="cuda")
    want = table.scatter_add_(1, ids[:, :, None].expand_as(g), g.double()).square().sum((1, 2))
    got = [embedding_norm(ids, g) for _ in range(2)]
    assert torch.equal(*got)
    torch.testing.assert_close(got[0].double(), want, rtol=(4 * rows + 16) * 2.0**-24, atol=0)
    assert norms.embedding_norm_path(g) == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 17, 5, 300), (5, 129, 770, 65), (4, 1024, 768, 3072)])
def test_weighted_gradients_are_those_of_float64_every_time(shape, dtype):
    size, rows, inputs, outputs = shape
    x = torch.randn(size, rows, inputs, device="cuda").to(dtype)
    g = torch.randn(size, rows, outputs, device="cuda").to(dtype)
    factors = torch.rand(size, device="cuda")
    want = torch.einsum("b,btp,btd->pd", factors.double(), g.double(), x.double())
    mass = torch.einsum("b,btp,btd->pd", factors.double(), g.double().abs(), x.double().abs())
    got = []
    for _ in range(2):
        got.append(torch.full((outputs, inputs), float("nan"), device="cuda"))
        weighted_grad(x, g, factors, got[-1], fresh=True)
    assert torch.equal(*got)
    assert ((got[0].double() - want).abs() <= (rows + size + 8) * 2.0**-24 * mass).all()
    weighted_grad(x, g, factors, got[1], fresh=False)
    assert ((got[1].double() - 2 * want).abs() <= (rows + size + 8) * 2.0**-23 * mass).all()
    assert norms.weighted_grad_path(x, g) == ("torch" if dtype is torch.float32 else "triton")


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize(
    ("size", "tokens", "rows", "width", "vocabulary"),
    [(1, 1, 1, 1, 1), (3, 129, 65, 70, 33), (4, 512, 512, 768, 50257)],
)
def test_tied_cross_terms_are_those_of_float64_every_time(size, tokens, rows, width, vocabulary, dtypes):
    ids = torch.randint(0, vocabulary, (size, tokens), device="cuda")
    e = torch.randn(size, tokens, width, device="cuda").to(dtypes[0])
    h = torch.randn(size, rows, width, device="cuda").to(dtypes[1])
    g = torch.randn(size, rows, vocabulary, device="cuda").to(dtypes[1])

    def exact(e, h, g):
        picked = g.gather(2, ids[:, None, :].expand(-1, rows, -1)).double()
        return (picked * (h.double() @ e.double().mT)).sum((1, 2))

    got = [tied_cross(ids, e, h, g) for _ in range(2)]
    assert torch.equal(*got)
    bound = (width + 16) * 2.0**-24 * exact(e.abs(), h.abs(), g.abs())
    assert bool(((got[0].double() - exact(e, h, g)).abs() <= bound).all())
    assert norms.tied_cross_path(e, h, g) == "triton"


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "rows", "width"), [(1, 1, 1), (3, 129, 65), (8, 1024, 768), (2, 300, 8192)])
def test_norm_layers_gradients_are_those_of_float64_every_time(size, rows, width, dtype, centred):
    x, g = (torch.randn(size, rows, width, device="cuda").to(dtype) for _ in range(2))
    mean = 0.3 * torch.randn(size, rows, device="cuda") if centred else None
    rstd, weight = 0.5 + torch.rand(size, rows, device="cuda"), torch.randn(width, device="cuda")
    got = [norm_backward(x, g, mean_BT=mean, rstd_BT=rstd, weight_D=weight) for _ in range(2)]
    want = exact_norm_backward(x, g, mean, rstd, weight)
    for first, second, exact in zip(*got, want, strict=True):
        if exact is None:
            assert first is second is None
            continue
        assert torch.equal(first, second)
        # Errors are of the sums' sizes; the input's gradient is rounded to its dtype.
        eps = torch.finfo(first.dtype).eps if first.dtype is not torch.float32 else 0.0
        error = (first.double() - exact).abs().max() / exact.abs().max()
        assert float(error) <= eps + (rows + width) ** 0.5 * 8 * 2.0**-24
    assert norm_layer_path(x, width=width) == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_a_norm_layer_s_clipped_sum_is_that_of_the_host(layer, dtype):
    model = torch.nn.Sequential(torch.nn.Linear(96, 96), layer(96)).to(dtype)
    inputs = torch.randn(5, 70, 96).to(dtype)
    sums = {}
    for device in ("cpu", "cuda"):
        model = model.to(device)
        accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
        accumulator.add(lambda d=device, m=model: m(inputs.to(d)).float().sin().sum((1, 2)), batch_size=5)
        sums[device] = {name: total.cpu() for name, total in accumulator.sums.items()}
    for name, total in sums["cpu"].items():
        allowed = (
            1e-5 if dtype is torch.float32 else 0.05
        )  # the two devices round a bfloat16 forward pass differently
        torch.testing.assert_close(sums["cuda"][name], total, rtol=0, atol=allowed)


def test_deterministic_algorithms_give_the_same_clipped_sums_every_time(monkeypatch):
    """The kernels need no switch; torch's additions by index, in the sum of a table's look-ups, do."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for then
    table, head = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50, bias=False)
    head.weight = table.weight
    model = torch.nn.Sequential(table, torch.nn.LayerNorm(32), head).cuda()
    ids, sums = torch.randint(0, 5, (8, 200), device="cuda"), []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
            accumulator.add(lambda: model(ids).sin().mean((1, 2)), batch_size=8)
            sums.append(list(accumulator.sums.values()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for again in sums[1:] for a, b in zip(sums[0], again, strict=True))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("size", [1, 4101, 1_000_003])
def test_the_noise_in_the_update_is_that_of_the_host_and_the_update_adamw_s(name, size):
    parameter = torch.nn.Parameter(torch.randn(size, device="cuda"))
    plain = torch.nn.Parameter(parameter.detach().cpu().double())
    settings = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}
    fused, reference = NoisyAdamW([parameter], **settings), torch.optim.AdamW([plain], **settings)
    for step in range(3):
        sums = torch.randn(size, device="cuda")
        fused.stage({parameter: sums}, generator_of(name), stddev=0.7, divisor=16.0, step=step)
        fused.step()
        noisy = generator_of(name).add_normal_(sums.cpu(), stddev=0.7, step=step, stream=0)
        plain.grad = noisy.double() / 16.0
        reference.step()
    torch.testing.assert_close(parameter.detach().cpu().double(), plain.detach(), rtol=1e-5, atol=1e-5)
    for key, value in reference.state[plain].items():
        torch.testing.assert_close(
            fused.state[parameter][key].cpu().double(), value.double(), rtol=1e-5, atol=1e-5
        )
