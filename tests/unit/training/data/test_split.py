"""One secret coin for each record."""

import math

import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training.data.split import Subset, split_records

KEY = TestKey("split")


def test_both_parts_hold_every_record_once():
    split = split_records(10_000, holdout_prob=0.3, key=KEY)
    both = torch.cat([split.train, split.holdout])
    assert torch.equal(both.sort().values, torch.arange(10_000))
    assert torch.equal(split.train, split.train.sort().values)


def test_a_record_more_moves_no_other_record():
    less, more = (split_records(n, holdout_prob=0.3, key=KEY) for n in (9_999, 10_000))
    assert torch.equal(less.holdout, more.holdout[more.holdout < 9_999])


def test_the_key_decides_and_the_share_is_right():
    n, prob = 200_000, 0.1
    first, again, other = (split_records(n, holdout_prob=prob, key=k) for k in (KEY, KEY, TestKey("other")))
    assert torch.equal(first.holdout, again.holdout)
    assert not torch.equal(first.holdout, other.holdout)
    deviation = math.sqrt(n * prob * (1 - prob))
    assert abs(len(first.holdout) - n * prob) < 5 * deviation  # false alarm 6e-7; the key is fixed
    assert abs(len(first.holdout) - n * 0.11) > 5 * deviation


def test_without_hold_out_everyone_trains():
    split = split_records(5, holdout_prob=0.0, key=KEY)
    assert (len(split.train), len(split.holdout)) == (5, 0)


@pytest.mark.parametrize("prob", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(prob):
    with pytest.raises(InvalidInputError, match="holdout_prob"):
        split_records(5, holdout_prob=prob, key=KEY)


def test_a_subset_numbers_its_records_anew():
    class Numbers:
        def __len__(self):
            return 10

        def take(self, indices):
            return {"number": indices * 10}

    subset = Subset(Numbers(), torch.tensor([2, 5, 7]))
    assert len(subset) == 3
    assert subset.take(torch.tensor([2, 0]))["number"].tolist() == [70, 20]
