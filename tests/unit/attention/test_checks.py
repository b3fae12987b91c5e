"""What is refused, and that a refusal runs nothing and spends nothing."""

import math

import pytest
import torch

from dp_flash_attention.accounting import GaussianFilter
from dp_flash_attention.attention import (
    AttentionBounds,
    CallNoise,
    Contexts,
    dp_flash_attention,
    plan_attention_release,
    release_attention,
)
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.noise import TestKey

NUM_ROWS = 33


def bounds(**changes):
    given = {"query_norm": 2.0, "key_norm": 2.0, "value_norm": 1.5, "num_rows": NUM_ROWS, **changes}
    return AttentionBounds(**given)


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


def removal():
    return bounds(num_rows=None, null_rows=20.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)


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


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_spends_nothing_and_runs_nothing(case, monkeypatch):
    make, said = REFUSED[case]
    tensors, settings = make()
    gate = GaussianFilter(PrivacyBudget(epsilon=2.0, delta=1e-6))
    source = noise()
    ran = []
    monkeypatch.setattr(
        "dp_flash_attention.attention.backends.plain.PlainBackend.release", lambda *_: ran.append(1)
    )
    with pytest.raises(InvalidInputError, match=said):
        dp_flash_attention(
            *tensors, **{"bounds": bounds(), "noise": source, "mu": 0.1, "privacy_filter": gate, **settings}
        )
    assert (gate.num_releases, source.next_call, ran) == (0, 0, [])


def test_a_plan_is_for_its_shapes():
    plan = plan_attention_release(bounds(), num_queries=6, query_width=8, num_heads=4, batch_size=2, mu=1.0)
    release_attention(*rows(), plan=plan, noise=noise())
    for other in (rows(queries=7), rows(batch=1), rows(heads=8, groups=4), rows(value_width=9)):
        with pytest.raises(InvalidInputError, match="as planned"):
            release_attention(*other, plan=plan, noise=noise())
    with pytest.raises(InvalidInputError, match="rounding was charged"):
        release_attention(*rows(keys=40), plan=plan, noise=noise())


def test_a_plan_whose_deviations_were_made_smaller_is_refused():
    """Its release claimed the planned μ."""
    for contexts in Contexts:
        for counts in (NUM_ROWS, (NUM_ROWS, 20)):
            plan = plan_attention_release(
                bounds(contexts=contexts, num_rows=counts), num_queries=6, query_width=8, num_heads=4, batch_size=2, mu=1.0
            )  # fmt: skip
            release_attention(*rows(), plan=plan, noise=noise())
            plan.stddev[0].mul_(0.999)  # both entries where they share their numbers
            source = noise()
            with pytest.raises(InvalidInputError, match="changed since it was planned"):
                release_attention(*rows(), plan=plan, noise=source)
            assert source.next_call == 0
    with pytest.raises(ValueError, match="read-only"):
        plan.sensitivity[0, 0] = 0.0


@pytest.mark.parametrize("value_norm", [1e20, 1e30])
def test_noise_beyond_the_generator_is_refused_before_it_is_paid_for(value_norm):
    gate, source = GaussianFilter(PrivacyBudget(epsilon=2.0, delta=1e-6)), noise()
    with pytest.raises(InvalidInputError, match="stddev"):
        dp_flash_attention(
            *rows(), bounds=bounds(value_norm=value_norm), noise=source, mu=0.1, privacy_filter=gate
        )
    assert (gate.num_releases, source.next_call) == (0, 0)


TRANSFORMS = {
    "vmap over keys": lambda call, q, k, v: torch.vmap(lambda each: call(q, each, v), randomness="different")(
        k.expand(2, -1, -1, -1, -1)
    ),
    "func.grad": lambda call, q, k, v: torch.func.grad(lambda each: call(each, k, v).sum())(q),
    "func.jvp": lambda call, q, k, v: torch.func.jvp(lambda each: call(each, k, v), (q,), (q,)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch, when it loads its rules
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_that_would_share_or_lose_the_noise_are_refused(transform):
    """Two of them failed when the call was paid for, and the third returned derivatives of nothing."""
    gate, source = GaussianFilter(PrivacyBudget(epsilon=2.0, delta=1e-6)), noise()

    def call(*tensors):
        settings = {"bounds": bounds(), "noise": source, "mu": 0.1, "privacy_filter": gate}
        return dp_flash_attention(*tensors, nonfinite_rows="zero", **settings)[0]

    with pytest.raises(InvalidInputError, match=r"torch\.func"):
        TRANSFORMS[transform](call, *rows())
    assert (gate.num_releases, source.next_call) == (0, 0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch, when it loads its rules
def test_forward_mode_differentiation_is_refused():
    from torch.autograd import forward_ad

    query, key, value = rows()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(InvalidInputError, match="forward-mode"):
            dp_flash_attention(dual, key, value, bounds=bounds(), noise=noise(), mu=0.1)


class Looking(torch.Tensor):
    """Gets to see every intermediate result of what it is passed to."""


@pytest.mark.parametrize("which", [0, 1, 2])
def test_classes_that_see_intermediate_results_are_refused(which):
    tensors = list(rows())
    tensors[which] = tensors[which].as_subclass(Looking)
    source = noise()
    with pytest.raises(InvalidInputError, match="Looking"):
        dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=0.1)
    assert source.next_call == 0
    tensors[which] = torch.nn.Parameter(tensors[which].as_subclass(torch.Tensor))
    dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=0.1)
