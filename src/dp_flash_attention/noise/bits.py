"""Secret random bits and coins: who takes part in a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Final

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.validation import probability
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.keystream import (
    Domain,
    Indices,
    checked_count,
    checked_position,
    new_buffer,
)
from dp_flash_attention.noise.secure import Cipher, CipherKeystream

_CHUNK_WORDS: Final = 1 << 16


class SecureBits:
    """Uniform 64-bit words and Bernoulli coins from a 256-bit cipher.

    Args:
        key: Secret of the run.
        cipher: ``"aes-256-ctr"`` or ``"chacha20"``.

    Raises:
        InvalidInputError: If the cipher is unknown.
        NoiseUnavailableError: If ``cryptography`` cannot be imported or lacks the cipher.

    Guarantees:
        * Neighbouring relation: the coins of ``bernoulli_indices`` are per index, so adding or removing the
          last record leaves every other record's coin as it was.
        * Unit, sensitivity: the caller's. Public: ``prob``, cipher, layout. Secret: the key and which
          indices come out.
        * Theorem: coins of distinct (step, index) are computationally independent; each is 1 with probability
          floor(prob·2^64)/2^64, at most ``prob`` and less than 2^-64 below it. Rounding down keeps
          amplification by sampling analysed at ``prob`` an upper bound, for ε grows with the sampling
          probability.
        * Source: NIST SP 800-38A, RFC 8439; Abadi et al. 2016 (Poisson sampling).
    """

    def __init__(self, key: NoiseKey, *, cipher: Cipher = "aes-256-ctr") -> None:
        self._keystream = CipherKeystream(key, cipher)
        self.uses_test_key = key.is_test_key

    def uint64(self, n: int, *, step: int, stream: int = 0) -> npt.NDArray[np.uint64]:
        """Returns ``n`` uniform words, uint64 [n]. A larger ``n`` begins with the words of a smaller one.

        Raises:
            InvalidInputError: If ``n``, ``step`` or ``stream`` is out of range.
        """
        count = checked_count("n", n)
        step, stream = checked_position(step, stream)
        words = np.empty(count, dtype=np.uint64)
        for start, chunk in self._chunks(Domain.BITS, count, step, stream):
            words[start : start + len(chunk)] = chunk
        return words

    def bernoulli_indices(self, n: int, prob: float, *, step: int, stream: int = 0) -> Indices:
        """Returns the sorted indices below ``n`` whose coin at ``step`` shows 1, int64 [number of ones].

        Memory is O(result), not O(n).

        Args:
            n: Number of coins.
            prob: Probability of each, in (0, 1].
            step: Logical step; its coins are independent of those of every other step.
            stream: A second number for callers with several kinds of coins.

        Raises:
            InvalidInputError: If an argument is out of range.
        """
        count = checked_count("n", n)
        prob = probability("prob", prob, remedy="Pass the sampling probability.")
        step, stream = checked_position(step, stream)
        # A float is a dyadic rational: the product is exact before the floor.
        threshold = math.floor(Fraction(prob) * 2**64)
        if threshold == 2**64:
            return np.arange(count, dtype=np.int64)
        found = [
            np.flatnonzero(words < np.uint64(threshold)) + start
            for start, words in self._chunks(Domain.BERNOULLI, count, step, stream)
        ]
        return np.concatenate(found).astype(np.int64, copy=False) if found else np.empty(0, dtype=np.int64)

    def _chunks(
        self, domain: Domain, count: int, step: int, stream: int
    ) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
        """Yields (index of the first word, words); the words are valid until the next turn."""
        source = self._keystream.at(step=step, stream=stream)
        buffer = new_buffer(8 * min(count + 7, _CHUNK_WORDS))
        for start in range(0, count, _CHUNK_WORDS):
            size = min(_CHUNK_WORDS, count - start)
            num_bytes = -(-size // 8) * 64  # a whole number of either cipher's blocks
            read = source.read(num_bytes, domain=domain, block=8 * start // source.block_bytes, buffer=buffer)
            yield start, read.view("<u8")[:size]
