"""Rows: the clip, and what becomes of rows that have no norm."""

import math

import pytest
import torch

from dp_flash_attention.attention import AttentionBounds, CallNoise, DPFlashAttention, dp_flash_attention
from dp_flash_attention.attention.rows import clip_rows, clip_rows_into, has_finite_norm, without_broken_rows
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation
from dp_flash_attention.noise import TestKey

NUM_ROWS, BROKEN = 12, 5
FAULTS = [math.nan, math.inf, -math.inf, 1e30]


def bounds():
    return AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=NUM_ROWS)


def rows(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 3, 8), (2, 2, NUM_ROWS, 8), (2, 2, NUM_ROWS, 8))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def answer(tensors, **settings):
    noise = CallNoise(TestKey("rows"))
    given = {
        "bounds": bounds(),
        "noise": noise,
        "mu": 0.5,
        "enable_gqa": True,
        "backend": "flash",
        **settings,
    }
    return dp_flash_attention(*tensors, **given)


@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_a_broken_row_counts_as_a_row_of_zeros(which, fault, backend):
    """Not as a NaN in every answer, which would say that it is there without any noise."""
    broken, repaired = rows(), rows()
    broken[which][1, 0, BROKEN, 3] = fault
    repaired[1][1, :, BROKEN] = 0.0
    repaired[2][1, :, BROKEN] = 0.0
    found, release = answer(broken, nonfinite_rows="zero", backend=backend)
    assert torch.equal(found, answer(repaired, backend=backend)[0])
    assert not any("refusals" in each for each in release.assumptions)
    assert (
        torch.isnan(broken[which][1, 0, BROKEN, 3]) or broken[which][1, 0, BROKEN, 3] == fault
    )  # not touched


@pytest.mark.parametrize("fault", FAULTS)
def test_neighbours_of_which_one_is_broken_stay_within_the_sensitivity(fault):
    sound, broken = rows(), rows()
    broken[1][0, 1, BROKEN, 0] = fault
    broken[2][0, 0, BROKEN, 7] = fault
    first, release = answer(sound, nonfinite_rows="zero")
    second, _ = answer(broken, nonfinite_rows="zero")
    moved = (first - second).double().norm(dim=-1)  # the same noise in both
    assert float(moved.max()) <= float(release.plan.sensitivity.max())
    assert float(moved.max()) > 0.0


@pytest.mark.parametrize("mistake", ["the key alone", "a product with zero", "one head alone"])
def test_what_zeroes_less_than_a_row_is_noticed(mistake, monkeypatch):
    def wrong(key, value):
        whole = (has_finite_norm(key) & has_finite_norm(value)).all(dim=1, keepdim=True)
        if mistake == "the key alone":
            return torch.where(whole, key, 0.0), value
        if mistake == "a product with zero":
            return key * whole, value * whole
        return torch.where(has_finite_norm(key), key, 0.0), torch.where(has_finite_norm(value), value, 0.0)

    monkeypatch.setattr("dp_flash_attention.attention.functional.without_broken_rows", wrong)
    broken, repaired = rows(), rows()
    broken[2][1, 0, BROKEN, 3] = math.nan
    repaired[1][1, :, BROKEN] = 0.0
    repaired[2][1, :, BROKEN] = 0.0
    assert not torch.equal(answer(broken, nonfinite_rows="zero")[0], answer(repaired)[0])


@pytest.mark.parametrize("fault", FAULTS)
def test_refusing_names_the_tensor_and_the_remedy_and_spends_nothing(fault):
    for which, name in ((1, "key"), (2, "value")):
        broken, noise = rows(), CallNoise(TestKey("spent"))
        broken[which][0, 0, 0, 0] = fault
        with pytest.raises(InvalidInputError, match=f"{name}.*nonfinite_rows='zero'"):
            answer(broken, noise=noise)
        assert noise.next_call == 0
    assert any("refusals" in each for each in answer(rows())[1].assumptions)


@pytest.mark.parametrize("fault", FAULTS)
def test_queries_are_public_and_always_refused(fault):
    broken = rows()
    broken[0][0, 0, 0, 0] = fault
    with pytest.raises(InvalidInputError, match="query"):
        answer(broken, nonfinite_rows="zero")
    with pytest.raises(InvalidInputError, match="nonfinite_rows"):
        answer(rows(), nonfinite_rows="skip")


def test_a_row_that_only_the_compute_dtype_cannot_hold_is_broken():
    large = rows()
    large[1][0, 0, BROKEN, 0] = 1e6
    found = answer(large, nonfinite_rows="zero", compute_dtype=torch.float16, out_dtype=torch.float32)[0]
    assert torch.isfinite(found).all()


def test_a_broken_row_has_no_gradient_and_spoils_no_other():
    query, key, value = rows()
    value[0, 0, BROKEN, 0] = math.nan
    key.requires_grad_()
    value.requires_grad_()
    answer([query, key, value], nonfinite_rows="zero")[0].sum().backward()
    for grad in (key.grad, value.grad):
        assert torch.isfinite(grad).all()
        assert (grad[0, :, BROKEN] == 0.0).all()
        assert (grad[0, :, BROKEN + 1] != 0.0).any()


@pytest.mark.parametrize("relation", NeighboringRelation)
def test_broken_padding_does_not_reach_an_answer(relation):
    made = bounds()
    if relation is NeighboringRelation.ADD_OR_REMOVE_ONE:
        made = AttentionBounds(
            query_norm=1.0, key_norm=1.0, value_norm=1.0, null_rows=3.0, neighboring_relation=relation
        )
    else:
        made = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=NUM_ROWS - 1)
    mask = torch.zeros(2, NUM_ROWS, dtype=torch.bool)
    mask[:, -1] = True
    broken = rows()
    broken[1][:, :, -1], broken[2][:, :, -1] = math.nan, math.inf
    settings = {"bounds": made, "key_padding_mask": mask}
    assert torch.equal(answer(broken, nonfinite_rows="zero", **settings)[0], answer(rows(), **settings)[0])


def test_a_module_passes_the_choice_on_and_repairs_projected_rows():
    noise = CallNoise(TestKey("module"))
    module = DPFlashAttention(
        8,
        2,
        bounds=bounds(),
        noise=noise,
        mu=1.0,
        batch_first=True,
        nonfinite_rows="zero",
        excess_rows="hide",
    )
    tensors = torch.randn(3, 1, NUM_ROWS, 8)
    tensors[1, 0, BROKEN, 0] = math.nan
    output, _ = module(*tensors)
    assert torch.isfinite(output).all()
    copied = DPFlashAttention.from_multihead(
        torch.nn.MultiheadAttention(8, 2), bounds=bounds(), noise=noise, mu=1.0, nonfinite_rows="zero"
    )
    assert (copied.nonfinite_rows, copied.excess_rows) == ("zero", "refuse")


def test_sound_rows_are_copied_bit_for_bit():
    _, key, value = rows()
    copies = without_broken_rows(key, value)
    assert all(torch.equal(copy, each) for copy, each in zip(copies, (key, value), strict=True))
    assert copies[0].data_ptr() != key.data_ptr()  # time and memory do not tell whether a row was broken


def test_the_clip_of_short_rows_is_exact_and_of_none_is_defined():
    given = torch.tensor([[0.0, 0.0], [0.3, -0.4], [3.0, 4.0], [1e-42, 0.0]])
    clipped = clip_rows(given, 1.0)
    assert torch.equal(clipped[[0, 1, 3]], given[[0, 1, 3]])
    assert float(clipped[2].norm()) == pytest.approx(1.0)
    assert torch.equal(clip_rows_into(given, 1.0, torch.empty_like(given)), clipped)
