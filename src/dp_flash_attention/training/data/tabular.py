"""Tables as data sets: every record becomes a fixed number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dp_flash_attention.core.errors import DataError
from dp_flash_attention.training.data.encoding import Ids, Weights, encode_category, encode_numeric
from dp_flash_attention.training.data.schema import NumericField, Schema


class TabularDataset:
    """Encoded records in memory, eight bytes for each field.

    Build one with ``from_columns`` or ``read_table``.

    Args:
        schema: The public description that the records were encoded with.
        ids: Lower ids in the shared table, shape [N, F].
        weights: Weight of id + 1 in each token, shape [N, F]; 0 means the lower id alone.
        labels: Class indices, shape [N].
    """

    def __init__(self, schema: Schema, *, ids: Ids, weights: Weights, labels: npt.NDArray[np.int64]) -> None:
        self.schema = schema
        self._ids = torch.from_numpy(ids)
        self._weights = torch.from_numpy(weights)
        self._labels = torch.from_numpy(labels)

    @classmethod
    def from_columns(
        cls, schema: Schema, columns: Mapping[str, Any], labels: npt.NDArray[np.int64]
    ) -> TabularDataset:
        """Encodes columns of numbers (float64, NaN is missing) and of texts (object, None is missing).

        Args:
            schema: Names, kinds, knots and categories.
            columns: One array of length N for each field of the schema.
            labels: Class indices, shape [N].

        Raises:
            DataError: If there are no records.
        """
        if len(labels) == 0:
            raise DataError("There are no records to encode, but at least one is needed. Check the file.")
        ids = np.empty((len(labels), len(schema.fields)), dtype=np.int32)
        weights = np.zeros((len(labels), len(schema.fields)), dtype=np.float32)
        for f, (field, offset) in enumerate(zip(schema.fields, schema.offsets, strict=True)):
            column = columns[field.name]
            if isinstance(field, NumericField):
                ids[:, f], weights[:, f] = encode_numeric(np.asarray(column, dtype=np.float64), field.knots)
            else:
                ids[:, f] = _encode_categories(column, field.categories, field.num_buckets)
            ids[:, f] += offset
        return cls(schema, ids=ids, weights=weights, labels=np.asarray(labels, dtype=np.int64))

    def __len__(self) -> int:
        """Returns N, the number of records, which is private under add-or-remove."""
        return len(self._labels)

    @property
    def labels(self) -> Tensor:
        """Class indices, shape [N]. Private data."""
        return self._labels

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Returns the records at ``indices``, shape [B].

        Returns:
            ``ids`` [B, F, 2] long, ``mix`` [B, F, 2] float32 that sums to 1 over the last axis, and
            ``label`` [B] long.
        """
        lower_BF = self._ids[indices].long()
        weights_BF = self._weights[indices]
        return {
            "ids": torch.stack([lower_BF, lower_BF + (weights_BF > 0)], dim=-1),
            "mix": torch.stack([1.0 - weights_BF, weights_BF], dim=-1),
            "label": self._labels[indices],
        }


def _encode_categories(column: Any, categories: tuple[str, ...], num_buckets: int) -> Ids:
    """Encodes each distinct text once; the result for a record depends on that record's text alone."""
    import pandas as pd

    codes, distinct = pd.factorize(np.asarray(column, dtype=object))
    table = [encode_category("" if text is None else str(text), categories, num_buckets) for text in distinct]
    # factorize gives None and NaN the code -1, which picks the last entry.
    ids: Ids = np.asarray([*table, 0], dtype=np.int32)[codes]
    return ids
