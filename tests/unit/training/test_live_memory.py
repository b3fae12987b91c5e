"""The allocator's count: what lives at once, and nothing that was freed before."""

from __future__ import annotations

import torch

from dp_flash_attention.training.live_memory import peak_live_bytes


def test_what_lives_at_once_is_counted() -> None:
    def together() -> None:
        held = [torch.empty(2**20) for _ in range(3)]
        del held

    def in_turn() -> None:
        for _ in range(3):
            torch.empty(2**20)

    cpu = torch.device("cpu")
    assert 12 * 2**20 <= peak_live_bytes(together, device=cpu) < 13 * 2**20
    assert 4 * 2**20 <= peak_live_bytes(in_turn, device=cpu) < 5 * 2**20
