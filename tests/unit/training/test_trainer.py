"""What ``PrivateTrainer`` adds to the session: a directory, resuming, and refusing to resume what differs."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dp_flash_attention.clipping.clip_groups import ClipGroup
from dp_flash_attention.core.errors import (
    ExampleCouplingError,
    InvalidInputError,
    MissingRuleError,
    RunStateError,
)
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import (
    ExecutionConfig,
    PrivacyPlan,
    PrivateTrainer,
    RunDirectory,
    TrainingResult,
)
from dp_flash_attention.training import trainer as trainer_module

PLAN = PrivacyPlan(
    epsilon=60.0,
    delta=1e-3,
    sampling_prob=0.2,
    expected_batch_size=10.0,
    num_steps=6,
    l2_clip_norm=0.5,
    noise_multiplier=1.0,
    accountant="rdp",
)


class Stopped(BaseException):
    """Stands for the end of the process."""


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x)[:, 0] - x[:, 0]) ** 2


def other_loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return loss_fn(model, x)


def edited_loss_fn() -> Any:
    def edited(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x)[:, 0] - 2 * x[:, 0]) ** 2

    edited.__module__, edited.__qualname__ = loss_fn.__module__, loss_fn.__qualname__
    return edited


def records(n: int = 40) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(3))


def trainer(out: Any, **changes: Any) -> PrivateTrainer:
    torch.manual_seed(changes.pop("seed", 0))
    model = changes.pop("model", None) or nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 1))
    optimizer = changes.pop("optimizer", torch.optim.AdamW)(model.parameters(), lr=changes.pop("lr", 0.05))
    values: dict[str, Any] = {
        "plan": PLAN,
        "optimizer": optimizer,
        "loss_fn": loss_fn,
        "out_dir": out,
        "execution": ExecutionConfig(microbatch_size=4, checkpoint_every=2),
        "ema_decay": 0.8,
        "test_key": TestKey("trainer"),
    }
    return PrivateTrainer(model, **(values | changes))


def stop_after(step: int, how: Callable[[], None]) -> Callable[[Any], None]:
    def on_step(report: Any) -> None:
        if report.step == step:
            how()

    return on_step


def dies() -> None:
    raise Stopped


def stopped_run(path: Path, step: int = 3) -> None:
    with pytest.raises(Stopped):
        trainer(path, on_step=stop_after(step, dies)).fit(records())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return trainer(tmp_path_factory.mktemp("runs") / "unbroken").fit(records())


def test_what_a_run_says_and_leaves(unbroken: TrainingResult) -> None:
    assert (unbroken.num_steps, unbroken.first_step, unbroken.secrets_destroyed) == (6, 0, True)
    assert unbroken.uses_test_key
    assert unbroken.epsilon_spent == PLAN.accounted_epsilon
    names = {path.name for path in unbroken.model_path.parent.iterdir()}
    assert names == {"run.json", ".lock", "checkpoints", "diagnostics", "model.safetensors"}


def test_a_compiled_run_draws_the_same_noise_and_masks_and_resumes(
    tmp_path: Path, unbroken: TrainingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph as it was traced; that the compiler keeps to it is looked at in ``test_compiled``."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    execution = ExecutionConfig(microbatch_size=4, checkpoint_every=2, compile=True)
    with pytest.raises(Stopped):
        trainer(tmp_path / "run", execution=execution, on_step=stop_after(3, dies)).fit(records())
    with pytest.raises(RunStateError, match="compile"):
        trainer(tmp_path / "run").fit(records(), resume=True)
    resumed = trainer(tmp_path / "run", execution=execution).fit(records(), resume=True)
    expected = load_file(unbroken.model_path)
    for name, value in load_file(resumed.model_path).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [1, 2, 3, 6])
def test_a_stopped_run_ends_as_the_unbroken_one(tmp_path: Path, unbroken: TrainingResult, step: int) -> None:
    stopped_run(tmp_path / "run", step)
    # Another process has other initial weights; the first checkpoint decides.
    result = trainer(tmp_path / "run", seed=9).fit(records(), resume=True)
    assert result.first_step == 2 * (step // 2)
    assert result.model_path.read_bytes() == unbroken.model_path.read_bytes()
    lines = (tmp_path / "run" / "diagnostics" / "steps.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["step"] for line in lines] == list(range(6))


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("strategy", ["bookkeeping", "one_example"])
def test_every_way_to_clip_ends_as_its_unbroken_run(
    tmp_path: Path, unbroken: TrainingResult, strategy: Any, clipping: Any
) -> None:
    options = {
        "execution": ExecutionConfig(
            microbatch_size=1 if strategy == "one_example" else 4, checkpoint_every=2, strategy=strategy
        ),
        "plan": replace(PLAN, clipping=clipping),
    }
    whole = trainer(tmp_path / "whole", **options).fit(records())
    with pytest.raises(Stopped):
        trainer(tmp_path / "run", on_step=stop_after(3, dies), **options).fit(records())
    result = trainer(tmp_path / "run", seed=9, **options).fit(records(), resume=True)
    assert result.first_step == 2
    assert result.model_path.read_bytes() == whole.model_path.read_bytes()
    is_default = (strategy, clipping) == ("bookkeeping", "flat")
    assert (whole.model_path.read_bytes() == unbroken.model_path.read_bytes()) is is_default


def test_groups_of_ones_own_are_trained_and_remembered(tmp_path: Path) -> None:
    groups = (
        ClipGroup(name="weights", parameters=("0.weight", "2.weight"), weight=3.0),
        ClipGroup(name="biases", parameters=("0.bias", "2.bias")),
    )
    plan = replace(PLAN, clipping="per_layer", clip_groups=groups)
    with pytest.raises(Stopped):
        trainer(tmp_path / "run", plan=plan, on_step=stop_after(3, dies)).fit(records())
    with pytest.raises(RunStateError, match=r"^plan\.clip_groups was .* same noise"):
        trainer(tmp_path / "run", plan=replace(plan, clip_groups=groups[::-1])).fit(records(), resume=True)
    trainer(tmp_path / "run", plan=plan).fit(records(), resume=True)


def test_a_model_without_rules_is_trained_one_example_at_a_time(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    with pytest.raises(MissingRuleError):
        trainer(tmp_path / "refused", model=Scaled()).fit(records())
    execution = ExecutionConfig(microbatch_size=1, strategy="one_example")
    assert trainer(tmp_path / "run", model=Scaled(), execution=execution).fit(records()).num_steps == 6


def test_a_fused_optimizer_s_run_is_resumed_bit_by_bit_and_is_its_plain_one_s_up_to_rounding(
    tmp_path: Path, unbroken: TrainingResult
) -> None:
    fused = {"optimizer": partial(torch.optim.AdamW, fused=True)}
    whole = trainer(tmp_path / "whole", **fused).fit(records())
    with pytest.raises(Stopped):
        trainer(tmp_path / "run", on_step=stop_after(3, dies), **fused).fit(records())
    with pytest.raises(RunStateError, match="fused"):
        trainer(tmp_path / "run").fit(records(), resume=True)
    resumed = trainer(tmp_path / "run", seed=9, **fused).fit(records(), resume=True)
    assert resumed.model_path.read_bytes() == whole.model_path.read_bytes()
    expected = load_file(unbroken.model_path)
    for name, value in load_file(whole.model_path).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_ctrl_c_saves_the_step_that_is_whole(tmp_path: Path, unbroken: TrainingResult) -> None:
    press = stop_after(3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="3 of 6 steps are saved"):
        trainer(tmp_path / "run", on_step=press).fit(records())
    result = trainer(tmp_path / "run").fit(records(), resume=True)
    assert result.first_step == 3
    assert result.model_path.read_bytes() == unbroken.model_path.read_bytes()


def test_a_finished_run_can_be_asked_again(unbroken: TrainingResult, tmp_path: Path) -> None:
    again = trainer(unbroken.model_path.parent).fit(records(), resume=True)
    assert (again.first_step, again.secrets_destroyed, again.uses_test_key) == (6, True, True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"plan": PrivacyPlan(**{**PLAN.to_dict(), "noise_multiplier": 2.0})}, "plan.noise_multiplier"),
        ({"plan": PrivacyPlan(**{**PLAN.to_dict(), "l2_clip_norm": 5.0})}, "plan.l2_clip_norm"),
        ({"plan": PrivacyPlan(**{**PLAN.to_dict(), "clipping": "per_layer"})}, "plan.clipping"),
        ({"execution": ExecutionConfig(microbatch_size=1, strategy="one_example")}, "microbatch_size"),
        ({"execution": ExecutionConfig(microbatch_size=4, strategy="two_pass")}, "strategy"),
        ({"lr": 0.06}, "optimizer.groups"),
        ({"optimizer": torch.optim.SGD}, "optimizer.class"),
        ({"loss_fn": other_loss_fn}, "loss_fn"),
        ({"loss_fn": edited_loss_fn()}, "loss_fn"),
        ({"model": nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3), nn.Linear(5, 1))}, "model.modules"),
        ({"ema_decay": None}, "ema_decay"),
        ({"lr_schedule": lambda step: 0.5}, "lr_schedule"),
        ({"settings": {"cut": 3}}, "settings.cut"),
        ({"execution": ExecutionConfig(microbatch_size=5)}, "microbatch_size"),
        ({"fallback_modules": ("0",)}, "fallback_modules"),
        ({"model": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))}, "model.modules"),
    ],
)
def test_a_run_is_not_resumed_with_anything_else(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    stopped_run(tmp_path / "run")
    with pytest.raises(RunStateError, match=f"^{named} was .* same noise"):
        trainer(tmp_path / "run", **changes).fit(records(), resume=True)


def test_a_run_is_not_resumed_with_other_data(tmp_path: Path) -> None:
    stopped_run(tmp_path / "run")
    changed = records()
    changed[-1, -1] += 1.0
    for data in (changed, records(39)):
        with pytest.raises(RunStateError, match="the data is not what"):
            trainer(tmp_path / "run").fit(data, resume=True)


def test_a_run_without_its_checkpoints_does_not_go_on(tmp_path: Path) -> None:
    stopped_run(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(RunStateError, match="holds no checkpoint"):
        trainer(tmp_path / "run").fit(records(), resume=True)


def test_what_cannot_be_trained_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ExampleCouplingError):
        trainer(tmp_path / "run", loss_fn=lambda model, x: loss_fn(model, x) / len(x)).fit(records())
    with pytest.raises(InvalidInputError):
        trainer(tmp_path / "run").fit([])
    assert not (tmp_path / "run").exists()


def test_the_owner_of_a_directory_finishes_it(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run", test_key=TestKey("trainer")) as run:
        result = trainer(run).fit(records())
        assert not result.secrets_destroyed
        assert run.keys is not None
        run.finish()


def test_a_model_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    import safetensors.torch

    error = type("SafetensorError", (Exception,), {})("No space left on device")

    def full(model: nn.Module, path: str) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_model", full)
        with pytest.raises(RunStateError, match=r"model\.safetensors cannot be written .*No space left"):
            trainer(tmp_path / "run").fit(records())
    assert trainer(tmp_path / "run").fit(records(), resume=True).first_step == 6


def test_settings_of_torch_come_back() -> None:
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())

    def fails() -> None:
        with trainer_module._reproducible(before[0] + 1, torch.device("cpu")):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_num_threads() == before[0] + 1
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
