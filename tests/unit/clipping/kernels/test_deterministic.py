"""No kernel needs a deterministic mode: the same bits every time, with torch's switch on or off, from poisoned memory.

Torch fills the memory of ``torch.empty`` with NaN while its deterministic algorithms are on, so what a kernel reads before
it wrote it shows here as well.
"""

import re
from pathlib import Path

import pytest
import torch

import dp_flash_attention
from dp_flash_attention.clipping import norms
from dp_flash_attention.clipping.combined_norms import combined_sq_norms
from dp_flash_attention.clipping.contributions import EmbeddingContribution, LinearContribution
from dp_flash_attention.clipping.kernels import (
    embedding_norm,
    gram_norm,
    norm_backward,
    outer_norm,
    tied_cross,
)

SHAPE = (2, 70, 20)  # two programs an example for each kernel


def inputs():
    x, g = torch.randn(SHAPE), torch.randn(SHAPE)
    return x, g, torch.randint(0, 9, SHAPE[:2])


CALLS = {
    "gram": lambda x, g, ids: [gram_norm(x, g)],
    "outer": lambda x, g, ids: [outer_norm(x, g)],
    "embedding": lambda x, g, ids: [embedding_norm(ids, g)],
    "tied": lambda x, g, ids: [tied_cross(ids, g, x, g)],
    "norm layer": lambda x, g, ids: norm_backward(
        x, g, mean_BT=x.mean(2), rstd_BT=x.std(2), weight_D=torch.arange(20.0)
    ),
}


@pytest.fixture
def deterministic():
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CALLS)
def test_every_call_gives_the_same_bits_with_the_switch_on_or_off(name, deterministic):
    values = inputs()
    torch.use_deterministic_algorithms(False)
    free = CALLS[name](*values)
    torch.use_deterministic_algorithms(True)
    for _ in range(2):
        again = CALLS[name](*values)
        assert all(torch.equal(a, b) for a, b in zip(free, again, strict=True))
        assert all(torch.isfinite(a).all() for a in again)


def test_a_tied_weight_s_norms_and_sum_are_the_same_bits(deterministic, monkeypatch):
    """On a GPU the weighted sum of look-ups adds by index: with the switch on, torch does that in order."""
    monkeypatch.setattr(norms, "_is_on_gpu", lambda tensor: True)
    x, g, ids = inputs()
    results = []
    for _ in range(2):
        uses = [
            LinearContribution(x_BTD=x, g_BTP=g, weight_shape=torch.Size((20, 20))),
            EmbeddingContribution(ids_BT=ids, g_BTD=x, weight_shape=torch.Size((20, 20))),
        ]
        assert norms.tied_cross_path(x, x, g) == "triton"
        total = torch.empty(20, 20)
        for index, use in enumerate(uses):
            use.add_weighted_sum(torch.tensor([0.5, 1.0]), total, fresh=index == 0)
        results.append((combined_sq_norms(uses), total))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


ATOMIC = re.compile(r"\batomic_\w+|\binline_asm\w*|tl\.atomic")


def test_no_kernel_s_text_adds_to_shared_memory():
    """Programs that add to one number do so in any order; binaries are searched in test_kernels_compile.py."""
    root = Path(dp_flash_attention.__file__).parent
    files = [path for path in root.rglob("*.py") if "import triton" in path.read_text()]
    assert len(files) >= 12
    assert [path.name for path in files if ATOMIC.search(path.read_text())] == []
    assert ATOMIC.search("tl.atomic_add(out, 1.0)")
