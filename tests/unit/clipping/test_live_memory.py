"""What is alive at the peak of a checkpointed step, byte by byte: the figures of ``docs/clipping.md``, a quarter as long."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dp_flash_attention.clipping import ClippedGradientAccumulator


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._known:
                storage = leaf.untyped_storage()
                self._known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(256), nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x.square().mean((1, 2))


def peak_of(clipping: Any, *, size: int = 16, length: int = 32) -> int:
    """Returns the peak of one step beyond model and data; ``clipping`` None is the ordinary step."""
    model, x = Checkpointed(), torch.randn(size, length, 256)
    if clipping is not None:
        accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0, clipping=clipping)
        accumulator.record(lambda: model(x[:1]), batch_size=1)  # as the start-up check does
    gc.collect()
    with LiveBytes() as live:
        if clipping is None:
            model(x).sum().backward()
        else:
            accumulator.add(lambda: model(x), batch_size=size)
    return live.peak


def test_clipping_by_layer_holds_hardly_more_than_the_ordinary_step() -> None:
    ordinary, by_layer, flat = (peak_of(clipping) for clipping in (None, "per_layer", "flat"))
    assert ordinary > 20 * 2**20, "the gradients alone are 17 MiB: the counter counts"
    assert by_layer < 1.10 * ordinary
    assert flat > 1.5 * ordinary
