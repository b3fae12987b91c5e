"""The tied weight's cross term as a kernel, under the interpreter, against float64 and against the torch path."""

import importlib

import pytest
import torch

from dp_flash_attention.clipping import combined_norms, norms
from dp_flash_attention.clipping.combined_norms import combined_sq_norms
from dp_flash_attention.clipping.contributions import EmbeddingContribution, LinearContribution
from dp_flash_attention.clipping.kernels import selfcheck, tied_cross
from dp_flash_attention.clipping.kernels.selfcheck import embedding_disagreement, tied_disagreement
from dp_flash_attention.core.errors import KernelMismatchError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = (torch.float32, torch.bfloat16, torch.bfloat16)  # what autocast leaves
SHAPES = [  # B, T tokens, S rows of the head, width, vocabulary
    (1, 1, 1, 1, 1),
    (2, 17, 5, 3, 9),
    (1, 64, 64, 64, 64),
    (2, 65, 130, 70, 33),
    (2, 3, 70, 5, 200),
]
module = importlib.import_module("dp_flash_attention.clipping.kernels.tied_cross")


def drawn(size, tokens, rows, width, vocabulary, dtypes=(torch.float32,) * 3):
    shapes = ((size, tokens, width), (size, rows, width), (size, rows, vocabulary))
    values = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return torch.randint(0, vocabulary, (size, tokens)), *values


def terms_of(ids, e, h, g):
    picked = g.double().gather(2, ids[:, None, :].expand(-1, g.shape[1], -1))
    return picked * (h.double() @ e.double().mT)


def assert_exact(got, ids, e, h, g):
    """Each term errs by width roundings of Σ|h·e|, and each sum by one rounding of a tile: a bound of the absolute sum."""
    sizes = terms_of(ids, e.abs(), h.abs(), g.abs()).sum((1, 2))
    bound = (e.shape[2] + 16) * 2.0**-24 * sizes
    assert bool(((got.double() - terms_of(ids, e, h, g).sum((1, 2))).abs() <= bound).all())


@pytest.mark.parametrize("dtypes", [*((dtype,) * 3 for dtype in DTYPES), MIXED])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_that_of_float64_and_of_the_torch_path(shape, dtypes):
    values = drawn(*shape, dtypes)
    got = tied_cross(*values)
    assert got.dtype is torch.float32
    assert_exact(got, *values)
    assert_exact(combined_norms._inner_products(*as_contributions(*values)), *values)


def as_contributions(ids, e, h, g):
    shape = torch.Size((g.shape[2], h.shape[2]))
    return (
        LinearContribution(x_BTD=h, g_BTP=g, weight_shape=shape),
        EmbeddingContribution(ids_BT=ids, g_BTD=e, weight_shape=shape),
    )


def test_any_strides_and_narrow_ids_shared_by_all_examples():
    ids, e, h, g = drawn(2, 20, 30, 40, 6)
    shared = ids[:1].expand(2, -1)
    strided = tied_cross(
        shared.int(),
        e.mT.contiguous().mT,
        h.transpose(0, 1).contiguous().transpose(0, 1),
        g.mT.contiguous().mT,
    )
    assert torch.equal(strided, tied_cross(shared.contiguous(), e, h, g))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6)])
def test_empty_shapes_have_no_cross_term(shape):
    assert torch.equal(tied_cross(*drawn(*shape)), torch.zeros(shape[0]))


def test_sums_are_not_narrowed_with_their_inputs():
    ones = torch.ones(1, 513, 1, dtype=torch.bfloat16)  # a bfloat16 sum would stop at 256
    assert float(tied_cross(torch.zeros(1, 513, dtype=torch.long), ones, ones, ones)) == 513.0**2


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in place of the tensor cores
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stays_in_its_own_example(bad):
    ids, e, h, g = drawn(2, 9, 5, 3, 4)
    clean = tied_cross(ids, e, h, g)
    e[0, 4, 2] = bad
    got = tied_cross(ids, e, h, g)
    assert not torch.isfinite(got[0])
    assert got[1] == clean[1]


def test_nothing_is_carried_over_from_call_to_call_or_read_before_it_is_written(poisoned):
    ids, e, h, g = drawn(2, 65, 70, 66, 9)
    cold = tied_cross(ids, e, h, g)
    tied_cross(ids.flip(1), 100 * e, h, g)
    warm = tied_cross(ids, e, h, g)
    assert poisoned == [(2, 2)] * 3  # strips of 64 tokens: neither T×S nor V×D
    assert torch.equal(cold, warm)
    assert_exact(warm, ids, e, h, g)


def test_a_partial_sum_that_nobody_wrote_is_seen(poisoned, monkeypatch):
    # Planted: published kernels summed into buffers that held what the last call had left.
    kernel = module.tied_cross_kernel

    class OneProgramLess:
        def __getitem__(self, grid):
            return kernel[(grid[0] - 1,)]

    monkeypatch.setattr(module, "tied_cross_kernel", OneProgramLess())
    assert torch.isnan(tied_cross(*drawn(2, 65, 70, 5, 9))).any()


def test_sums_that_begin_where_the_last_call_ended_are_seen(monkeypatch):
    # Planted: an accumulator that is zeroed before the first call and never again.
    kept, right = {}, tied_cross

    def warm(*values):
        kept["sum"] = kept.get("sum", 0.0) + right(*values)
        return kept["sum"]

    values = drawn(2, 9, 5, 3, 4)
    assert_exact(warm(*values), *values)
    with pytest.raises(AssertionError):
        assert_exact(warm(*values), *values)
    monkeypatch.setattr(selfcheck, "tied_cross", warm)
    kept["sum"] = 1.0
    tied_disagreement.cache_clear()
    assert "misses float64" in tied_disagreement("cpu", *DTYPES[:1] * 3)
    tied_disagreement.cache_clear()


@pytest.fixture
def on_kernel(monkeypatch):
    """Makes the contributions take CPU tensors for CUDA tensors; records that the kernel ran."""
    tied_disagreement.cache_clear()
    embedding_disagreement.cache_clear()
    ran = []
    monkeypatch.setattr(norms, "_is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(
        "dp_flash_attention.clipping.kernels.tied_cross",
        lambda *values: ran.append("tied") or tied_cross(*values),
    )
    yield ran
    tied_disagreement.cache_clear()
    embedding_disagreement.cache_clear()


def test_which_path_ran_and_what_it_is_for(on_kernel):
    ids, e, h, g = drawn(2, 9, 5, 6, 4)
    head, table = as_contributions(ids, e, h, g)
    got = combined_sq_norms([head, table])
    assert on_kernel == ["tied"]
    want = (head.dense(0, 2).double() + table.dense(0, 2).double()).square().sum((1, 2))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    with norms.cancellation_deferred():  # a graph holds no launch
        combined_norms._inner_products(head, table)
    combined_norms._inner_products(as_contributions(ids, e, h.double(), g)[0], table)
    assert on_kernel == ["tied"]


def test_the_cpu_keeps_its_own_path():
    _, e, h, g = drawn(1, 1, 1, 1, 1)
    assert norms.tied_cross_path(e, h, g) == "torch"


@pytest.mark.parametrize("wrong", [lambda n: 1.01 * n, lambda n: -n, lambda n: n * float("nan")])
def test_a_wrong_term_stops_the_clipping(wrong, monkeypatch, on_kernel):
    def planted(*values):
        return wrong(tied_cross(*values))

    monkeypatch.setattr(selfcheck, "tied_cross", planted)
    head, table = as_contributions(*drawn(2, 9, 5, 3, 4))
    with pytest.raises(KernelMismatchError, match="planted misses float64"):
        combined_sq_norms([head, table])


@pytest.mark.parametrize("dtypes", [*((dtype,) * 3 for dtype in DTYPES), MIXED])
def test_the_check_agrees(dtypes):
    tied_disagreement.cache_clear()
    assert tied_disagreement("cpu", *dtypes) is None
