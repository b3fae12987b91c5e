"""Owners of rows: a record is seen in no more rows than promised, and what is hidden is nobody else's business."""

import math
from collections import Counter

import pytest
import torch

from dp_flash_attention.attention import AttentionBounds, CallNoise, Contexts, dp_flash_attention
from dp_flash_attention.attention.owners import apply_owners
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation
from dp_flash_attention.noise import TestKey

NUM_ROWS = 24


def bounds(**changes):
    given = {
        "query_norm": 1.0,
        "key_norm": 1.0,
        "value_norm": 1.0,
        "null_rows": 5.0,
        "max_rows_per_record": 2,
        "neighboring_relation": NeighboringRelation.ADD_OR_REMOVE_ONE,
        **changes,
    }
    return AttentionBounds(**given)


def hide(ids, hidden=None, **changes):
    key = torch.zeros(2, 1, ids.shape[-1], 4)
    return apply_owners(ids, hidden, key, bounds(**changes), "hide")


def kept_by_hand(ids, hidden, r, *, disjoint):
    """The definition, one row at a time."""
    kept, first_entry = torch.zeros(ids.shape, dtype=torch.bool), {}
    for entry in range(len(ids)):
        seen = Counter()
        for row in range(ids.shape[1]):
            if hidden[entry, row]:
                continue
            owner = int(ids[entry, row])
            if disjoint and first_entry.setdefault(owner, entry) != entry:
                continue
            seen[owner] += 1
            kept[entry, row] = seen[owner] <= r
    return kept


@pytest.mark.parametrize("contexts", Contexts)
@pytest.mark.parametrize("r", [1, 2, 3, 40])
def test_the_first_rows_of_each_record_are_kept(contexts, r):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(-3, 6, (2, NUM_ROWS), generator=generator)
        hidden = torch.rand(2, NUM_ROWS, generator=generator) < 0.3
        found = hide(ids, hidden, contexts=contexts, max_rows_per_record=r)
        expected = kept_by_hand(ids, hidden, r, disjoint=contexts is Contexts.DISJOINT)
        assert torch.equal(found, ~expected)


@pytest.mark.parametrize("contexts", Contexts)
def test_a_record_that_leaves_uncovers_nobody_elses_row(contexts):
    """What add-or-remove-one needs: contexts that differ by one record do so after hiding, in at most r rows."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 5, (2, NUM_ROWS), generator=generator)
        with_it = hide(ids, contexts=contexts)
        for owner in range(5):
            own = ids == owner
            without = hide(ids, own, contexts=contexts)
            assert torch.equal(with_it[~own], without[~own])
            assert without[own].all()
            assert int((~with_it & own).sum(dim=1).max()) <= 2
            if contexts is Contexts.DISJOINT:
                assert int((~with_it & own).any(dim=1).sum()) <= 1


def test_keeping_any_rows_up_to_a_total_would_uncover_others():
    """The mistake of counting over all records: one that leaves makes room for rows of another."""

    def first_of_all(hidden):
        order = (~hidden).cumsum(dim=1)
        return hidden | (order > 2)

    ids = torch.tensor([[0, 0, 1, 1]])
    own = ids == 0
    before, after = first_of_all(torch.zeros_like(own)), first_of_all(own)
    assert not torch.equal(before[~own], after[~own])


@pytest.mark.parametrize("hidden", [None, torch.zeros(2, NUM_ROWS, dtype=torch.bool)])
def test_refusing_leaves_a_layout_that_keeps_its_promise_as_it_is(hidden):
    key = torch.zeros(2, 1, NUM_ROWS, 4)
    ids = torch.arange(NUM_ROWS) // 2
    assert apply_owners(ids, hidden, key, bounds(), "refuse") is hidden
    with pytest.raises(InvalidInputError, match="rows of one record is 3"):
        apply_owners(torch.arange(NUM_ROWS) // 3, hidden, key, bounds(), "refuse")


@pytest.mark.parametrize("ids", [[0, 1], torch.arange(NUM_ROWS) / 2, torch.ones(NUM_ROWS, dtype=torch.bool),
    torch.ones(NUM_ROWS, dtype=torch.complex64), torch.arange(5), torch.zeros(3, NUM_ROWS, dtype=torch.long)])  # fmt: skip
def test_ids_of_the_wrong_form_are_refused_either_way(ids):
    key = torch.zeros(2, 1, NUM_ROWS, 4)
    for excess_rows in ("refuse", "hide"):
        with pytest.raises(InvalidInputError, match="record_ids"):
            apply_owners(ids, None, key, bounds(), excess_rows)


def test_a_call_that_hides_answers_as_one_whose_mask_hides():
    tensors = [torch.randn(2, 2, count, 4) for count in (3, NUM_ROWS, NUM_ROWS)]
    ids = torch.arange(NUM_ROWS) % 5

    def answer(**settings):
        noise = CallNoise(TestKey("hide"))
        return dp_flash_attention(*tensors, bounds=bounds(), noise=noise, mu=0.5, **settings)[0]

    mask = hide(ids)
    assert 0 < int(mask.sum()) < mask.numel()
    found = answer(record_ids=ids, excess_rows="hide")
    assert torch.equal(found, answer(key_padding_mask=mask))
    with pytest.raises(InvalidInputError, match="excess_rows='hide'"):
        answer(record_ids=ids)
    with pytest.raises(InvalidInputError, match="excess_rows"):
        answer(record_ids=ids, excess_rows="drop")


def test_rows_that_are_hidden_do_not_count_as_promised_ones():
    tensors = [torch.randn(1, 1, count, 4) for count in (3, NUM_ROWS, NUM_ROWS)]
    promised = AttentionBounds(
        query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=NUM_ROWS, max_rows_per_record=2
    )
    with pytest.raises(InvalidInputError, match="visible rows"):
        dp_flash_attention(
            *tensors,
            bounds=promised,
            noise=CallNoise(TestKey(1)),
            mu=0.5,
            record_ids=torch.zeros(NUM_ROWS, dtype=torch.long),
            excess_rows="hide",
        )


def test_no_rows_at_all_have_no_owners():
    ids = torch.zeros(0, dtype=torch.long)
    assert hide(ids).shape == (2, 0)


def test_disjoint_contexts_are_checked_and_cost_one_entry():
    tensors = [torch.randn(2, 1, count, 4) for count in (3, NUM_ROWS, NUM_ROWS)]
    ids = torch.arange(2 * NUM_ROWS).view(2, NUM_ROWS)

    def plan_of(contexts, owners):
        return dp_flash_attention(
            *tensors, bounds=bounds(contexts=contexts), noise=CallNoise(TestKey(1)), mu=1.0, record_ids=owners
        )[1].plan

    shared, apart = plan_of(Contexts.SHARED, ids), plan_of(Contexts.DISJOINT, ids)
    assert torch.allclose(shared.stddev, apart.stddev * math.sqrt(2.0), rtol=1e-6)
    with pytest.raises(InvalidInputError, match="two batch entries"):
        plan_of(Contexts.DISJOINT, ids[0])
