"""The split into a training part and a hold-out, by one secret coin for each record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import SecureBits
from dp_flash_attention.noise.entropy import NoiseKey


class TakesIndices(Protocol):
    """A map-style data set that returns many records at once."""

    def __len__(self) -> int:
        """Number of records."""

    def take(self, indices: Tensor) -> Mapping[str, Tensor]:
        """Returns the records at ``indices`` as tensors with one row each."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which records train and which evaluate.

    Attributes:
        train: Sorted record numbers, int64.
        holdout: The others, sorted.
    """

    train: Tensor
    holdout: Tensor


def split_records(num_records: int, *, holdout_prob: float, key: NoiseKey) -> Split:
    """Tosses a coin for each record.

    Args:
        num_records: Number of records.
        holdout_prob: Probability, in [0, 1), that a record belongs to the hold-out.
        key: Secret of the run; the same key gives the same split.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        Each record lies in one part, and its coin depends on nothing but the key and its number. If the
        mechanism on each part is (ε, δ)-DP, where the second may see the first one's output, both together
        are (ε, δ)-DP under adding or removing one record: given the coins only one part changes (parallel
        composition, McSherry 2009, Theorem 4), and a mixture over coins that do not depend on the data keeps
        the bound.
    """
    if not 0.0 <= holdout_prob < 1.0:
        raise InvalidInputError(
            "holdout_prob", holdout_prob, bound="at least 0 and below 1", remedy="0.1 keeps a tenth, 0 none."
        )
    is_holdout = torch.zeros(num_records, dtype=torch.bool)
    if holdout_prob > 0.0:
        chosen = SecureBits(key).bernoulli_indices(num_records, holdout_prob, step=0)
        is_holdout[torch.from_numpy(chosen)] = True
    return Split(train=torch.nonzero(~is_holdout).flatten(), holdout=torch.nonzero(is_holdout).flatten())


class Subset:
    """Some records of a data set, as a data set.

    Args:
        dataset: The data set.
        indices: Record numbers, int64 [n].
    """

    def __init__(self, dataset: TakesIndices, indices: Tensor) -> None:
        self._dataset, self._indices = dataset, indices

    def __len__(self) -> int:
        """Returns n."""
        return len(self._indices)

    def take(self, indices: Tensor) -> Mapping[str, Tensor]:
        """Returns the records at ``indices`` of the subset."""
        return self._dataset.take(self._indices[indices])
