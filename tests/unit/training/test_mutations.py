"""Plants each way in which an engine can break its promise, and shows that a named check notices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_attention.clipping import clip_groups, group_clipping
from dp_flash_attention.clipping.accumulator import ClippedGradientAccumulator
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import PrivacyPlan, step_noise
from dp_flash_attention.training import session as session_module
from dp_flash_attention.training.microbatches import LogicalStep
from dp_flash_attention.training.sampler import PoissonSampler
from dp_flash_attention.training.session import PrivateSession
from dp_flash_attention.training.verification import (
    Check,
    check_batch_sizes,
    check_inclusion_counts,
    check_noise_scale,
    check_steps_follow_definition,
)

NUM_RECORDS = 50
ADD_NOISE = step_noise.add_normals


class Records:
    def __init__(self, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(NUM_RECORDS, 4, generator=generator) * scale

    def __len__(self) -> int:
        return NUM_RECORDS

    def take(self, indices: Tensor) -> Tensor:
        return self.x[indices]


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x)[:, 0] - 3.0 * x[:, 0]) ** 2


def plan(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "epsilon": 60.0,
        "delta": 1e-3,
        "sampling_prob": 0.04,
        "expected_batch_size": 5.0,  # not 0.04 · 50: the user's number, which no code may derive
        "num_steps": 8,
        "l2_clip_norm": 0.5,
        "noise_multiplier": 1.0,
        "accountant": "rdp",
    }
    return PrivacyPlan(**(values | changes))


def definition_check(clipping: str = "flat") -> Check:
    """Eight steps: with this key one is empty and others have several microbatches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    return check_steps_follow_definition(
        model, loss_fn, Records(), plan(clipping=clipping), key=TestKey("mutations"), microbatch_size=2
    )


def no_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step_noise, "add_normals", lambda generator, total, **position: total)


def noise_over_sqrt_2(patch: pytest.MonkeyPatch) -> None:
    def weak(generator: Any, total: Tensor, *, stddev: float, step: int, stream: int) -> Tensor:
        return ADD_NOISE(generator, total, stddev=stddev / math.sqrt(2.0), step=step, stream=stream)

    patch.setattr(step_noise, "add_normals", weak)


def noise_without_c(patch: pytest.MonkeyPatch) -> None:
    def unscaled(generator: Any, total: Tensor, *, stddev: float, step: int, stream: int) -> Tensor:
        return ADD_NOISE(generator, total, stddev=1.0, step=step, stream=stream)

    patch.setattr(step_noise, "add_normals", unscaled)


def one_noise_for_all_steps(patch: pytest.MonkeyPatch) -> None:
    def same(generator: Any, total: Tensor, *, stddev: float, step: int, stream: int) -> Tensor:
        return ADD_NOISE(generator, total, stddev=stddev, step=0, stream=stream)

    patch.setattr(step_noise, "add_normals", same)


def wrong_clip_norm(patch: pytest.MonkeyPatch) -> None:
    original = group_clipping.flat_clip_factors

    def twice(sq_norms_B: Tensor, *, l2_clip_norm: float, weights_B: Tensor) -> Any:
        return original(sq_norms_B, l2_clip_norm=2.0 * l2_clip_norm, weights_B=weights_B)

    patch.setattr(group_clipping, "flat_clip_factors", twice)


def skipped_parameter(patch: pytest.MonkeyPatch) -> None:
    original = PrivateSession._set_noisy_gradients

    def all_but_the_first(self: PrivateSession, step_index: int) -> None:
        original(self, step_index)
        next(iter(self.parameters.values())).grad = None

    patch.setattr(PrivateSession, "_set_noisy_gradients", all_but_the_first)


def normaliser_from_the_data(patch: pytest.MonkeyPatch) -> None:
    original = PrivateSession._set_noisy_gradients

    def by_true_size(self: PrivateSession, step_index: int) -> None:
        original(self, step_index)
        true_size = NUM_RECORDS * self.plan.sampling_prob
        for parameter in self.parameters.values():
            assert parameter.grad is not None
            parameter.grad *= self.plan.expected_batch_size / true_size

    patch.setattr(PrivateSession, "_set_noisy_gradients", by_true_size)


def empty_batch_skipped(patch: pytest.MonkeyPatch) -> None:
    original = PrivateSession.apply

    def skipping(self: PrivateSession, step: LogicalStep) -> None:
        if step.num_microbatches == 0:
            self._open_step, self._step_index = None, step.index + 1
            return
        original(self, step)

    patch.setattr(PrivateSession, "apply", skipping)


def noise_per_microbatch(patch: pytest.MonkeyPatch) -> None:
    original = PrivateSession.accumulate

    def noisy(self: PrivateSession, microbatch: Any, loss: Any) -> Any:
        seen = original(self, microbatch, loss)
        for stream, total in enumerate(self._accumulator.sums.values()):
            ADD_NOISE(self._generator, total, stddev=0.5, step=1000 + microbatch.position, stream=stream)
        return seen

    patch.setattr(PrivateSession, "accumulate", noisy)


def clip_per_microbatch_sum_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ClippedGradientAccumulator, "reset", lambda self: None)


def padding_counted(patch: pytest.MonkeyPatch) -> None:
    original = session_module.static_chunks

    def all_ones(indices: Tensor, size: int) -> Any:
        return ((chunk, torch.ones_like(weights)) for chunk, weights in original(indices, size))

    patch.setattr(session_module, "static_chunks", all_ones)


def microbatch_dropped(patch: pytest.MonkeyPatch) -> None:
    original = session_module.static_chunks
    patch.setattr(session_module, "static_chunks", lambda indices, size: list(original(indices, size))[:1])


ENGINE_MUTATIONS: list[Callable[[pytest.MonkeyPatch], None]] = [
    no_noise,
    noise_over_sqrt_2,
    noise_without_c,
    one_noise_for_all_steps,
    wrong_clip_norm,
    skipped_parameter,
    normaliser_from_the_data,
    empty_batch_skipped,
    noise_per_microbatch,
    clip_per_microbatch_sum_kept,
    padding_counted,
    microbatch_dropped,
]


def c_for_each_layer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clip_groups.math, "hypot", lambda *weights: 1.0)


def noise_of_one_layer(patch: pytest.MonkeyPatch) -> None:
    """Scales the noise to C_k = C / sqrt(K), the bound of one of the two layers."""
    noise_over_sqrt_2(patch)


def flat_instead_of_per_layer(patch: pytest.MonkeyPatch) -> None:
    original = session_module.ClippedGradientAccumulator

    def flat(model: nn.Module, **options: Any) -> ClippedGradientAccumulator:
        return original(model, **(options | {"clipping": "flat", "clip_groups": None}))

    patch.setattr(session_module, "ClippedGradientAccumulator", flat)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_the_unchanged_engine_passes(clipping: str) -> None:
    check = definition_check(clipping)
    assert check.passed, check


@pytest.mark.parametrize("mutation", [c_for_each_layer, noise_of_one_layer, flat_instead_of_per_layer])
def test_mutation_of_clipping_by_layer_is_noticed(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: Any
) -> None:
    mutation(monkeypatch)
    check = definition_check("per_layer")
    assert not check.passed
    assert check.statistic > 30 * check.high, "the margin between a bug and rounding"


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("mutation", ENGINE_MUTATIONS)
def test_engine_mutation_is_noticed(
    mutation: Callable[[pytest.MonkeyPatch], None], clipping: str, monkeypatch: Any
) -> None:
    mutation(monkeypatch)
    check = definition_check(clipping)
    assert not check.passed
    assert check.statistic > 30 * check.high, "the margin between a bug and rounding"


# --- the released noise, with gradients of zero; false alarms: 1e-6 a test, and the keys are fixed


def released_updates(num_steps: int = 4) -> tuple[Tensor, float]:
    """Returns the updates of a session whose gradients are zero, and the deviation they must have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    the_plan = plan(num_steps=num_steps, noise_multiplier=1.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session = session_module.make_private(
        model, optimizer, the_plan, keys=session_module.RunKeys(TestKey("zero gradients"))
    )
    updates = []
    for step in session.steps(Records(), microbatch_size=2):
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        for microbatch in step:
            session.accumulate(microbatch, lambda model, x: model(x.double())[:, 0] * 0.0)
        session.apply(step)
        updates.append(before - torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.cat(updates), the_plan.release_stddev


def test_released_noise_has_the_stated_scale() -> None:
    updates, stddev = released_updates()
    assert stddev == pytest.approx(1.3 * 0.5 / 5.0)
    assert check_noise_scale(updates, stddev=stddev).passed
    # The check has the power to tell 20 % less or more noise with these 1,540 numbers.
    assert not check_noise_scale(updates, stddev=1.2 * stddev).passed
    assert not check_noise_scale(updates, stddev=stddev / 1.2).passed


@pytest.mark.parametrize("mutation", [no_noise, noise_over_sqrt_2, noise_without_c, normaliser_from_the_data])
def test_noise_scale_mutation_is_noticed(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    updates, stddev = released_updates()
    assert not check_noise_scale(updates, stddev=stddev).passed


# --- the sampler; false alarms: 1e-6 a check, and the key is fixed

SAMPLED_RECORDS, SAMPLED_STEPS, SAMPLING_PROB = 2000, 400, 0.05


def sampling_checks() -> list[Check]:
    sampler = PoissonSampler(
        SAMPLED_RECORDS, plan(sampling_prob=SAMPLING_PROB, delta=1e-4), TestKey("sampler").derive("sampling")
    )
    counts, sizes = torch.zeros(SAMPLED_RECORDS, dtype=torch.int64), []
    for step in range(SAMPLED_STEPS):
        indices = sampler.indices(step)
        counts[indices] += 1
        sizes.append(len(indices))
    return [
        check_batch_sizes(sizes, num_records=SAMPLED_RECORDS, sampling_prob=SAMPLING_PROB),
        check_inclusion_counts(counts, num_steps=SAMPLED_STEPS, sampling_prob=SAMPLING_PROB),
    ]


def test_poisson_sampling_passes() -> None:
    assert all(check.passed for check in sampling_checks()), sampling_checks()


def test_shuffled_batches_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = round(SAMPLED_RECORDS * SAMPLING_PROB)
    steps_per_epoch = SAMPLED_RECORDS // batch

    def shuffled(self: PoissonSampler, step: int) -> Tensor:
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(SAMPLED_RECORDS, generator=torch.Generator().manual_seed(epoch))
        return order[position * batch : (position + 1) * batch]

    monkeypatch.setattr(PoissonSampler, "indices", shuffled)
    sizes, counts = sampling_checks()
    assert not sizes.passed
    assert sizes.statistic == 0.0, "all batches have the same size"
    assert not counts.passed
    assert counts.statistic == 0.0, "every record takes part once an epoch"


def test_fixed_size_draws_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(self: PoissonSampler, step: int) -> Tensor:
        return torch.randperm(SAMPLED_RECORDS, generator=torch.Generator().manual_seed(step))[:100]

    monkeypatch.setattr(PoissonSampler, "indices", drawn)
    sizes, counts = sampling_checks()
    assert not sizes.passed
    assert counts.passed, "each record alone looks as in a Poisson sample"


def test_twice_the_sampling_probability_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PoissonSampler.indices

    def twice(self: PoissonSampler, step: int) -> Tensor:
        return torch.cat([original(self, step), original(self, step + 10_000)]).unique()

    monkeypatch.setattr(PoissonSampler, "indices", twice)
    assert not any(check.passed for check in sampling_checks())
