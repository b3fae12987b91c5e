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
from dp_flash_attention.clipping import norms
from dp_flash_attention.clipping.kernels import embedding_norm, gram_norm, outer_norm
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
