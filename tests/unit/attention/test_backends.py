"""Back ends: a kernel that is wrong is refused, a fake flash-attn gets what the real one takes, choice by time."""

import math
import sys
import types

import pytest
import torch

from dp_flash_attention.attention import AttentionBounds, CallNoise, available_backends, dp_flash_attention
from dp_flash_attention.attention.backends import flex, get_backend, registry
from dp_flash_attention.attention.backends.flash_attn_package import FlashAttnPackage
from dp_flash_attention.attention.backends.selfcheck import disagreement
from dp_flash_attention.attention.backends.torch_kernels import CpuFlash, MathKernel
from dp_flash_attention.core.errors import DependencyMissingError, InvalidInputError
from dp_flash_attention.noise import TestKey

ALL = [(g, c, h) for g in (False, True) for c in (False, True) for h in (False, True)]


@pytest.mark.parametrize("kernel", [CpuFlash(), MathKernel()], ids=["flash", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kernels_agree_with_the_reference(kernel, dtype):
    for grouped, causal, hides in ALL:
        assert disagreement(kernel, "cpu", dtype, grouped=grouped, causal=causal, hides=hides) is None


class Broken(MathKernel):
    def __init__(self, mistake):
        self.mistake = mistake

    def forward(self, q, k, v, *, scale, causal, bias):
        if self.mistake == "scale":
            scale = scale * 1.02
        if self.mistake == "mask":
            bias = None
        if self.mistake == "diagonal":
            causal = False
        if self.mistake == "heads":
            k = k.flip(1)
        out, lse = super().forward(q, k, v, scale=scale, causal=causal, bias=bias)
        if self.mistake == "base":
            lse = lse / math.log(2.0)
        if self.mistake == "nan":
            out = out * math.nan
        return out, lse


@pytest.mark.parametrize("mistake", ["scale", "mask", "diagonal", "heads", "base", "nan"])
def test_a_kernel_that_computes_something_else_is_refused(mistake, monkeypatch):
    assert any(
        disagreement(Broken(mistake), "cpu", torch.float32, grouped=grouped, causal=causal, hides=hides)
        for grouped, causal, hides in ALL
    )
    if mistake == "base":
        monkeypatch.setitem(registry._KERNELS, "flash", (Broken(mistake),))
        rows = torch.ones(1, 1, 4, 8)
        bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=4)
        with pytest.raises(InvalidInputError, match="misses the reference"):
            dp_flash_attention(rows, rows, rows, bounds=bounds, noise=CallNoise(TestKey(1)), mu=1.0)


def test_the_flash_attn_package_is_called_in_its_layout(monkeypatch):
    with pytest.raises(DependencyMissingError, match="flash-attn"):
        get_backend("flash_attn", torch.device("cuda"))
    calls = []

    def flash_attn_func(q, k, v, *, softmax_scale, causal, return_attn_probs):
        calls.append((tuple(q.shape), tuple(k.shape)))
        out, lse = MathKernel().forward(
            *(rows.transpose(1, 2) for rows in (q, k, v)), scale=softmax_scale, causal=causal, bias=None
        )
        return out.transpose(1, 2), lse, None

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    for grouped in (False, True):
        for causal in (False, True):
            found = disagreement(
                FlashAttnPackage(), "cpu", torch.bfloat16, grouped=grouped, causal=causal, hides=False
            )
            assert found is None
    assert ((2, 160, 4, 16), (2, 160, 2, 16)) in calls


def test_the_fastest_taker_is_chosen_and_names_are_kept(monkeypatch):
    timed = {"flash": 2.0, "math": 1.0}
    monkeypatch.setattr(registry, "measured_seconds", lambda name, shape: timed[name])
    monkeypatch.setattr(registry, "_AUTOMATIC", ("flash", "math"))
    rows = torch.randn(1, 1, 4, 8)
    bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=4)

    def chosen(backend="auto"):
        call = {"bounds": bounds, "noise": CallNoise(TestKey(1)), "mu": 1.0, "backend": backend}
        return dp_flash_attention(rows, rows, rows, **call)[1].backend

    assert chosen() == "math"
    timed["math"] = 3.0
    assert chosen() == "flash"
    assert chosen("math") == "math"


def test_time_is_measured_on_made_up_rows_and_remembered():
    shape = registry.CallShape(
        device="cpu", dtype=torch.float32, query=(1, 2, 8, 4), key=(1, 1, 8, 4), value_width=4, causal=True,
        hides=True, null_rows=True,
    )  # fmt: skip
    first = registry.measured_seconds("flash", shape)
    assert first > 0.0
    assert registry.measured_seconds("flash", shape) == first


def test_a_call_that_needs_gradients_is_timed_with_its_backward_pass(monkeypatch):
    monkeypatch.setattr(registry, "_AUTOMATIC", ("flash", "math"))
    shapes, ran = [], []
    measured, grad = registry.measured_seconds, torch.autograd.grad
    monkeypatch.setattr(
        registry, "measured_seconds", lambda name, shape: shapes.append(shape) or measured(name, shape)
    )
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: ran.append(1) or grad(*args))
    bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=5)
    for needs_grad in (False, True):
        rows = torch.randn(1, 1, 5, 7, requires_grad=needs_grad)
        dp_flash_attention(rows, rows, rows, bounds=bounds, noise=CallNoise(TestKey(1)), mu=1.0)
        assert [shape.needs_grad for shape in shapes] == [needs_grad] * 2
        assert len(ran) == (8 if needs_grad else 0)  # two back ends, once to warm up and three times
        shapes.clear()


def test_names_on_this_machine():
    found = available_backends("cpu")
    assert {"flash", "math"} <= set(found)
    assert "cudnn" not in found
    with pytest.raises(InvalidInputError, match="runs on cuda"):
        get_backend("efficient", torch.device("cpu"))


def test_a_fixed_shift_is_not_promised_by_kernels_with_a_running_maximum():
    rows = torch.randn(1, 1, 4, 8)
    bounds = AttentionBounds(
        query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=4, rounding=registry.Rounding.FIXED_SHIFT
    )
    with pytest.raises(InvalidInputError, match="fixed_shift"):
        dp_flash_attention(
            rows, rows, rows, bounds=bounds, noise=CallNoise(TestKey(1)), mu=1.0, backend="flash"
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gets_its_masks_and_gives_its_log_sum_exp(monkeypatch):
    """Not compiled: torch compiles it for GPUs only, where the self-check runs before the first use."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    for grouped, causal, hides in ALL:
        found = disagreement(
            flex.FlexKernel(), "cpu", torch.float32, grouped=grouped, causal=causal, hides=hides
        )
        assert found is None
    assert "flex" not in available_backends("cpu")


def test_a_back_end_that_is_not_installed_raises_by_name(monkeypatch):
    registry._load_triton.cache_clear()
    monkeypatch.setattr(
        "dp_flash_attention.attention.backends.registry.importlib.import_module",
        lambda name: (_ for _ in ()).throw(ImportError("no triton")),
    )
    rows = torch.randn(1, 1, 4, 8)
    bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=4)
    assert "triton" not in available_backends()
    with pytest.raises(DependencyMissingError, match="triton"):
        dp_flash_attention(
            rows, rows, rows, bounds=bounds, noise=CallNoise(TestKey(1)), mu=1.0, backend="triton"
        )
    registry._load_triton.cache_clear()
