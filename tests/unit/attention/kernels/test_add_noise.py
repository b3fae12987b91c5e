"""Noise added by one kernel for all heads, against the CPU generators; and which path runs."""

import pytest
import torch

from dp_flash_attention.attention import noising
from dp_flash_attention.attention.calls import CallNoise
from dp_flash_attention.attention.kernels import add_noise as module
from dp_flash_attention.attention.kernels.launch import kernel_key
from dp_flash_attention.attention.noising import add_noise, add_noise_into, noise_path
from dp_flash_attention.noise import TestKey

CLOSE = {"rtol": 2e-6, "atol": 2.0**-21}


def stream(name="secure", cipher="chacha20", call=0):
    return CallNoise(TestKey("add noise"), name=name, cipher=cipher, first_call=call).claim()


@pytest.fixture
def on_kernel(monkeypatch):
    """Takes CPU tensors for CUDA tensors; counts the kernel's runs."""
    ran = []
    original = module.add_noise_on_device
    monkeypatch.setattr(noising, "runs_on_kernel", lambda out: True)
    monkeypatch.setattr(
        module, "add_noise_on_device", lambda *args, **kwargs: ran.append(1) or original(*args, **kwargs)
    )
    return ran


def by_host(exact, stddev, noise, out_dtype=torch.float32):
    out = torch.full(exact.shape, float("nan"), dtype=out_dtype)
    add_noise_into(out, exact, stddev, noise)
    return out


@pytest.mark.parametrize("name", ["secure", "fast"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 33, 24), (2, 1, 9, 1000), (1, 1, 129, 64)])
def test_every_number_is_that_of_the_cpu_path(shape, name, monkeypatch):
    exact, stddev, noise = torch.randn(shape), torch.rand(shape[:3]) + 0.1, stream(name)
    want = by_host(exact, stddev, noise)
    got = torch.full(shape, float("nan"))
    module.add_noise_on_device(got, exact, stddev, kernel_key(noise))
    torch.testing.assert_close(got, want, **CLOSE)
    # Planted: another call's noise, and a row too large.
    for other, scale in ((stream(name, call=1), 1.0), (noise, 1.001)):
        module.add_noise_on_device(got, exact, scale * stddev, kernel_key(other))
        assert not torch.allclose(got, want, **CLOSE)


def test_a_slice_of_heads_gets_its_own_streams_and_leaves_the_rest_alone():
    exact, stddev, noise = torch.randn(2, 3, 5, 24), torch.rand(2, 3, 1).expand(2, 3, 5) + 0.1, stream()
    want = by_host(exact, stddev, noise)
    got = torch.full(exact.shape, float("nan"))
    module.add_noise_on_device(got, exact[1:, 1:], stddev, kernel_key(noise), entry=1, head=1)
    torch.testing.assert_close(got[1:, 1:], want[1:, 1:], **CLOSE)
    assert torch.isnan(got[0]).all()
    assert torch.isnan(got[1, 0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_is_rounded_after_the_noise(dtype):
    exact, stddev, noise = torch.randn(1, 1, 40, 64), torch.ones(1, 1, 40), stream("fast")
    whole, narrow = torch.empty(exact.shape), torch.empty(exact.shape, dtype=dtype)
    module.add_noise_on_device(whole, exact, stddev, kernel_key(noise))
    module.add_noise_on_device(narrow, exact.mT.contiguous().mT, stddev, kernel_key(noise))
    assert torch.equal(narrow, whole.to(dtype))


def test_in_place_and_with_a_gradient(on_kernel):
    exact, stddev, noise = torch.randn(1, 2, 3, 16), torch.ones(1, 2, 3), stream("fast")
    leaf = exact.clone().requires_grad_(True)
    with_gradient = add_noise(leaf, stddev, noise, torch.float32)
    with_gradient.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    own = exact.clone()
    add_noise_into(own, own, stddev, noise)
    torch.testing.assert_close(own, with_gradient.detach(), **CLOSE)
    assert len(on_kernel) == 2


def test_which_path_runs(on_kernel, monkeypatch):
    out = torch.zeros(1, 1, 2, 16)
    assert noise_path(out, stream()) == "triton"
    assert noise_path(out, stream("fast", cipher="aes-256-ctr")) == "triton"
    assert noise_path(out, stream(cipher="aes-256-ctr")) == "host"
    add_noise_into(out, out, torch.ones(1, 1, 2), stream(cipher="aes-256-ctr"))
    assert on_kernel == []
    monkeypatch.setattr(noising, "has_triton", lambda: False)
    assert noise_path(out, stream()) == "host"
    monkeypatch.undo()
    assert noise_path(out, stream()) == "host"  # the CPU


def test_an_empty_slice_needs_no_launch():
    out = torch.zeros(1, 1, 0, 16)
    module.add_noise_on_device(out, out, torch.ones(1, 1, 0), kernel_key(stream()))
