"""The call: what it computes, what it refuses, and that a refusal spends nothing."""

import copy
import dataclasses
import math
import os
import pickle

import pytest
import torch

from dp_flash_attention.accounting import GaussianFilter, epsilon, gdp_epsilon
from dp_flash_attention.attention import (
    AttentionBounds,
    AttentionCall,
    CallNoise,
    Contexts,
    available_backends,
    dp_flash_attention,
    plan_attention_release,
    reference_attention,
    release_attention,
)
from dp_flash_attention.attention.backends import plain, registry
from dp_flash_attention.attention.reference import reference_noise
from dp_flash_attention.core.errors import (
    BudgetExhaustedError,
    DependencyMissingError,
    InvalidInputError,
    NoiseReuseError,
)
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, PrivacyUnit
from dp_flash_attention.noise import SecretKey, TestKey

REMOVAL = NeighboringRelation.ADD_OR_REMOVE_ONE
NUM_ROWS = 33


def bounds(**changes):
    given = {"query_norm": 2.0, "key_norm": 2.0, "value_norm": 1.5, "num_rows": NUM_ROWS, **changes}
    return AttentionBounds(**given)


def removal(**changes):
    return bounds(num_rows=None, null_rows=20.0, neighboring_relation=REMOVAL, **changes)


def rows(
    *, batch=2, heads=4, groups=4, queries=6, keys=NUM_ROWS, width=8, value_width=8, dtype=torch.float32
):
    return (
        torch.randn(batch, heads, queries, width).to(dtype),
        torch.randn(batch, groups, keys, width).to(dtype),
        torch.randn(batch, groups, keys, value_width).to(dtype),
    )


def noise(label="call", **changes):
    return CallNoise(TestKey(label), **changes)


def expected(tensors, plan, hidden=None, label="call"):
    """The reference's answer to the call with number 0."""
    query, key, value = (each.to(plan.compute_dtype) for each in tensors)
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        norms=plan.norms,
        scale=plan.scale,
        score_bound=plan.score_bound,
        causal=plan.is_causal,
        hidden=hidden,
        null_rows=plan.bounds.null_rows,
        stddev=plan.stddev,
        noise=noise(label).claim(),
        out_dtype=torch.float32,
    )
    return reference_attention(call) + reference_noise(call)


# Outputs and noise are of order 10; float32 sums of 33 to 20,000 rows and one rounding of the result.
FLOAT32 = 3e-5


@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize(
    ("shape", "settings", "hides", "made"),
    [
        ({}, {}, False, bounds),
        ({}, {"is_causal": True}, False, bounds),
        ({"groups": 2}, {"enable_gqa": True}, False, bounds),
        ({"groups": 1}, {"enable_gqa": True, "is_causal": True}, True, lambda: bounds(num_rows=16)),
        ({"value_width": 12}, {}, True, lambda: bounds(num_rows=16)),
        ({"value_width": 3}, {"is_causal": True}, False, removal),
        ({"groups": 2}, {"enable_gqa": True, "is_causal": True}, True, removal),
        ({"queries": 50}, {"is_causal": True}, False, bounds),
        ({"keys": 0}, {}, False, removal),
        ({"keys": 20_000, "queries": 2, "groups": 2}, {"enable_gqa": True}, True, removal),
        ({"keys": 20_000, "queries": 2}, {"scale": 0.7}, False, lambda: bounds(num_rows=20_000)),
        ({"queries": 1, "keys": 1, "width": 1, "value_width": 1}, {}, False, lambda: bounds(num_rows=1)),
    ],
)
def test_a_call_is_the_reference_plus_the_noise_of_its_number(backend, shape, settings, hides, made):
    tensors = rows(**shape)
    hidden = None
    if hides:
        hidden = torch.zeros(2, tensors[1].shape[2], dtype=torch.bool)
        hidden[0, -17:] = True
        if made is removal:
            hidden[1] = True  # nobody is there
    output, release = dp_flash_attention(
        *tensors, bounds=made(), noise=noise(), mu=0.5, key_padding_mask=hidden, backend=backend, **settings
    )
    assert output.is_contiguous()
    assert output.dtype is torch.float32
    assert release.backend == backend
    difference = (output.double() - expected(tensors, release.plan, hidden)).abs()
    assert float(difference.max()) <= FLOAT32  # a NaN fails


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Weights, outputs and results are rounded to the dtype: a few units of 2^-8 and 2^-11 of numbers up to 8.
    [(torch.bfloat16, 0.15), (torch.float16, 0.02), (torch.float64, FLOAT32)],
)
def test_other_dtypes(dtype, tolerance):
    tensors = rows(dtype=dtype)
    output, release = dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), mu=5.0)
    assert output.dtype is (torch.float32 if dtype is torch.float64 else dtype)
    assert float((output.double() - expected(tensors, release.plan)).abs().max()) <= tolerance


def test_narrow_rows_may_be_computed_in_float32():
    tensors = rows(dtype=torch.bfloat16)
    output, release = dp_flash_attention(
        *tensors, bounds=bounds(), noise=noise(), mu=5.0, compute_dtype=torch.float32, out_dtype=torch.float32
    )
    assert float((output.double() - expected(tensors, release.plan)).abs().max()) <= FLOAT32


def test_the_same_key_and_number_give_the_same_bytes_and_others_other_noise():
    tensors = rows()

    def run(source, **settings):
        return dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=0.5, **settings)[0]

    again, source = run(noise()), noise()
    first, second = run(source), run(source)
    assert torch.equal(first, again)
    assert torch.equal(run(noise(), call_id=1), second)
    exact = expected(
        tensors,
        plan_attention_release(bounds(), num_queries=6, query_width=8, num_heads=4, batch_size=2, mu=0.5),
    )
    exact -= expected_noise(first, 0.5)
    parts = [(each.double() - exact) for each in (first, second, run(noise(rank=1)), run(noise("other")))]
    columns = torch.cat([part.flatten(0, 1).flatten(1) for part in parts])  # calls × heads × entries
    correlation = torch.corrcoef(columns) - torch.eye(len(columns))
    # 48 numbers a column, 32 columns: 0.75 is beyond five standard deviations of each of 496 pairs.
    assert float(correlation.abs().max()) < 0.75
    assert len(torch.unique(columns)) == columns.numel()


def expected_noise(output, mu):
    plan = plan_attention_release(bounds(), num_queries=6, query_width=8, num_heads=4, batch_size=2, mu=mu)
    call = AttentionCall(
        query=output,
        key=output,
        value=output,
        norms=plan.norms,
        scale=1.0,
        score_bound=1.0,
        causal=False,
        hidden=None,
        null_rows=0.0,
        stddev=plan.stddev,
        noise=noise().claim(),
        out_dtype=torch.float32,
    )
    return reference_noise(call)


class Forgetful:
    """A generator that leaves out one part of the position."""

    def __init__(self, inner, **fixed):
        self.inner, self.fixed = inner, fixed

    def add_row_normal_(self, out, **position):
        return self.inner.add_row_normal_(out, **{**position, **self.fixed})


@pytest.mark.parametrize(
    "fixed", [{"step": 0}, {"stream": 0}], ids=["across calls", "across heads and entries"]
)
def test_noise_that_is_used_twice_is_noticed(fixed):
    tensors, source = rows(), noise()
    source._generator = Forgetful(source._generator, **fixed)
    outputs = [dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=0.5) for _ in range(2)]
    plan = outputs[0][1].plan
    exact = expected(tensors, plan) - expected_noise(outputs[0][0], 0.5)
    parts = torch.cat([(output.double() - exact).flatten(0, 1).flatten(1) for output, _ in outputs])
    correlation = torch.corrcoef(parts) - torch.eye(len(parts))
    # What test_the_same_key_and_number… requires to stay below 0.75.
    assert float(correlation.abs().max()) > 0.99


def test_a_number_is_used_once():
    source, tensors = noise(), rows()
    for number in (0, 7):
        dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=0.5, call_id=number)
    for number in (0, 3, 7):
        with pytest.raises(NoiseReuseError, match="call_id"):
            dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=0.5, call_id=number)
    assert dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=0.5)[1].call_id == 8


def test_call_numbers_cannot_be_copied_to_another_process(monkeypatch):
    source = noise()
    for copying in (copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="CallNoise"):
            copying(source)
    assert copy.deepcopy(source) is source
    assert "next_call=0" in repr(source)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(NoiseReuseError, match="process"):
        source.claim()


def test_the_release_states_what_was_certified_and_assumed():
    budget = PrivacyBudget(epsilon=1.0, delta=1e-6)
    _, release = dp_flash_attention(*rows(), bounds=bounds(), noise=noise(), budget=budget)
    assert release.uses_test_key
    assert not CallNoise(SecretKey.from_os()).uses_test_key
    assert 0.999 < release.epsilon(1e-6) <= 1.0
    assert 0.99e-6 < release.delta(1.0) <= 1e-6
    assert 1.0 <= epsilon(release.event, delta=1e-6) < 1.001
    assert release.guarantee.privacy_unit is PrivacyUnit.EXAMPLE
    assert any("owns at most 1" in each for each in release.assumptions)
    assert release.neighboring_relation is NeighboringRelation.REPLACE_ONE
    _, release = dp_flash_attention(
        *rows(),
        bounds=bounds(max_rows_per_record=3),
        noise=noise(),
        budget=budget,
        record_ids=torch.arange(NUM_ROWS) // 3,
    )
    assert release.guarantee.privacy_unit is PrivacyUnit.USER
    assert not any("owns at most" in each for each in release.assumptions)


def budget_filter(relation=NeighboringRelation.REPLACE_ONE):
    return GaussianFilter(PrivacyBudget(epsilon=2.0, delta=1e-6), neighboring_relation=relation)


def test_a_filter_admits_what_fits_and_not_one_call_more():
    gate, source, tensors = budget_filter(), noise(), rows()
    share = gate.share(3)
    for _ in range(3):
        dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=share, privacy_filter=gate)
    with pytest.raises(BudgetExhaustedError):
        dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=share, privacy_filter=gate)
    assert source.next_call == 3
    assert gate.num_releases == 3
    assert gate.epsilon_spent <= 2.0


def hidden_but(count):
    mask = torch.ones(2, NUM_ROWS, dtype=torch.bool)
    mask[:, :count] = False
    return mask


def poisoned(which, number):
    tensors = rows()
    tensors[which][1, 2, 3, 4] = number
    return tensors


REFUSED = {
    "a NaN among the queries": (lambda: (poisoned(0, math.nan), {}), "query"),
    "a NaN among the keys": (lambda: (poisoned(1, math.nan), {}), "key"),
    "an infinity among the values": (lambda: (poisoned(2, -math.inf), {}), "value"),
    "a norm beyond float32": (lambda: (poisoned(2, 1e30), {}), "value"),
    "a number beyond the compute dtype": (
        lambda: (poisoned(1, 1e6), {"compute_dtype": torch.float16}),
        "key",
    ),
    "fewer rows than assumed": (lambda: (rows(keys=NUM_ROWS - 1), {}), "num_rows|num_key_rows"),
    "fewer visible rows than assumed": (
        lambda: (rows(), {"key_padding_mask": hidden_but(32)}),
        "visible rows",
    ),
    "a mask that hides all rows": (lambda: (rows(), {"key_padding_mask": hidden_but(0)}), "visible rows"),
    "left padding of a causal call": (
        lambda: (rows(), {"key_padding_mask": ~hidden_but(3), "is_causal": True}),
        "first rows",
    ),
    "a mask of another dtype": (
        lambda: (rows(), {"key_padding_mask": hidden_but(33).float()}),
        "key_padding_mask",
    ),
    "a mask of another shape": (
        lambda: (rows(), {"key_padding_mask": hidden_but(33)[:1]}),
        "key_padding_mask",
    ),
    "a record with too many rows": (
        lambda: (rows(), {"record_ids": torch.arange(NUM_ROWS) // 2}),
        "one record",
    ),
    "owners that are no numbers": (
        lambda: (rows(), {"record_ids": torch.arange(NUM_ROWS) / 2}),
        "record_ids",
    ),
    "owners of other rows": (lambda: (rows(), {"record_ids": torch.arange(5)}), "record_ids"),
    "grouped heads without asking": (lambda: (rows(groups=2), {}), "enable_gqa"),
    "heads that do not divide": (lambda: (rows(heads=4, groups=3), {"enable_gqa": True}), "divisor"),
    "three dimensions": (lambda: (tuple(each[0] for each in rows()), {}), "query"),
    "no queries": (lambda: (rows(queries=0), {}), "query.shape"),
    "keys of another width": (lambda: ((rows()[0], rows(width=9)[1], rows()[2]), {}), "key.shape"),
    "more values than keys": (lambda: ((*rows()[:2], rows(keys=34)[2]), {}), "value.shape"),
    "mixed dtypes": (lambda: ((rows()[0].double(), *rows()[1:]), {}), "dtypes"),
    "integers": (lambda: (tuple(each.long() for each in rows()), {}), "dtypes"),
    "float64 outputs": (lambda: (rows(), {"out_dtype": torch.float64}), "out_dtype"),
    "an unknown back end": (lambda: (rows(), {"backend": "magic"}), "backend"),
    "a back end of another device": (lambda: (rows(), {"backend": "cudnn"}), "backend"),
    "a scale of zero": (lambda: (rows(), {"scale": 0.0}), "scale"),
    "a scale beyond use": (lambda: (rows(), {"scale": 1000.0}), "scale"),
    "no budget": (lambda: (rows(), {"mu": None}), "budget"),
    "two budgets": (lambda: (rows(), {"budget": PrivacyBudget(epsilon=1.0, delta=1e-6)}), "budget"),
    "a budget of zero": (lambda: (rows(), {"mu": 0.0}), "mu"),
    "a negative number": (lambda: (rows(), {"call_id": -1}), "call_id"),
    "another relation than the filter's": (lambda: (rows(), {"bounds": removal()}), "relation"),
}


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_coarser_products_of_the_process_do_not_reach_a_call(setting, monkeypatch):
    """TF32 and bfloat16 products err by more than the rounding that a float32 call is charged for."""
    release, seen = plain.PlainBackend.release, []

    def looking(self, call):
        seen.append((torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return release(self, call)

    monkeypatch.setattr(plain.PlainBackend, "release", looking)
    torch.set_float32_matmul_precision(setting)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        dp_flash_attention(*rows(), bounds=bounds(), noise=noise(), mu=0.5)
        assert torch.backends.mkldnn.matmul.fp32_precision == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("ieee", "ieee")]


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_spends_nothing_and_runs_nothing(case, monkeypatch):
    make, said = REFUSED[case]
    tensors, settings = make()
    gate, source = budget_filter(), noise()
    ran = []
    monkeypatch.setattr(
        "dp_flash_attention.attention.backends.plain.PlainBackend.release", lambda *_: ran.append(1)
    )
    with pytest.raises(InvalidInputError, match=said):
        dp_flash_attention(
            *tensors, **{"bounds": bounds(), "noise": source, "mu": 0.1, "privacy_filter": gate, **settings}
        )
    assert (gate.num_releases, source.next_call, ran) == (0, 0, [])


def test_a_back_end_that_is_not_installed_raises_by_name(monkeypatch):
    registry._load_triton.cache_clear()
    monkeypatch.setattr(
        "dp_flash_attention.attention.backends.registry.importlib.import_module",
        lambda name: (_ for _ in ()).throw(ImportError("no triton")),
    )
    assert "triton" not in available_backends()
    with pytest.raises(DependencyMissingError, match="triton"):
        dp_flash_attention(*rows(), bounds=bounds(), noise=noise(), mu=1.0, backend="triton")
    registry._load_triton.cache_clear()


@pytest.mark.parametrize("changes", [{"query_norm": 0.0}, {"key_norm": -1.0}, {"value_norm": math.inf}, {"value_norm": math.nan},
    {"num_rows": None}, {"num_rows": 0}, {"num_rows": ()}, {"max_rows_per_record": 0}, {"null_rows": -1.0},
    {"null_rows": math.nan}, {"contexts": "shared "}, {"rounding": "none"}, {"neighboring_relation": "replace_one"},
    {"neighboring_relation": REMOVAL}, {"neighboring_relation": REMOVAL, "num_rows": None}])  # fmt: skip
def test_bounds_out_of_range_are_refused(changes):
    with pytest.raises(InvalidInputError):
        bounds(**changes)


def test_disjoint_contexts_are_checked_and_cost_one_entry():
    tensors, ids = rows(), torch.arange(2 * NUM_ROWS).view(2, NUM_ROWS)
    shared = dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), mu=1.0, record_ids=ids)[1]
    apart = dp_flash_attention(
        *tensors, bounds=bounds(contexts=Contexts.DISJOINT), noise=noise(), mu=1.0, record_ids=ids
    )[1]
    assert torch.allclose(shared.plan.stddev, apart.plan.stddev * math.sqrt(2.0), rtol=1e-6)
    with pytest.raises(InvalidInputError, match="two batch entries"):
        dp_flash_attention(
            *tensors, bounds=bounds(contexts=Contexts.DISJOINT), noise=noise(), mu=1.0, record_ids=ids[0]
        )


def test_entries_of_different_lengths_get_noise_of_their_own():
    tensors = rows()
    mask = torch.zeros(2, NUM_ROWS, dtype=torch.bool)
    mask[1, 20:] = True
    output, release = dp_flash_attention(
        *tensors, bounds=bounds(num_rows=(NUM_ROWS, 20)), noise=noise(), mu=1.0, key_padding_mask=mask
    )
    assert float(release.plan.stddev[1, 0, 0]) > float(release.plan.stddev[0, 0, 0])
    assert float((output.double() - expected(tensors, release.plan, mask)).abs().max()) <= FLOAT32
    with pytest.raises(InvalidInputError, match="visible rows of batch entry 1"):
        dp_flash_attention(
            *tensors, bounds=bounds(num_rows=(NUM_ROWS, 21)), noise=noise(), mu=1.0, key_padding_mask=mask
        )


def test_a_plan_is_for_its_shapes():
    plan = plan_attention_release(bounds(), num_queries=6, query_width=8, num_heads=4, batch_size=2, mu=1.0)
    release_attention(*rows(), plan=plan, noise=noise())
    for other in (rows(queries=7), rows(batch=1), rows(heads=8, groups=4), rows(value_width=9)):
        with pytest.raises(InvalidInputError, match="as planned"):
            release_attention(*other, plan=plan, noise=noise())
    with pytest.raises(InvalidInputError, match="rounding was charged"):
        release_attention(*rows(keys=40), plan=plan, noise=noise())


@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize(
    "settings", [{}, {"is_causal": True}, {"hides": True}, {"keys": 20_000}, {"null": False}]
)
def test_gradients_are_those_of_the_exact_output(backend, settings):
    """Double precision, against autograd through the formula written out; clip, null rows, chunks and groups."""
    keys, null = settings.get("keys", 12), settings.get("null", True)
    tensors = [
        each.requires_grad_()
        for each in rows(batch=2, groups=2, keys=keys, queries=5, value_width=6, dtype=torch.float64)
    ]
    hidden = torch.zeros(2, keys, dtype=torch.bool)
    if settings.get("hides"):
        hidden[0, 4:] = True
        hidden[1] = True
    causal = settings.get("is_causal", False)
    output, release = dp_flash_attention(
        *tensors, bounds=removal() if null else bounds(num_rows=keys), noise=noise(), mu=1.0, enable_gqa=True,
        is_causal=causal, key_padding_mask=hidden, backend=backend,
    )  # fmt: skip
    weight = torch.randn_like(output)
    found = torch.autograd.grad((output * weight).sum(), tensors)
    norms, mass = release.plan.norms, release.plan.bounds.null_rows
    q, k, v = (
        x * (r / x.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        for x, r in zip(tensors, (norms.query, norms.key, norms.value), strict=True)
    )
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.exp(release.plan.scale * q @ k.mT) * ~hidden[:, None, None]
    if causal:
        scores = scores * torch.ones(5, keys, dtype=torch.float64).tril()
    exact = scores @ v / (scores.sum(-1, keepdim=True) + mass)
    for mine, reference in zip(found, torch.autograd.grad((exact * weight).sum(), tensors), strict=True):
        # The output passes through float32, its gradient too.
        assert torch.allclose(mine, reference, rtol=1e-5, atol=1e-6)


def test_no_gradient_needs_no_graph_and_a_row_of_zeros_has_one():
    query, key, value = rows()
    key[0, 0, 0] = 0.0
    assert not dp_flash_attention(query, key, value, bounds=bounds(), noise=noise(), mu=1.0)[0].requires_grad
    key.requires_grad_()
    output = dp_flash_attention(query, key, value, bounds=bounds(), noise=noise(), mu=1.0)[0]
    output.sum().backward()
    assert torch.isfinite(key.grad).all()


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


def test_head_budgets_compose():
    budget = PrivacyBudget(epsilon=2.0, delta=1e-6)
    epsilons = [0.2, 0.4, 0.6, 0.8]
    release = dp_flash_attention(
        *rows(), bounds=bounds(), noise=noise(), budget=budget, head_epsilons=epsilons
    )[1]
    assert [gdp_epsilon(mu=each, delta=1e-6) for each in release.plan.head_mus] == pytest.approx(
        epsilons, rel=1e-9
    )
    assert release.mu == pytest.approx(math.hypot(*release.plan.head_mus))
    assert max(epsilons) < release.epsilon(1e-6) < sum(epsilons)
    with pytest.raises(InvalidInputError, match="compose to"):
        dp_flash_attention(*rows(), bounds=bounds(), noise=noise(), head_epsilons=[1.2] * 4, budget=budget)


def test_a_changed_release_is_another_object():
    release = dp_flash_attention(*rows(), bounds=bounds(), noise=noise(), mu=1.0)[1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        release.call_id = 5
