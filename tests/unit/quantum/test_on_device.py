"""Releases that stay on a device: the numbers of the host's, the same checks, and who takes that way."""

import numpy as np
import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import TestKey
from dp_flash_attention.noise import discrete_gaussian as noise_module
from dp_flash_attention.noise.kernels import exact_writer
from dp_flash_attention.quantum import PostQuantumGaussian, on_device, post_quantum_gaussian
from dp_flash_attention.quantum.on_device import projected_on_device, stays_on_device

ONE = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)


class Launches(list):
    """What the kernel was launched for. While ``active``, CPU tensors are taken for CUDA tensors."""

    active = True


@pytest.fixture
def on_kernel(monkeypatch):
    launches = Launches()
    launch = exact_writer._launch

    def runs_on_kernel(out):
        return isinstance(out, torch.Tensor) and launches.active

    def counted(out, *arguments):
        launches.append(out.numel())
        launch(out, *arguments)

    monkeypatch.setattr(noise_module, "runs_on_kernel", runs_on_kernel)
    monkeypatch.setattr(on_device, "runs_on_kernel", runs_on_kernel)
    monkeypatch.setattr(exact_writer, "_launch", counted)
    # Its own tests run the check; here it would cost a tile of layers.
    monkeypatch.setattr(exact_writer, "disagreement", lambda *args: None)
    return launches


def mechanism(**settings):
    return PostQuantumGaussian(key=TestKey("on device"), cipher="chacha20", **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("clip", [None, 0.75])
def test_the_release_is_the_host_s_number_for_number(dtype, clip, on_kernel):
    value = (torch.arange(-20, 20).reshape(8, 5) * 3.3).to(dtype)
    device = mechanism(l2_clip_norm=clip, grid=2.0**-3).release(value, ONE, BUDGET)
    assert on_kernel == [40]
    on_kernel.active = False
    host = mechanism(l2_clip_norm=clip, grid=2.0**-3).release(value.numpy(), ONE, BUDGET)
    assert on_kernel == [40]
    assert device.value.dtype is dtype
    assert device.value.shape == value.shape
    np.testing.assert_array_equal(device.value.numpy(), host.value)
    assert device.delta == host.delta
    assert device.noise_stddev == host.noise_stddev


def test_strides_and_a_coarse_grid_change_nothing(on_kernel):
    value = torch.arange(60.0).reshape(6, 10).T
    device = mechanism(grid=2.0**-3).release(value, ONE, BUDGET).value
    on_kernel.active = False
    host = mechanism(grid=2.0**-3).release(value.numpy(), ONE, BUDGET).value
    np.testing.assert_array_equal(device.numpy(), host)


def test_wide_noise_has_the_host_s_integers(on_kernel):
    """The kernel makes layers, so the host makes layers for the kernel's cipher, and charges their certificate."""
    device = mechanism(grid=2.0**-14).release(torch.zeros(50), ONE, BUDGET)
    on_kernel.active = False
    host = mechanism(grid=2.0**-14).release(np.zeros(50, dtype=np.float32), ONE, BUDGET)
    assert on_kernel == [50]
    np.testing.assert_array_equal(device.value.numpy(), host.value)
    assert device.noise_stddev == host.noise_stddev
    assert device.delta == host.delta
    assert device.value.std().item() / device.noise_stddev == pytest.approx(1.0, abs=0.5)


def test_another_sampler_on_the_host_would_be_noticed(on_kernel, monkeypatch):
    device = mechanism(grid=2.0**-14).release(torch.zeros(50), ONE, BUDGET)
    on_kernel.active = False
    monkeypatch.setattr(post_quantum_gaussian, "makes_layers", lambda cipher: False)
    host = mechanism(grid=2.0**-14).release(np.zeros(50, dtype=np.float32), ONE, BUDGET)
    assert not np.array_equal(device.value.numpy(), host.value)


def test_two_releases_differ(on_kernel):
    one = mechanism(grid=2.0**-3)
    value = torch.zeros(40)
    assert not torch.equal(one.release(value, ONE, BUDGET).value, one.release(value, ONE, BUDGET).value)
    assert not value.any()


@pytest.mark.parametrize(
    "value",
    [
        torch.empty(0),
        torch.ones(3, requires_grad=True),
        torch.ones(3).to_sparse(),
    ],
)
def test_what_cannot_be_released_is_refused_and_nothing_is_drawn(value, on_kernel):
    with pytest.raises(InvalidInputError, match="value"):
        mechanism().release(value, ONE, BUDGET)
    assert on_kernel == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("clip", [None, 0.75])
def test_whatever_the_value_holds_is_released_as_on_the_host(dtype, clip, on_kernel):
    """An error, or another treatment than the host's, would be something to see."""
    broken = [0.0, float("nan"), float("inf"), -float("inf"), 1e30, -1e300, 1.5]
    value = (
        torch.tensor([0, 2**62, -(2**62), 2**53 + 1, 7])
        if dtype is torch.int64
        else torch.tensor(broken, dtype=dtype)
    )
    device = mechanism(l2_clip_norm=clip, grid=2.0**-6).release(value, ONE, BUDGET)
    on_kernel.active = False
    host = mechanism(l2_clip_norm=clip, grid=2.0**-6).release(value.numpy(), ONE, BUDGET)
    np.testing.assert_array_equal(device.value.numpy(), host.value)


def test_clipping_is_the_projection():
    value = torch.tensor([3.0, 4.0])
    assert projected_on_device(value, 1.0).tolist() == pytest.approx([0.6, 0.8])
    assert projected_on_device(value, 5.0).tolist() == [3.0, 4.0]


def test_only_native_tensors_and_a_cipher_with_a_kernel_stay(on_kernel):
    assert stays_on_device(torch.ones(3), "chacha20")
    assert not stays_on_device(torch.ones(3), "aes-256-ctr")
    assert not stays_on_device(torch.ones(3), "shake256")
    assert not stays_on_device(torch.ones(3, dtype=torch.bfloat16), "chacha20")
    assert not stays_on_device(np.ones(3), "chacha20")
    on_kernel.active = False
    assert not stays_on_device(torch.ones(3), "chacha20")
