"""Exact attention noise as it runs: on every back end the reference's numbers, never twice, and nothing else comes out."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dp_flash_attention.accounting import GaussianFilter, gdp_mu
from dp_flash_attention.attention import (
    AttentionBounds,
    AttentionCall,
    CallNoise,
    DPFlashAttention,
    dp_flash_attention,
    plan_attention_release,
    reference_attention,
    release_attention,
)
from dp_flash_attention.attention import grid_noising as room
from dp_flash_attention.attention.backends import plain, registry
from dp_flash_attention.attention.kernels.launch import kernel_key
from dp_flash_attention.attention.reference import reference_grid, reference_noise
from dp_flash_attention.core.errors import BudgetExhaustedError, InvalidInputError, NoiseUnavailableError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.noise import SecretKey, TestKey
from dp_flash_attention.noise.wide_discrete_gaussian import CHUNK

BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)


def bounds(**changes):
    given = {"query_norm": 1.0, "key_norm": 1.0, "value_norm": 1.0, "num_rows": 20, **changes}
    return AttentionBounds(**given)


def noise(label="exact", **changes):
    return CallNoise(TestKey(label), **{"name": "exact", **changes})


def rows(*, batch=2, heads=4, groups=4, queries=6, keys=20, width=8, value_width=8, dtype=torch.float32):
    return (
        torch.randn(batch, heads, queries, width).to(dtype),
        torch.randn(batch, groups, keys, width).to(dtype),
        torch.randn(batch, groups, keys, value_width).to(dtype),
    )


def plan_of(tensors, **changes):
    query, _, value = tensors
    given = {"bounds": bounds(), "budget": BUDGET, "noise": "exact", **changes}
    return plan_attention_release(
        given.pop("bounds"),
        num_queries=query.shape[2],
        query_width=query.shape[3],
        value_width=value.shape[3],
        num_heads=query.shape[1],
        batch_size=query.shape[0],
        num_key_rows=20,
        **given,
    )


def call_of(tensors, plan, source):
    return AttentionCall(
        query=tensors[0],
        key=tensors[1],
        value=tensors[2],
        norms=plan.norms,
        scale=plan.scale,
        score_bound=plan.score_bound,
        causal=plan.is_causal,
        hidden=None,
        null_rows=0.0,
        stddev=plan.stddev,
        noise=replace(source.claim(), steps=plan.precision.steps),
        out_dtype=torch.float32,
    )


def integers(output, plan):
    """Steps of the grid in a float64 output; asserts that they are whole."""
    steps = output / (plan.stddev.double() / plan.precision.steps).unsqueeze(-1)
    assert (steps - steps.round()).abs().max() < 1e-4
    return steps.round()


@pytest.mark.parametrize("cipher", ["aes-256-ctr", "chacha20"])
@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"groups": 2}, {"queries": 1}, {"value_width": 3}, {"queries": 50, "value_width": 33}, {"batch": 1}],
    ids=str,
)
def test_a_call_is_the_rounded_reference_plus_the_integers_of_its_number(backend, shape, cipher):
    tensors = rows(**shape)
    plan = plan_of(tensors)
    output, release = release_attention(*tensors, plan=plan, noise=noise(cipher=cipher), backend=backend)
    assert release.noise == "exact"
    call = call_of(tensors, plan, noise(cipher=cipher))
    grid = reference_grid(call)
    counts = torch.round(reference_attention(call) / grid)
    expected = counts * grid + reference_noise(call)
    # The output has 24 bits. A float32 kernel's answer is off by 2e-7, a fiftieth of a step here: then and when it rounds to
    # the step beside the reference's, never further.
    off = ((output.double() - expected).abs() - 2.0**-23 * expected.abs()) / grid
    assert off.max() < 1.01
    assert (off > 0.5).double().mean() < 0.05
    assert reference_noise(call).abs().max() > 0.1


def test_what_is_written_is_whole_steps_of_the_grid_and_exactly_rounded():
    plan = plan_of(rows(), is_causal=True)
    exact = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    stream = replace(noise().claim(), steps=plan.precision.steps)
    wide = torch.empty_like(exact)
    room.add_on_grid_into(wide, exact, plan.stddev, stream)
    grid = (plan.stddev.double() / plan.precision.steps).unsqueeze(-1)
    drawn = integers(wide, plan) - torch.round(exact / grid)
    assert torch.equal((torch.round(exact / grid) + drawn) * grid, wide)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = torch.empty(exact.shape, dtype=dtype)
        room.add_on_grid_into(narrow, exact, plan.stddev, stream)
        assert torch.equal(narrow, wide.to(dtype))


def test_halves_and_answers_beyond_the_grid():
    plan = plan_of(rows())
    grid = (plan.stddev.double() / plan.precision.steps).unsqueeze(-1)
    stream = replace(noise().claim(), steps=plan.precision.steps)
    found = []
    for steps in (0.0, 0.5, -0.5, 1.5, 2.0**46, 2.0**46 + 2.0**20, -math.inf, -(2.0**46)):
        out = torch.empty(2, 4, 6, 8, dtype=torch.float64)
        room.add_on_grid_into(out, (steps * grid).expand(out.shape), plan.stddev, stream)
        found.append((out / grid).round())
    drawn = found[0]
    assert [float((each - drawn).unique()) for each in found] == [
        0,
        0,
        0,
        2,
        2**46,
        2**46,
        -(2**46),
        -(2**46),
    ]


def test_answers_that_round_alike_cannot_be_told_apart():
    """Every bit of the output is a function of whole numbers: with float noise the low bits show the exact answer."""
    plan = plan_of(rows())
    grid = (plan.stddev.double() / plan.precision.steps).unsqueeze(-1)
    stream = replace(noise().claim(), steps=plan.precision.steps)
    base = torch.randint(-1000, 1000, (2, 4, 6, 8)).double()
    found = []
    for offset in (-0.49, 0.0, 0.3):
        out = torch.empty(base.shape, dtype=torch.float64)
        room.add_on_grid_into(out, (base + offset) * grid, plan.stddev, stream)
        found.append(out)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_grid_does_not_depend_on_the_rows():
    seen = []
    for scale in (1e-3, 1.0, 1e3):
        tensors = [each * scale for each in rows()]
        plan = plan_of(tensors)
        seen.append((plan.precision, plan.stddev.flatten().tolist()))
        out = torch.empty(2, 4, 6, 8, dtype=torch.float64)
        stream = replace(noise().claim(), steps=plan.precision.steps)
        room.add_on_grid_into(out, torch.randn(2, 4, 6, 8) * scale, plan.stddev, stream)
        integers(out, plan)
    assert seen[0] == seen[1] == seen[2]
    # A grid that were scaled to the answers would be seen.
    exact = torch.randn(2, 4, 6, 8)
    room.add_on_grid_into(out, exact, plan.stddev * exact.abs().max(), stream)
    with pytest.raises(AssertionError):
        integers(out, plan)


def released_integers(source, *, batch=2, heads=3, queries=40, width=8):
    """The noise of one call: its answers are zero, for values are."""
    tensors = list(rows(batch=batch, heads=heads, groups=heads, queries=queries, width=width))
    tensors[2] = torch.zeros_like(tensors[2])
    plan = plan_of(tensors)
    output, _ = release_attention(*tensors, plan=plan, noise=source)
    grid = (plan.stddev.double() / plan.precision.steps).unsqueeze(-1)
    return (output.double() / grid / plan.precision.steps).numpy()


def most_alike(blocks):
    return max(
        abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1])) for a, b in itertools.combinations(blocks, 2)
    )


# Of 320 independent pairs a correlation is above 0.35 with probability 1e-10; there are fewer than a thousand pairs.
ALIKE = 0.35


def test_no_integer_comes_twice_across_heads_entries_calls_and_ranks():
    source = noise()
    calls = [released_integers(source), released_integers(source)]
    calls += [released_integers(noise(rank=1)), released_integers(noise("another key"))]
    blocks = [head for call in calls for entry in call for head in entry]
    assert len(blocks) == 24
    assert most_alike(blocks) < ALIKE
    assert np.array_equal(released_integers(noise()), calls[0])


def test_a_generator_that_repeats_itself_across_heads_is_noticed(monkeypatch):
    original = room._Numbers.take

    def repeating(self, num):
        self._made, self._next = self._made[:0], 0
        return original(self, num)

    monkeypatch.setattr(room, "_PIECE", 1)
    monkeypatch.setattr(room._Numbers, "take", repeating)
    assert most_alike([head for entry in released_integers(noise()) for head in entry]) > 0.9


def test_a_call_that_repeats_its_number_is_noticed(monkeypatch):
    source = noise()
    first = released_integers(source)
    monkeypatch.setattr(source, "_next_call", 0)
    assert most_alike([first, released_integers(source)]) > 0.9


# 3 · 2 · 700 · 33 numbers: more than a chunk, so that tilings meet its end.
LARGE = {"batch": 3, "heads": 2, "queries": 700, "width": 33}


@pytest.mark.parametrize("per_slice", [1, 1 << 19])
@pytest.mark.parametrize("piece", [33, 7000, 1 << 17])
@pytest.mark.parametrize("threads", [1, 2])
def test_tilings_slices_and_threads_change_nothing(per_slice, piece, threads, monkeypatch):
    assert math.prod(LARGE.values()) > CHUNK
    tensors = rows(groups=2, value_width=33, **LARGE)
    plan = plan_of(tensors)
    expected = release_attention(*tensors, plan=plan, noise=noise())[0]
    monkeypatch.setattr(plain, "SLICE_NUMBERS", per_slice)
    monkeypatch.setattr(room, "_PIECE", piece)
    monkeypatch.setattr(room, "_CHUNKS", 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = release_attention(*tensors, plan=plan, noise=noise())[0]
    finally:
        torch.set_num_threads(before)
    # The kernel may tile otherwise; a step more or less is far below this.
    assert (found - expected).abs().max() < 1e-5


def test_the_scale_is_the_plans_and_one_ten_percent_smaller_is_noticed():
    """False-alarm rate 1e-9 at 96,000 numbers: their deviation is known to 0.0023, six of which are 0.014."""
    found = released_integers(noise(), batch=2, heads=3, queries=2000, width=8)
    assert abs(found.std() - 1.0) < 0.014
    assert abs((0.9 * found).std() - 1.0) > 0.014
    assert abs(found.mean()) < 6.2 / math.sqrt(found.size)


def test_gradients_pass_as_if_there_were_no_noise():
    tensors = [each.requires_grad_() for each in rows()]
    output, _ = dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), budget=BUDGET)
    with torch.no_grad():
        same, _ = dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), budget=BUDGET)
    assert (output - same).abs().max() < 1e-5
    ours = torch.autograd.grad(output.square().sum() / 2, tensors)
    secure = CallNoise(TestKey("exact"))
    other, _ = dp_flash_attention(*tensors, bounds=bounds(), noise=secure, budget=BUDGET)
    theirs = torch.autograd.grad((other * output.detach()).sum(), tensors)
    for mine, his in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, his, rtol=1e-4, atol=1e-6)
    # The graph keeps no path from the exact answer to the output but the identity.
    assert type(output.grad_fn).__name__ == "_OnGridBackward"


def test_a_release_says_what_it_rests_on():
    tensors = rows()
    _, release = dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), budget=BUDGET)
    assert release.epsilon(1e-6) <= 1.0
    assert release.delta(1.0) <= 1e-6
    assert release.distance > 0.0
    assert not any("stands for real numbers" in line for line in release.assumptions)
    assert any("Grover" in line for line in release.assumptions)
    assert "total variation" in release.guarantee.theorem
    assert "grid" in release.guarantee.sensitivity
    with pytest.raises(InvalidInputError, match="no place for finite precision"):
        _ = release.event
    _, real = dp_flash_attention(*tensors, bounds=bounds(), noise=noise(name="secure"), budget=BUDGET)
    assert any("stands for real numbers" in line for line in real.assumptions)
    assert real.event.noise_multiplier == pytest.approx(1.0 / real.mu)


def test_entropy_on_the_callers_word_is_said():
    source = CallNoise(SecretKey.from_bytes(bytes(range(32))), name="exact")
    _, release = dp_flash_attention(*rows(), bounds=bounds(), noise=source, budget=BUDGET)
    assert any(line.startswith("on the caller's word:") for line in release.assumptions)
    _, drawn = dp_flash_attention(
        *rows(), bounds=bounds(), noise=CallNoise.from_os(name="exact"), budget=BUDGET
    )
    assert not any("caller's word" in line for line in drawn.assumptions)


def test_a_filter_pays_for_finite_precision_or_refuses_before_anything_is_spent():
    tensors, source = rows(), noise()
    plain_gate = GaussianFilter(BUDGET)
    with pytest.raises(BudgetExhaustedError, match="finite_precision_share"):
        dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=0.1, privacy_filter=plain_gate)
    assert plain_gate.num_releases == 0
    assert source.next_call == 0
    gate = GaussianFilter(BUDGET, finite_precision_share=0.01)
    for _ in range(3):
        dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=gate.share(3), privacy_filter=gate)
    with pytest.raises(BudgetExhaustedError, match="nothing was computed"):
        dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=gate.share(3), privacy_filter=gate)
    assert source.next_call == 3
    assert gate.mu < gdp_mu(BUDGET)


@pytest.mark.parametrize(("planned", "made"), [("exact", "secure"), ("secure", "exact"), ("exact", "fast")])
def test_a_plan_for_another_kind_of_noise_is_refused(planned, made):
    tensors, source = rows(), noise(name=made)
    with pytest.raises(InvalidInputError, match=r"^noise is .*as planned"):
        release_attention(*tensors, plan=plan_of(tensors, noise=planned), noise=source)
    assert source.next_call == 0


def test_a_back_end_that_cannot_is_passed_over_or_refused_by_name(monkeypatch):
    class Own(plain.PlainBackend):
        name = "triton"
        noises = ("secure", "fast")

        def release(self, call):
            raise AssertionError("it has noise of its own")

    own = Own(registry._KERNELS["math"][0])
    monkeypatch.setattr(registry, "_load_triton", lambda: own)
    monkeypatch.setattr(registry, "measured_seconds", lambda name, shape: 0.0 if name == "triton" else 1.0)
    tensors, source = rows(), noise()
    gate = GaussianFilter(BUDGET, finite_precision_share=0.01)
    settings = {"bounds": bounds(), "mu": 0.01, "privacy_filter": gate}
    with pytest.raises(InvalidInputError, match="cannot make 'exact'"):
        dp_flash_attention(*tensors, noise=source, backend="triton", **settings)
    assert source.next_call == 0
    assert gate.num_releases == 0
    assert dp_flash_attention(*tensors, noise=source, **settings)[1].backend == "flash"
    with pytest.raises(AssertionError):
        dp_flash_attention(*tensors, noise=noise(name="secure"), **settings)


def test_the_kernel_never_makes_normals_for_exact_noise():
    with pytest.raises(NoiseUnavailableError, match="exact"):
        kernel_key(noise(cipher="chacha20").claim())


def test_a_stream_without_its_steps_is_refused():
    out = torch.zeros(1, 1, 2, 2)
    for source in (noise(), noise(name="secure")):
        with pytest.raises(InvalidInputError, match=r"noise\.steps"):
            room.add_on_grid_into(out, out, torch.ones(1, 1, 2), source.claim())


@pytest.mark.parametrize("bad", [{"cipher": "shake256"}, {"cipher": "rot13"}, {"name": "Exact"}])
def test_a_source_that_cannot_be_is_refused_when_it_is_made(bad):
    with pytest.raises(InvalidInputError):
        noise(**bad)


def test_the_module_takes_it():
    relation = NeighboringRelation.REPLACE_ONE
    module = DPFlashAttention(
        16, 2, bounds=bounds(neighboring_relation=relation), noise=noise(), budget=BUDGET, batch_first=True
    )
    context = torch.randn(1, 20, 16)
    output, release = module(torch.randn(1, 3, 16), context, context)
    assert output.shape == (1, 3, 16)
    assert release.noise == "exact"
    assert release.epsilon(1e-6) <= 1.0
