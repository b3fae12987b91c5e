"""Which layouts are credited to examples, and which are refused."""

from __future__ import annotations

import pytest
import torch

from dp_flash_attention.clipping.tape import Tape
from dp_flash_attention.core.errors import ExampleCouplingError

B, D = 4, 3


def tape(layouts: dict[str, bool] | None = None, *, size: int = B, probing: bool = False) -> Tape:
    return Tape(batch_size=size, layouts={} if layouts is None else layouts, probing=probing)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((B, D), (B, 1, D)), ((B, 5, D), (B, 5, D)), ((B, 2, 3, D), (B, 6, D)), ((B, 1, D), (B, 1, D))],
)
def test_batch_first_layouts_are_credited(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    view = tape().by_example(values, num_feature_dims=1, module="m")
    assert view.shape == expected
    assert torch.equal(view[1].flatten(), values[1].flatten())


def test_flattened_rows_need_a_length_that_was_seen() -> None:
    recorded, values = tape(), torch.randn(B * 5, D)
    with pytest.raises(ExampleCouplingError, match=r"'m' received a tensor of shape \(20, 3\)"):
        recorded.by_example(values, num_feature_dims=1, module="m")
    recorded.by_example(torch.randn(B, 5, D), num_feature_dims=1, module="other")
    view = recorded.by_example(values, num_feature_dims=1, module="m")
    assert torch.equal(view[2], values[10:15])
    with pytest.raises(ExampleCouplingError):
        recorded.by_example(torch.randn(B * 6, D), num_feature_dims=1, module="m")


@pytest.mark.parametrize("shape", [(5, B, D), (B + 1, D), (1, D), (D,), (B * 5, 2, D)])
def test_other_layouts_are_refused(shape: tuple[int, ...]) -> None:
    recorded = tape()
    recorded.by_example(torch.randn(B, 5, D), num_feature_dims=1, module="seen")
    with pytest.raises(ExampleCouplingError, match="cannot be credited"):
        recorded.by_example(torch.randn(shape), num_feature_dims=1, module="m")


def test_indices_of_every_layout() -> None:
    recorded = tape({"classes": True})
    own = torch.arange(B * 5).view(B, 5)
    ids, shared = recorded.indices_by_example(own, module="tokens")
    assert torch.equal(ids, own)
    assert not shared
    for positions in (torch.arange(7), torch.arange(7)[None]):
        ids, shared = recorded.indices_by_example(positions, module="places")
        assert torch.equal(ids, torch.arange(7).expand(B, 7))
        assert shared
    ids, shared = recorded.indices_by_example(torch.tensor(3), module="one")
    assert (ids.tolist(), shared) == ([[3]] * B, True)
    ids, shared = recorded.indices_by_example(torch.arange(B), module="classes")
    assert (ids.tolist(), shared) == ([[0], [1], [2], [3]], False)
    with pytest.raises(ExampleCouplingError, match="one an example before"):
        recorded.indices_by_example(torch.arange(7), module="classes")


def test_a_length_that_equals_the_batch_is_decided_by_what_came_before() -> None:
    layouts: dict[str, bool] = {}
    with pytest.raises(ExampleCouplingError, match="one an example or positions"):
        tape(layouts).indices_by_example(torch.arange(B), module="m")
    tape(layouts).indices_by_example(torch.arange(B + 1), module="m")
    assert tape(layouts).indices_by_example(torch.arange(B), module="m")[1]


@pytest.mark.parametrize(("lengths", "per_example"), [((2, 3), True), ((2, 2), False), ((3, 3), False)])
def test_probes_of_two_sizes_tell_what_follows_the_batch(lengths: tuple[int, int], per_example: bool) -> None:
    layouts: dict[str, bool] = {}
    for size, length in zip((2, 3), lengths, strict=True):
        tape(layouts, size=size, probing=True).indices_by_example(torch.arange(length), module="m")
        tape(layouts, size=size, probing=True).splits_by_example(length, argument="0", module="m")
    assert layouts == {"m": per_example, "m(0)": per_example}
    assert tape(layouts).splits_by_example(B, argument="0", module="m") is per_example


def test_an_argument_of_a_batch_of_another_size_is_refused() -> None:
    recorded = tape({"m(0)": True})
    with pytest.raises(ExampleCouplingError, match="one entry an example before"):
        recorded.splits_by_example(B + 1, argument="0", module="m")
