"""The embedding's norm kernel, under the interpreter, against float64 and against the contribution."""

import importlib

import pytest
import torch

from dp_flash_attention.clipping import norms
from dp_flash_attention.clipping.contributions import EmbeddingContribution
from dp_flash_attention.clipping.kernels import embedding_norm, selfcheck
from dp_flash_attention.clipping.kernels.selfcheck import embedding_disagreement
from dp_flash_attention.core.errors import KernelMismatchError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (2, 17, 5, 3), (3, 40, 128, 7), (2, 33, 130, 200)]
module = importlib.import_module("dp_flash_attention.clipping.kernels.embedding_norm")


def drawn(size, rows, width, vocabulary, dtype=torch.float32):
    return torch.randint(0, vocabulary, (size, rows)), torch.randn(size, rows, width).to(dtype)


def exact(ids, g):
    table = torch.zeros(len(ids), int(ids.max()) + 1, g.shape[2], dtype=torch.float64)
    return table.scatter_add_(1, ids[:, :, None].expand_as(g), g.double()).square().sum((1, 2))


def tolerance(g):
    """Relative: a row's running sum of at most T terms in float32, squared; squares then add without cancelling."""
    return (4 * g.shape[1] + 16) * 2.0**-24


def contribution(ids, g):
    return EmbeddingContribution(
        ids_BT=ids, g_BTD=g, weight_shape=torch.Size((int(ids.max()) + 1, g.shape[2]))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norms_are_those_of_float64_and_of_the_torch_path(shape, dtype):
    ids, g = drawn(*shape, dtype)
    got = embedding_norm(ids, g)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), exact(ids, g), rtol=tolerance(g), atol=0)
    torch.testing.assert_close(got, contribution(ids, g).sq_norms(), rtol=2 * tolerance(g), atol=0)


def test_any_strides_and_ids_shared_by_all_examples():
    ids, g = drawn(3, 20, 30, 6)
    shared = ids[:1].expand(3, -1)
    strided = embedding_norm(shared, g.transpose(0, 1).contiguous().transpose(0, 1).mT.contiguous().mT)
    assert torch.equal(strided, embedding_norm(shared.contiguous(), g))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)])
def test_empty_shapes_have_norm_zero(shape):
    assert torch.equal(embedding_norm(*drawn(*shape)), torch.zeros(shape[0]))


def test_one_id_everywhere_is_one_row():
    g = torch.ones(1, 513, 1, dtype=torch.bfloat16)  # a bfloat16 sum would stop at 256
    assert float(embedding_norm(torch.zeros(1, 513, dtype=torch.long), g)) == 513.0**2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_seen_in_its_own_example_only(bad):
    ids, g = drawn(2, 9, 5, 3)
    clean = embedding_norm(ids, g)
    g[0, 4, 2] = bad
    got = embedding_norm(ids, g)
    assert not torch.isfinite(got[0])
    assert got[1] == clean[1]


def test_nothing_is_carried_over_from_call_to_call_or_read_before_it_is_written(poisoned):
    ids, g = drawn(2, 20, 200, 9)
    cold = embedding_norm(ids, g)
    embedding_norm(ids.flip(1), 100 * g)
    warm = embedding_norm(ids, g)
    assert poisoned == [(2, 2)] * 3  # blocks of 128 columns; nothing of the vocabulary's size
    assert torch.equal(cold, warm)
    torch.testing.assert_close(cold.double(), exact(ids, g), rtol=tolerance(g), atol=0)


def test_a_partial_sum_that_nobody_wrote_is_seen(poisoned, monkeypatch):
    # Planted: published kernels summed into buffers that held what the last call had left.
    kernel = module.embedding_norm_kernel

    class OneProgramLess:
        def __getitem__(self, grid):
            return kernel[(grid[0] - 1,)]

    monkeypatch.setattr(module, "embedding_norm_kernel", OneProgramLess())
    assert torch.isnan(embedding_norm(*drawn(2, 20, 200, 9))).any()


def test_ids_that_are_not_added_up_are_seen():
    ids, g = drawn(2, 20, 30, 4)
    apart = torch.arange(20).expand(2, -1)
    assert not torch.allclose(embedding_norm(apart, g).double(), exact(ids, g), rtol=tolerance(g))


@pytest.fixture
def on_kernel(monkeypatch):
    """Makes the contribution take CPU tensors for CUDA tensors; records that the kernel ran."""
    embedding_disagreement.cache_clear()
    ran = []
    monkeypatch.setattr(norms, "_is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(
        "dp_flash_attention.clipping.kernels.embedding_norm",
        lambda ids, g: ran.append("embedding") or embedding_norm(ids, g),
    )
    yield ran
    embedding_disagreement.cache_clear()


def test_which_path_ran(on_kernel):
    ids, g = drawn(2, 9, 5, 3)
    torch.testing.assert_close(
        contribution(ids, g).sq_norms().double(), exact(ids, g), rtol=tolerance(g), atol=0
    )
    assert on_kernel == ["embedding"]
    contribution(ids, g.double()).sq_norms()
    assert on_kernel == ["embedding"]


def test_the_cpu_keeps_its_own_path():
    assert norms.embedding_norm_path(torch.zeros(1, 1, 1)) == "torch"


@pytest.mark.parametrize("wrong", [lambda n: 1.001 * n, lambda n: n * float("nan")])
def test_a_wrong_norm_stops_the_clipping(wrong, monkeypatch, on_kernel):
    def planted(ids, g):
        return wrong(embedding_norm(ids, g))

    monkeypatch.setattr(selfcheck, "embedding_norm", planted)
    with pytest.raises(KernelMismatchError, match="planted misses float64"):
        contribution(*drawn(2, 9, 5, 3)).sq_norms()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_agrees(dtype):
    embedding_disagreement.cache_clear()
    assert embedding_disagreement("cpu", dtype) is None
