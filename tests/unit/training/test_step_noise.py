"""Noise on the grid: exact sums of whole numbers, positions that repeat and never meet, and the right scale."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_attention.core.errors import InvalidInputError, NoiseReuseError, RunStateError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.noise.rounded_gaussian import RoundedGaussian
from dp_flash_attention.training import PrivacyPlan, step_noise
from dp_flash_attention.training import session as session_module
from dp_flash_attention.training.secrets import RunKeys
from dp_flash_attention.training.step_noise import GridNoise, round_to_steps
from dp_flash_attention.training.verification import check_noise_scale, check_steps_follow_definition

KEY = TestKey("step noise")
SHAPES = {"a": (3, 5), "b": (7,), "c": ()}
COUNT = 15 + 7 + 1


def plan(num_parameters: int = COUNT, **changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "epsilon": 12.0,
        "delta": 1e-3,
        "sampling_prob": 0.04,
        "expected_batch_size": 5.0,
        "num_steps": 8,
        "l2_clip_norm": 0.5,
        "noise_multiplier": 1.3,
        "noise": "exact",
        "num_parameters": num_parameters,
    }
    return PrivacyPlan(**(values | changes))


def sums(value: float = 0.0) -> dict[str, Tensor]:
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


def test_what_comes_out_lies_on_the_grid_and_is_the_sum_of_both() -> None:
    noise = GridNoise(plan(), KEY, num_parameters=COUNT)
    precision = plan().finite_precision
    assert precision is not None
    value = 0.123456
    zero, shifted = dict(noise.add(sums(), step=2)), dict(noise.add(sums(value), step=2))
    for name, shape in SHAPES.items():
        steps = shifted[name] / precision.grid
        assert shifted[name].shape == shape
        assert torch.equal(steps, steps.round())
        moved = float(torch.tensor(value).double() / precision.grid)
        assert torch.equal(steps - zero[name] / precision.grid, torch.full(shape, round(moved)).double())


def test_the_same_step_repeats_and_no_two_positions_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_noise, "GROUP_NUMBERS", 10)  # the tensors then need two streams
    seen = []
    for step in (0, 1, 5):
        first, again = (
            dict(GridNoise(plan(), KEY, num_parameters=COUNT).add(sums(), step=step)) for _ in "ab"
        )
        assert all(torch.equal(first[name], again[name]) for name in SHAPES)
        seen += [number for part in first.values() for number in part.flatten().tolist()]
    assert len(set(seen)) >= len(seen) - 1, "s is above a million: repeats are rare unless noise is reused"


def test_one_stream_for_two_groups_is_noticed_as_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_noise, "GROUP_NUMBERS", 10)
    draw = RoundedGaussian.draw

    def same(self: RoundedGaussian, key: Any, num: int, *, step: int, stream: int) -> Any:
        return draw(self, key, num, step=step, stream=0)

    monkeypatch.setattr(RoundedGaussian, "draw", same)
    parts = dict(GridNoise(plan(), KEY, num_parameters=COUNT).add(sums(), step=0))
    numbers = [number for part in parts.values() for number in part.flatten().tolist()]
    assert len(set(numbers)) < len(numbers) - 5


def test_sums_beyond_the_grid_are_cut_off_and_those_that_are_no_numbers_refused() -> None:
    assert round_to_steps(torch.tensor([1e30, -1e30, 0.5, 1.5, -2.4]), 1.0).tolist() == [
        2.0**51,
        -(2.0**51),
        0.0,
        2.0,
        -2.0,
    ]
    noise = GridNoise(plan(), KEY, num_parameters=COUNT)
    for wrong in (math.nan, math.inf):
        with pytest.raises(RunStateError, match="not finite"):
            list(noise.add(sums() | {"c": torch.tensor(wrong)}, step=0))


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="num_parameters"):
        GridNoise(plan(COUNT + 1), KEY, num_parameters=COUNT)
    with pytest.raises(InvalidInputError, match="num_parameters"):
        released(plan(COUNT))


class Records:
    def __init__(self) -> None:
        self.x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return 50

    def take(self, indices: Tensor) -> Tensor:
        return self.x[indices]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))


NETWORK_COUNT = 4 * 64 + 64 + 64 + 1


def released(the_plan: PrivacyPlan) -> Tensor:
    """Returns the updates of a session whose gradients are zero."""
    model = network().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session = session_module.make_private(model, optimizer, the_plan, keys=RunKeys(TestKey("zero gradients")))
    updates = []
    for step in session.steps(Records(), microbatch_size=2):
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        for microbatch in step:
            session.accumulate(microbatch, lambda model, x: model(x.double())[:, 0] * 0.0)
        session.apply(step)
        updates.append(before - torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.cat(updates)


def test_the_released_noise_has_the_stated_scale_and_ten_percent_less_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """3,080 numbers; false alarms 1e-6, and the key is fixed. 10 % off is 7 standard errors."""
    the_plan = plan(NETWORK_COUNT)
    updates = released(the_plan)
    assert len(updates) == 8 * NETWORK_COUNT
    assert check_noise_scale(updates, stddev=the_plan.release_stddev).passed
    draw = RoundedGaussian.draw
    monkeypatch.setattr(RoundedGaussian, "draw", lambda *args, **kwargs: draw(*args, **kwargs) * 0.9)
    assert not check_noise_scale(released(the_plan), stddev=the_plan.release_stddev).passed


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x)[:, 0] - 3.0 * x[:, 0]) ** 2


def steps_follow_definition() -> bool:
    the_plan = plan(NETWORK_COUNT)
    check = check_steps_follow_definition(
        network(), loss_fn, Records(), the_plan, key=TestKey("exact steps"), microbatch_size=2
    )
    return check.passed


def no_noise(patch: pytest.MonkeyPatch) -> None:
    draw = RoundedGaussian.draw
    patch.setattr(GridNoise, "_on_grid", lambda self, total, noise: total.double())
    assert draw is RoundedGaussian.draw


def one_noise_for_all_steps(patch: pytest.MonkeyPatch) -> None:
    add = GridNoise.add
    patch.setattr(GridNoise, "add", lambda self, sums, *, step: add(self, sums, step=0))


def sum_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step_noise, "round_to_steps", lambda total, grid: torch.zeros_like(total).double())


def test_each_step_follows_its_definition() -> None:
    assert steps_follow_definition()


@pytest.mark.parametrize("mutation", [no_noise, one_noise_for_all_steps, sum_left_out])
def test_engine_mutation_is_noticed(mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    assert not steps_follow_definition()


def test_noise_of_a_step_whose_release_failed_is_not_used_again() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session = session_module.make_private(
        model, optimizer, plan(NETWORK_COUNT), keys=RunKeys(TestKey("fails"))
    )
    step = next(session.steps(Records(), microbatch_size=8))
    for microbatch in step:
        session.accumulate(microbatch, loss_fn)

    def broken() -> None:
        raise OSError("disk")

    optimizer.step = broken  # type: ignore[assignment,method-assign]
    with pytest.raises(OSError, match="disk"):
        session.apply(step)
    with pytest.raises(NoiseReuseError):
        session.apply(step)
