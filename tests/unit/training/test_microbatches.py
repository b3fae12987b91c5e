from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training.microbatches import RecordSource, static_chunks


@pytest.mark.parametrize(("n", "size"), [(0, 4), (1, 4), (4, 4), (5, 4), (12, 5), (3, 1)])
def test_chunks_hold_each_index_once_and_have_one_shape(n: int, size: int) -> None:
    indices = torch.arange(100, 100 + n)
    chunks = list(static_chunks(indices, size))
    assert len(chunks) == -(-n // size)
    assert all(len(chunk) == len(weights) == size for chunk, weights in chunks)
    real = [chunk[weights == 1] for chunk, weights in chunks]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *real]), indices)
    padding = [chunk[weights == 0] for chunk, weights in chunks]
    assert all(bool((rows == chunk[0]).all()) for rows, (chunk, _) in zip(padding, chunks, strict=True))


class Takes:
    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def __len__(self) -> int:
        return 5

    def take(self, indices: Tensor) -> Any:
        return {"x": indices * 10} if self.answer is None else self.answer


class TakesTheFirst(TensorDataset):
    """As in Hugging Face's data sets, where take(n) gives the first n."""

    def take(self, n: int) -> Any:
        raise AssertionError


def test_every_kind_of_map_style_data_is_fetched_in_order() -> None:
    wanted, column = torch.tensor([3, 0, 3]), torch.arange(5.0)
    assert RecordSource(Takes()).fetch(wanted)["x"].tolist() == [30, 0, 30]
    assert RecordSource(column).fetch(wanted).tolist() == [3.0, 0.0, 3.0]
    assert RecordSource(TensorDataset(column)).fetch(wanted)[0].tolist() == [3.0, 0.0, 3.0]
    assert RecordSource(TakesTheFirst(column)).fetch(wanted)[0].tolist() == [3.0, 0.0, 3.0]
    summed = RecordSource([1, 2, 3, 4], collate_fn=lambda rows: torch.tensor(rows) + 1)
    assert summed.fetch(wanted[:1]).tolist() == [5]


@pytest.mark.parametrize(
    "answer", [{"x": torch.zeros(4)}, {"x": torch.zeros(2), "y": torch.zeros(())}, {"x": "no tensor"}, []]
)
def test_an_answer_without_a_row_for_each_record_is_refused(answer: Any) -> None:
    with pytest.raises(InvalidInputError, match="one row for each of the 2 records"):
        RecordSource(Takes(answer)).fetch(torch.tensor([0, 1]))


@pytest.mark.parametrize("dataset", [torch.zeros(0, 3), [], "text", b"bytes", {0: 1}, {1, 2}, 7])
def test_what_is_not_a_data_set_with_records_is_refused(dataset: Any) -> None:
    with pytest.raises(InvalidInputError, match="dataset"):
        RecordSource(dataset)


def test_a_source_knows_its_own_data_set_and_no_equal_one() -> None:
    data = [1, 2]
    assert RecordSource(data).holds(data)
    assert not RecordSource(data).holds([1, 2])
