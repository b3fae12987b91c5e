"""Call numbers: used once, by one process; who pays gets the number, and who does not get it does not pay."""

import contextlib
import copy
import os
import pickle
import threading

import pytest
import torch

from dp_flash_attention.accounting import GaussianFilter
from dp_flash_attention.attention import AttentionBounds, CallNoise, dp_flash_attention
from dp_flash_attention.core.errors import BudgetExhaustedError, NoiseReuseError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.noise import TestKey

REPLACE = NeighboringRelation.REPLACE_ONE


class SlowFilter:
    """Lets the first payer wait until the second has arrived."""

    neighboring_relation = REPLACE

    def __init__(self):
        self.payments = []
        self.arrived = threading.Barrier(2, timeout=0.5)

    def admits(self, mu):
        return True

    def spend(self, mu):
        with contextlib.suppress(threading.BrokenBarrierError):  # nobody else came in to pay, as it should be
            self.arrived.wait()
        self.payments.append(mu)


def test_of_two_threads_with_one_number_one_pays_and_one_is_refused():
    source, payer, outcomes = CallNoise(TestKey("threads")), SlowFilter(), []
    tensors = [torch.randn(1, 1, 8, 4) for _ in range(3)]
    bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=8)

    def call():
        try:
            outcomes.append(
                dp_flash_attention(
                    *tensors, bounds=bounds, noise=source, mu=0.5, privacy_filter=payer, call_id=3
                )[1].call_id
            )
        except NoiseReuseError:
            outcomes.append("refused")

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == ["3", "refused"]
    assert len(payer.payments) == 1


def test_a_number_that_could_not_be_paid_for_stays_free():
    source = CallNoise(TestKey("free"))
    tensors = [torch.randn(1, 1, 8, 4) for _ in range(3)]
    bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=8)
    poor = GaussianFilter(PrivacyBudget(epsilon=0.01, delta=1e-9), neighboring_relation=REPLACE)
    with pytest.raises(BudgetExhaustedError):
        dp_flash_attention(*tensors, bounds=bounds, noise=source, mu=0.5, privacy_filter=poor, call_id=5)
    assert source.next_call == 0
    assert source.claim(5).call_id == 5
    assert source.next_call == 6
    with pytest.raises(NoiseReuseError, match="call_id"):
        source.claim(5)


def test_a_number_is_used_once():
    source = CallNoise(TestKey("once"))
    tensors = [torch.randn(1, 1, 8, 4) for _ in range(3)]
    bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=8)
    for number in (0, 7):
        dp_flash_attention(*tensors, bounds=bounds, noise=source, mu=0.5, call_id=number)
    for number in (0, 3, 7):
        with pytest.raises(NoiseReuseError, match="call_id"):
            dp_flash_attention(*tensors, bounds=bounds, noise=source, mu=0.5, call_id=number)
    assert dp_flash_attention(*tensors, bounds=bounds, noise=source, mu=0.5)[1].call_id == 8


def test_call_numbers_cannot_be_copied_to_another_process(monkeypatch):
    source = CallNoise(TestKey("copied"))
    for copying in (copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="CallNoise"):
            copying(source)
    assert copy.deepcopy(source) is source
    assert "next_call=0" in repr(source)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(NoiseReuseError, match="process"):
        source.claim()
