"""Autograd through the kernels: gradients of the exact part, and a graph that keeps nothing exact."""

import dataclasses

import pytest
import torch

from dp_flash_attention.attention import AttentionBounds, CallNoise, dp_flash_attention
from dp_flash_attention.attention.backends import registry
from dp_flash_attention.attention.kernels import differentiable
from dp_flash_attention.attention.kernels.backend import TritonBackend
from dp_flash_attention.attention.kernels.differentiable import differentiable_attention
from dp_flash_attention.attention.kernels.launch_backward import attention_backward
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey

BACKEND = TritonBackend()


def needing(call, *names):
    return dataclasses.replace(
        call, **{name: getattr(call, name).clone().requires_grad_(True) for name in names}
    )


def test_the_gradient_is_that_of_the_exact_part_whatever_the_noise(make_call):
    noisy = needing(make_call(queries=5, rows=9, heads=2, null_rows=0.5, hides=True), "query", "key", "value")
    grad = torch.randn(1, 2, 5, 16)
    inputs = (noisy.query, noisy.key, noisy.value)
    output = BACKEND.release(noisy)
    assert not torch.equal(output, BACKEND.release(dataclasses.replace(noisy, noise=None, stddev=None)))
    found = torch.autograd.grad(output, inputs, grad)
    want = attention_backward(dataclasses.replace(noisy, noise=None, stddev=None), grad)
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


def test_the_output_is_the_same_bytes_with_and_without_a_graph(make_call):
    call = make_call(queries=5, rows=9)
    output = BACKEND.release(needing(call, "key"))
    assert output.requires_grad
    assert torch.equal(output, BACKEND.release(call))
    with torch.no_grad():
        assert not BACKEND.release(needing(call, "key")).requires_grad


def test_the_graph_keeps_the_inputs_and_nothing_that_was_computed_from_them(make_call):
    call = needing(make_call(queries=5, rows=9, hides=True), "query", "key", "value")
    node = differentiable_attention(call).grad_fn
    kept = {each.data_ptr() for each in node.saved_tensors}
    assert kept == {each.data_ptr() for each in (call.query, call.key, call.value, call.hidden)}
    extra = [value for value in vars(node).values() if isinstance(value, torch.Tensor)]
    assert extra == []
    assert {field.numel() for field in vars(node.call).values() if isinstance(field, torch.Tensor)} == {0}
    assert node.call.noise is None  # nor the key


@pytest.mark.parametrize(
    ("name", "asked"), [("query", (True, False)), ("key", (False, True)), ("value", (False, True))]
)
def test_only_the_gradients_that_are_needed_are_asked_for(name, asked, make_call, monkeypatch):
    found = []

    def recorded(call, grad, *, needs_query, needs_rows):
        found.append((needs_query, needs_rows))
        return attention_backward(call, grad, needs_query=needs_query, needs_rows=needs_rows)

    monkeypatch.setattr(differentiable, "attention_backward", recorded)
    call = needing(make_call(queries=3, rows=5, noise=None), name)
    BACKEND.release(call).sum().backward()
    assert found == [asked]
    assert [getattr(call, each).grad is not None for each in ("query", "key", "value")].count(True) == 1


def test_a_second_derivative_is_refused_and_not_dropped(make_call):
    call = needing(make_call(queries=3, rows=5, noise=None), "query")
    output = BACKEND.release(call)
    with pytest.raises(InvalidInputError, match="create_graph"):
        torch.autograd.grad(output.sum(), call.query, create_graph=True)


def test_an_input_that_was_written_over_is_seen(make_call):
    call = needing(make_call(queries=3, rows=5, noise=None), "query")
    output = BACKEND.release(call)
    call.value.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_the_call_has_the_same_gradients_on_every_back_end(monkeypatch):
    monkeypatch.setattr(registry, "_triton", TritonBackend)
    bounds = AttentionBounds(query_norm=2.0, key_norm=2.0, value_norm=1.5, num_rows=12, null_rows=1.0)
    rows = [torch.randn(1, heads, 12, 16) for heads in (2, 1, 1)]
    weights = torch.randn(1, 2, 12, 16)
    found = {}
    for backend in ("triton", "math", "flash"):
        inputs = [each.clone().requires_grad_(True) for each in rows]
        noise = CallNoise(TestKey("gradients"), cipher="chacha20")
        output, release = dp_flash_attention(
            *inputs, bounds=bounds, noise=noise, mu=1.0, backend=backend, is_causal=True, enable_gqa=True
        )
        assert release.backend == backend
        found[backend] = torch.autograd.grad((output * weights).sum(), inputs)
    for other in ("math", "flash"):
        for one, same in zip(found["triton"], found[other], strict=True):
            # Both are float32: their errors add up (test_backward.tolerance, test_backends).
            assert float((one - same).norm()) <= 1e-5 * float(same.norm())
