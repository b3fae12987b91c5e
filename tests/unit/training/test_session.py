"""The engine's state machine and what it releases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from dp_flash_attention.core.errors import (
    BudgetExhaustedError,
    ExampleCouplingError,
    InvalidInputError,
    MissingRuleError,
    NoiseReuseError,
    RunStateError,
)
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import PrivacyPlan, RunKeys, make_private, step_noise
from dp_flash_attention.training.microbatches import LogicalStep
from dp_flash_attention.training.session import PrivateSession
from dp_flash_attention.training.verification import check_steps_follow_definition

NUM_RECORDS = 60


class Records:
    def __init__(self, n: int = NUM_RECORDS) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 4, generator=generator)
        self.y = torch.randn(n, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        return {"x": self.x[indices], "y": self.y[indices]}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


def loss_fn(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    return (model(rows["x"])[:, 0] - rows["y"]) ** 2


def small_model(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 1))


def plan(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "epsilon": 60.0,
        "delta": 1e-3,
        "sampling_prob": 0.2,
        "expected_batch_size": 10.0,
        "num_steps": 5,
        "l2_clip_norm": 0.5,
        "noise_multiplier": 1.0,
        "accountant": "rdp",
    }
    return PrivacyPlan(**(values | changes))


def session_of(
    model: nn.Module | None = None, the_plan: PrivacyPlan | None = None, **changes: Any
) -> PrivateSession:
    model = small_model() if model is None else model
    optimizer = changes.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    keys = changes.pop("keys", None) or RunKeys(TestKey("session"))
    return make_private(model, optimizer, the_plan or plan(), keys=keys, **changes)


def take_all_steps(session: PrivateSession, dataset: object, *, microbatch_size: int = 4) -> None:
    for step in session.steps(dataset, microbatch_size=microbatch_size):
        for microbatch in step:
            session.accumulate(microbatch, loss_fn)
        session.apply(step)


def parameters_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("microbatch_size", [1, 4, 64])
@pytest.mark.parametrize("noise", ["secure", "fast"])
def test_every_step_follows_the_definition(microbatch_size: int, noise: str) -> None:
    check = check_steps_follow_definition(
        small_model(),
        loss_fn,
        Records(),
        plan(noise=noise),
        key=TestKey("x"),
        microbatch_size=microbatch_size,
    )
    assert check.passed, check


def test_one_example_at_a_time_needs_microbatches_of_one() -> None:
    session = session_of(strategy="one_example")
    with pytest.raises(InvalidInputError, match="microbatch_size is 4, but it must be 1"):
        next(session.steps(Records(), microbatch_size=4))
    take_all_steps(session, Records(), microbatch_size=1)
    reference = session_of()
    take_all_steps(reference, Records(), microbatch_size=1)
    torch.testing.assert_close(parameters_of(session.model), parameters_of(reference.model))


def test_one_example_at_a_time_is_checked_on_several_records() -> None:
    """A microbatch holds one, and beside copies of itself it would show no state that is carried over."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(4, 1), torch.zeros(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x + self.last)
            self.last = x.detach().mean(0)
            return y

    session = session_of(model=Remembers(), strategy="one_example")
    with pytest.raises(ExampleCouplingError, match="ran before it"):
        take_all_steps(session, Records(), microbatch_size=1)


def test_groups_and_two_passes_are_refused_together() -> None:
    with pytest.raises(InvalidInputError, match="with clipping 'per_layer'"):
        session_of(the_plan=plan(clipping="per_layer"), strategy="two_pass")


def test_a_compiled_session_clips_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    models = []
    for compiled in (True, False):
        session = session_of(the_plan=plan(clipping="per_layer"), compile=compiled)
        take_all_steps(session, Records())
        models.append(parameters_of(session.model))
    torch.testing.assert_close(*models, rtol=1e-4, atol=1e-5)


def test_empty_batches_are_steps_with_noise() -> None:
    # 60 records at 1 % leave about half of the steps empty: 0.99^60 = 0.55.
    sparse = plan(sampling_prob=0.01, num_steps=8, expected_batch_size=0.6)
    session = session_of(the_plan=sparse)
    steps = session.steps(Records(), microbatch_size=4)
    empty = []
    for step in steps:
        before = parameters_of(session.model)
        for microbatch in step:
            session.accumulate(microbatch, loss_fn)
        session.apply(step)
        empty.append(step.num_microbatches == 0)
        assert not torch.equal(before, parameters_of(session.model))
    assert 0 < sum(empty) < 8
    assert session.step_index == 8
    assert check_steps_follow_definition(
        small_model(), loss_fn, Records(), sparse, key=TestKey("session"), microbatch_size=4
    ).passed


def test_a_session_without_keys_draws_secret_ones() -> None:
    ends = []
    for _ in range(2):
        model = small_model()
        session = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), plan(num_steps=1))
        assert not session.uses_test_key
        take_all_steps(session, Records())
        ends.append(parameters_of(model))
    assert not torch.equal(*ends)


def test_the_same_key_repeats_a_run_and_dropout_with_it() -> None:
    ends = []
    for seed in (1, 2):
        model = small_model(dropout=0.5)
        torch.manual_seed(seed)  # the caller's generator must not matter
        state = torch.get_rng_state()
        take_all_steps(session_of(model), Records())
        assert torch.equal(state, torch.get_rng_state())
        ends.append(parameters_of(model))
    assert torch.equal(*ends)


def test_epsilon_spent_grows_to_the_accounted_one() -> None:
    session = session_of()
    assert session.epsilon_spent == 0.0
    take_all_steps(session, Records())
    assert session.epsilon_spent == session.plan.accounted_epsilon <= session.plan.epsilon


def test_steps_beyond_the_plan_are_refused() -> None:
    session = session_of()
    take_all_steps(session, Records())
    before = parameters_of(session.model)
    with pytest.raises(BudgetExhaustedError, match="plan has 5 steps"):
        session.steps(session._source._dataset, microbatch_size=4)
    session._open_step = LogicalStep(5, session._source, [], torch.device("cpu"))
    with pytest.raises(BudgetExhaustedError):
        session.apply(session._open_step)
    assert torch.equal(before, parameters_of(session.model))


def test_a_skipped_microbatch_is_refused() -> None:
    session = session_of()
    step = next(session.steps(Records(), microbatch_size=2))
    first, second, *_ = step
    with pytest.raises(RunStateError, match="microbatch 0 of step 0 is next"):
        session.accumulate(second, loss_fn)
    session.accumulate(first, loss_fn)
    before = parameters_of(session.model)
    with pytest.raises(RunStateError, match="microbatch 1 of step 0 was not accumulated"):
        session.apply(step)
    assert torch.equal(before, parameters_of(session.model))


def test_a_microbatch_counts_once() -> None:
    session = session_of()
    step = next(session.steps(Records(), microbatch_size=2))
    first = next(iter(step))
    session.accumulate(first, loss_fn)
    with pytest.raises(RunStateError, match="microbatch 1 of step 0 is next"):
        session.accumulate(first, loss_fn)


def test_a_step_is_applied_once() -> None:
    session = session_of()
    step = next(session.steps(Records(), microbatch_size=64))
    for microbatch in step:
        session.accumulate(microbatch, loss_fn)
    session.apply(step)
    before = parameters_of(session.model)
    with pytest.raises(RunStateError, match="not open"):
        session.apply(step)
    with pytest.raises(RunStateError, match="no step is open"):
        session.accumulate(next(iter(step)), loss_fn)
    assert torch.equal(before, parameters_of(session.model))
    assert session.step_index == 1


def test_the_next_step_waits_for_apply() -> None:
    session = session_of()
    steps = session.steps(Records(), microbatch_size=64)
    next(steps)
    with pytest.raises(RunStateError, match="step 0 was not applied"):
        next(steps)


def test_a_broken_off_step_leaves_nothing_behind() -> None:
    broken, whole = session_of(), session_of()
    records = Records()
    step = next(broken.steps(records, microbatch_size=2))
    broken.accumulate(next(iter(step)), loss_fn)
    next(broken.steps(records, microbatch_size=2))
    with pytest.raises(RunStateError, match="not open"):
        broken.apply(step)
    take_all_steps(broken, records)
    take_all_steps(whole, records)
    assert torch.equal(parameters_of(broken.model), parameters_of(whole.model))


def test_noise_that_was_drawn_is_not_drawn_again() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise MemoryError

    model = small_model()
    session = session_of(model, optimizer=Failing(model.parameters(), lr=0.1))
    step = next(session.steps(Records(), microbatch_size=64))
    for microbatch in step:
        session.accumulate(microbatch, loss_fn)
    with pytest.raises(MemoryError):
        session.apply(step)
    with pytest.raises(NoiseReuseError, match="noise of step 0"):
        session.apply(step)


def test_all_noise_is_drawn_before_torch_divides_the_first_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's threads spin after a division, on the cores that the noise's threads need; the numbers are the same."""
    session, calls = session_of(), []
    right = step_noise.add_normals

    def spied(generator: Any, total: Tensor, **position: Any) -> Tensor:
        assert all(parameter.grad is None for parameter in session.model.parameters())
        calls.append(position["stream"])
        return right(generator, total, **position)

    monkeypatch.setattr(step_noise, "add_normals", spied)
    step = next(session.steps(Records(), microbatch_size=64))
    for microbatch in step:
        session.accumulate(microbatch, loss_fn)
    session.apply(step)
    assert calls == list(range(len(session.parameters)))


def test_keys_serve_one_session() -> None:
    keys = RunKeys(TestKey("one"))
    session_of(keys=keys)
    with pytest.raises(NoiseReuseError):
        session_of(keys=keys)


def test_a_foreign_optimizer_step_is_refused() -> None:
    session = session_of()
    before = parameters_of(session.model)
    loss_fn(session.model, Records().take(torch.arange(3))).sum().backward()
    with pytest.raises(RunStateError, match=r"outside of session\.apply"):
        session.optimizer.step()
    assert torch.equal(before, parameters_of(session.model))
    session.close()
    session.optimizer.step()
    assert not torch.equal(before, parameters_of(session.model))


def test_a_raw_gradient_in_grad_does_not_enter_the_step() -> None:
    raw, clean = session_of(), session_of()
    loss_fn(raw.model, Records().take(torch.arange(3))).sum().backward()
    take_all_steps(raw, Records())
    take_all_steps(clean, Records())
    assert torch.equal(parameters_of(raw.model), parameters_of(clean.model))


class _Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter([torch.zeros(4)])


@pytest.mark.parametrize(
    "dataset",
    [
        DataLoader(TensorDataset(torch.zeros(5, 4)), batch_size=2, shuffle=True),
        RandomSampler(range(5)),
        _Stream(),
        iter([torch.zeros(4)]),
        (row for row in [torch.zeros(4)]),
        {"x": torch.zeros(5)},
    ],
    ids=["loader", "sampler", "iterable", "iterator", "generator", "mapping"],
)
def test_batches_drawn_elsewhere_are_refused(dataset: object) -> None:
    with pytest.raises(InvalidInputError, match="cannot be accounted as Poisson"):
        session_of().steps(dataset, microbatch_size=2)


def test_pre_drawn_batches_cannot_be_fed_step_by_step() -> None:
    session = session_of()
    session.steps(Records(), microbatch_size=2)
    with pytest.raises(RunStateError, match="one data set"):
        session.steps(Records(), microbatch_size=2)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least one record"):
        session_of().steps([], microbatch_size=2)


def test_optimizer_and_model_must_hold_the_same_parameters() -> None:
    model = small_model()
    with pytest.raises(InvalidInputError, match=r"without 4\.weight, 4\.bias"):
        session_of(model, optimizer=torch.optim.SGD(model[:2].parameters(), lr=0.1))  # type: ignore[index]
    stranger = nn.Parameter(torch.zeros(3))
    with pytest.raises(InvalidInputError, match=r"not in the model, shape \(3,\)"):
        session_of(model, optimizer=torch.optim.SGD([*model.parameters(), stranger], lr=0.1))
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    with pytest.raises(InvalidInputError, match=r"0\.weight"):
        session_of(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_parameter_added_to_the_optimizer_later_is_refused() -> None:
    session = session_of(the_plan=plan(sampling_prob=0.05))
    step = next(session.steps(Records(), microbatch_size=64))
    for microbatch in step:
        session.accumulate(microbatch, loss_fn)
    session.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(InvalidInputError, match="private model alone"):
        session.apply(step)


def test_lbfgs_is_refused() -> None:
    model = small_model()
    with pytest.raises(InvalidInputError, match="LBFGS"):
        session_of(model, optimizer=torch.optim.LBFGS(model.parameters()))


def test_models_and_losses_that_couple_examples_are_refused() -> None:
    with pytest.raises(ExampleCouplingError):
        session_of(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    session = session_of()
    step = next(session.steps(Records(), microbatch_size=8))
    with pytest.raises(ExampleCouplingError):
        session.accumulate(next(iter(step)), lambda model, rows: loss_fn(model, rows) / rows["y"].abs().sum())


def test_a_parameter_that_sees_no_gradient_is_named() -> None:
    model = small_model()
    session = session_of(model)
    step = next(session.steps(Records(), microbatch_size=8))
    with pytest.raises(MissingRuleError, match=r"4\.weight"):
        session.accumulate(next(iter(step)), lambda model, rows: model[:2](rows["x"]).sum(1))


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_microbatch_size_is_checked(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="microbatch_size"):
        session_of().steps(Records(), microbatch_size=value)


def test_something_else_than_a_plan_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="PrivacyPlan"):
        session_of(the_plan={"epsilon": 1.0})  # type: ignore[arg-type]


def test_low_precision_parameters_get_gradients_of_their_own_dtype() -> None:
    model = small_model().to(torch.bfloat16)

    def low_loss(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
        return model(rows["x"].bfloat16())[:, 0].float() - rows["y"]

    session = session_of(model)
    step = next(session.steps(Records(), microbatch_size=16))
    before = parameters_of(model)
    for microbatch in step:
        session.accumulate(microbatch, low_loss)
    session.apply(step)
    assert not torch.equal(before, parameters_of(model))


def test_the_session_states_its_guarantee() -> None:
    guarantee = session_of().guarantee
    assert "L2 norm 0.5" in guarantee.sensitivity
    assert "sampling_prob" in guarantee.public
