"""Poisson sampling: each record flips its own coin in each step."""

from __future__ import annotations

import torch
from torch import Tensor

from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.noise import SecureBits
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.training.plan import PrivacyPlan


class PoissonSampler:
    """Decides which records take part in a step. The only sampler that a plan accounts for.

    Args:
        num_records: Number of records of the data set; private, and never released.
        plan: Supplies ``sampling_prob``.
        key: Secret of the sampling; who took part must stay unknown for amplification to hold.

    Raises:
        InvalidInputError: If there are no records.
        NoiseUnavailableError: If no cipher is available.

    Guarantees:
        neighbouring relation: add or remove one record; the coins of all other records stay as they are
            when the last one is added or removed, and are identically distributed wherever it sits.
        privacy unit: one record.
        sensitivity: a record is in a step or not, at most once.
        public: q. Private: the indices and their number.
        theorem: coins of distinct (step, record) are computationally independent and show 1 with probability
            at most q and less than 2⁻⁶⁴ below it; amplification by Poisson sampling, Abadi et al. 2016;
            Zhu, Dong & Wang 2022.
    """

    def __init__(self, num_records: int, plan: PrivacyPlan, key: NoiseKey) -> None:
        self._num_records = positive_int(
            "number of records", num_records, remedy="Pass a data set with records."
        )
        self._sampling_prob = plan.sampling_prob
        self._bits = SecureBits(key)

    def indices(self, step: int) -> Tensor:
        """Returns the sorted indices of the records of ``step``, int64 [batch size], maybe none. Private."""
        return torch.from_numpy(
            self._bits.bernoulli_indices(self._num_records, self._sampling_prob, step=step)
        )
