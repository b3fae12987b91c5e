"""Slices: how a call is cut up is nobody's business but time's and memory's."""

import torch

from dp_flash_attention.attention import AttentionBounds, CallNoise, dp_flash_attention
from dp_flash_attention.attention.backends import plain
from dp_flash_attention.noise import TestKey

NUM_ROWS = 33


def bounds(**changes):
    given = {"query_norm": 2.0, "key_norm": 2.0, "value_norm": 1.5, "num_rows": NUM_ROWS, **changes}
    return AttentionBounds(**given)


def rows(*, batch=2, groups=4):
    shapes = ((batch, 4, 6, 8), (batch, groups, NUM_ROWS, 8), (batch, groups, NUM_ROWS, 8))
    return tuple(torch.randn(shape) for shape in shapes)


def noise():
    return CallNoise(TestKey("call"))


def test_slices_do_not_change_a_byte(monkeypatch):
    tensors = rows(groups=2, batch=3)

    def run():
        return dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), mu=1.0, enable_gqa=True)[0]

    whole = run()
    monkeypatch.setattr("dp_flash_attention.attention.backends.plain.SLICE_NUMBERS", 1)
    assert torch.equal(run(), whole)
    monkeypatch.setattr("dp_flash_attention.attention.backends.plain.SLICE_NUMBERS", 2 * 33 * 8 * 2)
    assert torch.equal(run(), whole)


def test_a_slice_holds_a_head_for_every_thread(monkeypatch):
    """With fewer, the threads of a kernel would share one causal head unevenly."""
    monkeypatch.setattr("dp_flash_attention.attention.backends.plain.SLICE_NUMBERS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen, attend = [], plain.attend

    def looking(kernel, call, q, k, v):
        seen.append(q.shape[1])
        return attend(kernel, call, q, k, v)

    monkeypatch.setattr(plain, "attend", looking)
    tensors = torch.randn(3, 1, 7, 33, 8)
    dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), mu=1.0, backend="flash")
    assert seen == [3, 3, 1]
