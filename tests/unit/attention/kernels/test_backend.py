"""What the back end takes, what it refuses and why, and that a release goes through the kernel."""

import dataclasses
import sys

import pytest
import torch
import triton

from dp_flash_attention.attention.interface import AttentionCall, NoiseStream, Rounding, RowNorms
from dp_flash_attention.attention.kernels import backend as backend_module
from dp_flash_attention.attention.kernels import launch, selfcheck
from dp_flash_attention.attention.kernels.backend import TritonBackend, make_backend
from dp_flash_attention.attention.reference import reference_attention, reference_noise
from dp_flash_attention.core.errors import DependencyMissingError, NoiseReuseError
from dp_flash_attention.noise import SecureNormalGenerator, TestKey

KEY = TestKey("triton back end")
BACKEND = TritonBackend()


def make_call(*, width=16, value_width=16, dtype=torch.float32, cipher="chacha20", name="secure", **changes):
    generator = SecureNormalGenerator(KEY, cipher=cipher)
    call = AttentionCall(
        query=torch.randn(1, 1, 3, width).to(dtype),
        key=torch.randn(1, 1, 5, width).to(dtype),
        value=torch.randn(1, 1, 5, value_width).to(dtype),
        norms=RowNorms(query=1.0, key=1.0, value=1.0),
        scale=2.0,
        score_bound=2.0,
        causal=False,
        hidden=None,
        null_rows=1.0,
        stddev=torch.full((1, 1, 3), 0.5),
        noise=NoiseStream(key=KEY, name=name, cipher=cipher, call_id=3, generator=generator),
        out_dtype=torch.float32,
    )
    return dataclasses.replace(call, **changes)


def test_it_promises_the_narrower_model_and_hence_both():
    assert BACKEND.name == "triton"
    assert set(BACKEND.roundings) == {Rounding.FIXED_SHIFT, Rounding.RUNNING_MAX}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_release_is_the_exact_part_and_the_noise(dtype):
    call = make_call(dtype=dtype)
    assert BACKEND.refusal(call, needs_grad=False) is None
    got = BACKEND.release(call)
    want = reference_attention(call) + reference_noise(call)
    # See test_forward.tolerance, with S = 2.
    assert (got - want).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.0025}[
        dtype
    ]
    assert got.is_contiguous()
    assert torch.equal(got, BACKEND.release(call))  # the same bytes for the same key and call


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"width": 257}, "wider than 256"),
        ({"value_width": 24}, "whole tiles of noise"),
        ({"value_width": 8}, "whole tiles of noise"),
        ({"cipher": "aes-256-ctr"}, "needs 'chacha20'"),
        ({"score_bound": 20.5}, "score bound"),
        ({"norms": RowNorms(query=1.0, key=1.0, value=2.0**-41)}, "row bound"),
        ({"norms": RowNorms(query=2.0**41, key=1.0, value=1.0)}, "row bound"),
    ],
)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_what_it_refuses_and_why(changes, needs_grad, reason):
    assert reason in BACKEND.refusal(make_call(**changes), needs_grad=needs_grad)


def test_fast_noise_has_no_cipher_to_refuse():
    assert BACKEND.refusal(make_call(name="fast", cipher="aes-256-ctr"), needs_grad=False) is None


def test_without_the_interpreter_it_needs_a_cuda_device_that_is_new_enough(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "CUDA device" in BACKEND.refusal(make_call(), needs_grad=False)

    class OnDevice:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in backend_module._refused_device(OnDevice())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend_module._refused_device(OnDevice()) is None


def test_it_is_not_made_without_triton_nor_with_the_interpreter(monkeypatch):
    with pytest.raises(DependencyMissingError, match="interpreter"):
        make_backend()
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert make_backend().name == "triton"
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(DependencyMissingError, match=r"dp-flash-attention\[kernels\]"):
        make_backend()


def test_a_captured_graph_is_refused_before_anything_runs(monkeypatch):
    def capturing(out):
        raise NoiseReuseError("capturing")

    monkeypatch.setattr(launch, "refuse_graph_capture", capturing)
    monkeypatch.setattr(launch, "dp_attention_fwd_kernel", None)
    with pytest.raises(NoiseReuseError):
        BACKEND.release(make_call())


def test_gradients_are_checked_on_the_device_only_where_they_are_needed(monkeypatch):
    monkeypatch.setattr(
        selfcheck, "gradient_disagreement", lambda *args: "its gradient misses the reference by 1"
    )
    assert BACKEND.refusal(make_call(), needs_grad=False) is None
    assert BACKEND.refusal(make_call(), needs_grad=True) == "its gradient misses the reference by 1"
    monkeypatch.undo()
    assert BACKEND.refusal(make_call(), needs_grad=True) is None


def test_ranges_of_rows_are_checked_on_the_device_only_where_they_are_used(monkeypatch):
    monkeypatch.setattr(selfcheck, "split_disagreement", lambda *args: "it misses the reference by 1")
    many = torch.zeros(1, 1, 1025, 16)
    for rows, reason in ((many[:, :, :1024], None), (many, "it misses the reference by 1")):
        assert BACKEND.refusal(make_call(key=rows, value=rows), needs_grad=False) == reason
