"""The loop over a run's steps, and the state that carries it from one process to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.training.averaging import ParameterAverage
from dp_flash_attention.training.checkpoint import Checkpoint, save_checkpoint
from dp_flash_attention.training.diagnostics import DiagnosticsSink, StepTally
from dp_flash_attention.training.execution import ExecutionConfig
from dp_flash_attention.training.interrupt import DeferredInterrupt
from dp_flash_attention.training.microbatches import CollateFn, LogicalStep
from dp_flash_attention.training.progress import OnStep, Stopwatch
from dp_flash_attention.training.run_directory import RunDirectory
from dp_flash_attention.training.session import LossFn, PrivateSession

# Adam keeps two numbers in float32 for each parameter; others keep less.
_OPTIMIZER_BYTES_PER_PARAMETER = 8


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Everything that a step changes.

    Attributes:
        model: The model.
        optimizer: Its optimizer.
        average: The running average of the parameters, if there is one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: ParameterAverage | None

    def to_checkpoint(self, run: RunDirectory, step_index: int) -> Checkpoint:
        """Returns the state after ``step_index`` finished steps; tensors are not copied."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        return Checkpoint(run_id=run.run_id, step_index=step_index, state=state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores what ``to_checkpoint`` took."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def checkpoint_bytes(self) -> int:
        """Returns about how large a checkpoint gets."""
        tensors = list(self.model.state_dict().values())
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return size + trained * (_OPTIMIZER_BYTES_PER_PARAMETER + (0 if self.average is None else 4))


@dataclass(kw_only=True)
class TrainingLoop:
    """Takes a session's remaining steps.

    Attributes:
        session: The session.
        state: What checkpoints hold.
        run: Where they go.
        loss_fn: Per-example loss.
        execution: Settings of speed.
        diagnostics: Takes private data.
        collate_fn: See ``RecordSource``.
        lr_schedule: Factor of the learning rates as a function of the step.
        on_step: Called after each step.
    """

    session: PrivateSession
    state: RunState
    run: RunDirectory
    loss_fn: LossFn
    execution: ExecutionConfig
    diagnostics: DiagnosticsSink
    collate_fn: CollateFn | None = None
    lr_schedule: Callable[[int], float] | None = None
    on_step: OnStep | None = None
    _saved_step: int = field(init=False)
    _state_is_whole: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self._saved_step = self.session.step_index

    def take_steps(self, dataset: object) -> None:
        """Takes all remaining steps, with a checkpoint after the last.

        Raises:
            KeyboardInterrupt: After Ctrl-C, once the state is saved.
            RunStateError: If a checkpoint cannot be written.
        """
        if self.session.step_index == self.session.plan.num_steps:
            return
        with DeferredInterrupt() as interrupt:
            try:
                self._take_steps(dataset, interrupt)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._stopped()) from None

    def _take_steps(self, dataset: object, interrupt: DeferredInterrupt) -> None:
        plan, session = self.session.plan, self.session
        stopwatch = Stopwatch(plan, session.step_index)
        steps = session.steps(
            dataset, microbatch_size=self.execution.microbatch_size, collate_fn=self.collate_fn
        )
        for step in steps:
            tally = self._accumulate(step, interrupt)
            self._set_learning_rates(step.index)
            self._state_is_whole = False
            session.apply(step)
            if self.state.average is not None:
                self.state.average.update()
            self._state_is_whole = True
            self.diagnostics.write(tally.record(step.index))
            if (
                session.step_index % self.execution.checkpoint_every == 0
                or session.step_index == plan.num_steps
            ):
                self._save()
            if self.on_step is not None:
                self.on_step(stopwatch.report(session.step_index))

    def _accumulate(self, step: LogicalStep, interrupt: DeferredInterrupt) -> StepTally:
        tally = StepTally()
        interrupt.check()
        for microbatch in step:
            tally.add(microbatch.weights, self.session.accumulate(microbatch, self.loss_fn))
            # A step that is given up here has released nothing; it is drawn again on resuming.
            interrupt.check()
        return tally

    def _set_learning_rates(self, step: int) -> None:
        if self.lr_schedule is None:
            return
        factor = self.lr_schedule(step)
        for group in self.session.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _save(self) -> None:
        save_checkpoint(self.run.checkpoints, self.state.to_checkpoint(self.run, self.session.step_index))
        self._saved_step = self.session.step_index

    def _stopped(self) -> str:
        if self._state_is_whole and self._saved_step != self.session.step_index:
            self._save()
        return (
            f"Stopped; {self._saved_step} of {self.session.plan.num_steps} steps are saved in "
            f"{self.run.path}. Resume to go on; the run's secrets stay in {self.run.path / '.secrets'} "
            "until it is finished."
        )
