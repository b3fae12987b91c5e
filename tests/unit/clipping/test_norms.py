"""Both forms of the norm against the definition, for shapes around the tile's edges, and where they cancel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dp_flash_attention.clipping import norms


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def expected_sq_norms(x: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("btp,btd->bpd", g.double(), x.double()).square().sum((1, 2))


@pytest.mark.parametrize("num_rows", [0, 1, 2, 63, 64, 65, 129])
@pytest.mark.parametrize("form", [norms.gram_sq_norms, norms.outer_sq_norms, norms.linear_sq_norms])
def test_every_form_is_the_definition(form, num_rows: int) -> None:
    x, g = drawn(3, num_rows, 5), drawn(3, num_rows, 7)
    torch.testing.assert_close(form(x, g), expected_sq_norms(x, g), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scratch_bytes", [1, 400, 10**6])
def test_the_size_of_the_scratch_does_not_matter(scratch_bytes: int) -> None:
    x, g = drawn(3, 40, 5), drawn(3, 40, 7)
    for form in (norms.outer_sq_norms, norms.linear_sq_norms):
        torch.testing.assert_close(form(x, g, scratch_bytes=scratch_bytes), expected_sq_norms(x, g))


def test_two_uses_of_one_weight_may_have_different_lengths() -> None:
    x, g, y, h = drawn(3, 70, 5), drawn(3, 70, 7), drawn(3, 9, 5), drawn(3, 9, 7)
    first, second = torch.einsum("btp,btd->bpd", g, x), torch.einsum("btp,btd->bpd", h, y)
    torch.testing.assert_close(norms.gram_cross(x, g, y, h), (first * second).sum((1, 2)))


def test_half_precision_is_widened_before_any_product() -> None:
    # 300² does not fit into float16 and 1 + 2⁻⁹ is lost in bfloat16's products.
    x, g = (
        torch.full((2, 4, 3), 300.0, dtype=torch.float16),
        torch.full((2, 4, 5), 300.0, dtype=torch.float16),
    )
    got = norms.linear_sq_norms(x, g)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected_sq_norms(x, g), rtol=1e-6, atol=0.0)


def test_no_examples_have_no_norms() -> None:
    assert norms.linear_sq_norms(drawn(0, 4, 3), drawn(0, 4, 5)).shape == (0,)


def test_the_form_follows_the_cheaper_count() -> None:
    assert norms.gram_is_cheaper(16, 768, 768)
    assert not norms.gram_is_cheaper(4096, 768, 768)


@pytest.mark.parametrize("spread", [1e-3, 1e-4])
def test_rows_that_cancel_keep_their_norm(spread: float) -> None:
    """An example must not slip through clipping because its rows cancel in the gram form's sum."""
    base, signs = torch.randn(1, 1, 64), torch.tensor([1.0, -1.0]).repeat(8)[None, :, None]
    x, g = base + spread * torch.randn(4, 16, 64), 1e5 * signs * torch.randn(4, 1, 64)
    exact = expected_sq_norms(x, g).sqrt()
    mixed_x, mixed_g = torch.cat([x, torch.randn(2, 16, 64)]), torch.cat([g, torch.randn(2, 16, 64)])
    got = norms.gram_sq_norms(mixed_x, mixed_g).double().sqrt()
    torch.testing.assert_close(got[:4], exact, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(got[4:], expected_sq_norms(mixed_x, mixed_g)[4:].sqrt(), rtol=1e-5, atol=0.0)


def test_ordinary_rows_are_not_taken_for_cancelled() -> None:
    x, g = drawn(4, 700, 30), drawn(4, 700, 30)
    mass = (x.norm(dim=2) * g.norm(dim=2)).sum(1)
    assert len(norms.cancelled_examples(expected_sq_norms(x, g), mass, num_rows=700)) == 0
    assert norms.cancelled_examples(torch.tensor([0.0, 1.0]), torch.ones(2), num_rows=1).tolist() == [0]
