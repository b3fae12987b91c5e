"""What lands in an element does not depend on how it got there."""

from __future__ import annotations

import os

import pytest
import torch

from dp_flash_attention.noise import SecureNormalGenerator, TestKey
from dp_flash_attention.noise.writer import CHUNK_NUMBERS

LENGTH = 2 * CHUNK_NUMBERS + 17


@pytest.fixture
def generator() -> SecureNormalGenerator:
    return SecureNormalGenerator(TestKey("writer"))


def test_a_longer_tensor_begins_like_a_shorter_one_across_chunks(generator: SecureNormalGenerator) -> None:
    whole = generator.fill_normal_(torch.empty(LENGTH), step=3, stream=1)
    for length in (1, CHUNK_NUMBERS - 1, CHUNK_NUMBERS, CHUNK_NUMBERS + 1):
        part = generator.fill_normal_(torch.empty(length), step=3, stream=1)
        assert torch.equal(part, whole[:length])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strides_and_threads_do_not_matter(generator: SecureNormalGenerator, dtype: torch.dtype) -> None:
    plain = generator.fill_normal_(torch.empty(LENGTH // 3, 3, dtype=dtype), step=0, stream=0)
    strided = generator.fill_normal_(torch.empty(3, LENGTH // 3, dtype=dtype).T, step=0, stream=0)
    assert torch.equal(plain, strided)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(plain, generator.fill_normal_(torch.empty_like(plain), step=0, stream=0))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adding_adds_what_filling_writes(generator: SecureNormalGenerator, dtype: torch.dtype) -> None:
    noise = generator.fill_normal_(torch.empty(LENGTH, dtype=dtype), stddev=0.3, step=5, stream=2)
    total = torch.linspace(-1, 1, LENGTH, dtype=dtype)
    expected = total + noise
    assert generator.add_normal_(total, stddev=0.3, step=5, stream=2) is total
    assert torch.equal(total, expected)


def test_nothing_is_written_to_nothing(generator: SecureNormalGenerator) -> None:
    assert generator.fill_normal_(torch.empty(0, 4), step=0, stream=0).shape == (0, 4)


def test_autograd_notices_that_a_saved_tensor_was_overwritten(generator: SecureNormalGenerator) -> None:
    leaf = torch.ones(4, requires_grad=True)
    saved = leaf.detach().clone()
    product = (leaf * saved).sum()
    generator.add_normal_(saved, stddev=1.0, step=0, stream=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_helpers_are_not_waited_for_in_another_process(
    generator: SecureNormalGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked child inherits the object without its threads; told by the process id."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = generator.fill_normal_(torch.empty(LENGTH), step=0, stream=0)
        pool = generator._threads._helpers
        monkeypatch.setattr(os, "getpid", lambda: -1)
        assert torch.equal(first, generator.fill_normal_(torch.empty(LENGTH), step=0, stream=0))
        assert generator._threads._helpers is not pool
    finally:
        torch.set_num_threads(before)
