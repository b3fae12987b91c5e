"""Slices: how a call is cut up is nobody's business but time's and memory's."""

import torch

from dp_flash_attention.attention import AttentionBounds, CallNoise, dp_flash_attention
from dp_flash_attention.attention import rows as plain_rows
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
    # A head of 48 x 16 numbers is a whole number of cache lines: a product's last bit may depend on where it begins in one.
    tensors = [torch.randn(3, heads, count, 16) for heads, count in ((4, 32), (2, 48), (2, 48))]
    mask = torch.zeros(3, 48, dtype=torch.bool)
    mask[1, -9:] = True

    def run():
        return dp_flash_attention(
            *tensors,
            bounds=bounds(num_rows=48 - 9),
            noise=noise(),
            mu=1.0,
            enable_gqa=True,
            key_padding_mask=mask,
        )[0]

    whole = run()
    for numbers in (1, 2 * 48 * 16 * 2):
        monkeypatch.setattr(plain, "SLICE_NUMBERS", numbers)
        assert torch.equal(run(), whole)


def test_slices_run_in_the_mode_of_their_caller(monkeypatch):
    """What inference mode allocates may only be written in it; and nothing records a gradient."""
    tensors = rows()
    found = dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), mu=1.0)[0]
    with torch.inference_mode():
        inside = dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), mu=1.0)[0]
    assert torch.equal(inside, found)
    with torch.no_grad():
        tensors[1].requires_grad_()
        quiet = dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), mu=1.0)[0]
    assert torch.equal(quiet, found)
    assert not quiet.requires_grad


def test_rows_that_change_between_norm_and_clip_are_clipped_as_they_were_read(monkeypatch):
    """Another thread may write to a caller's rows: norm and product are of one copy."""
    given, out = torch.ones(4, 8), torch.empty(4, 8)
    row_norms = plain_rows.row_norms

    def racing(each):
        norms = row_norms(each)
        given.mul_(1e6)
        return norms

    monkeypatch.setattr(plain_rows, "row_norms", racing)
    assert float(plain_rows.clip_rows_into(given, 1.0, out).norm(dim=-1).max()) <= 1.0 + 1e-6


def test_a_slice_holds_a_head_for_every_thread(monkeypatch):
    """With fewer, the threads of a kernel would share one causal head unevenly."""
    monkeypatch.setattr(plain, "SLICE_NUMBERS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen, attend = [], plain.attend_by_pass

    def looking(kernel, call, q, load):
        seen.append(q.shape[1])
        return attend(kernel, call, q, load)

    monkeypatch.setattr(plain, "attend_by_pass", looking)
    tensors = torch.randn(3, 1, 7, 33, 8)
    dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), mu=1.0, backend="flash")
    assert seen == [3, 3, 1]
