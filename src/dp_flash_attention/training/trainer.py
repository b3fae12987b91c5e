"""``PrivateTrainer``: a private run from first step to last, through crashes.

A run that is killed at any moment and resumed ends with the parameters of an unbroken one: the sample, the
noise and dropout of a step depend on the run's secrets and the step's number alone, the order of additions
on settings that a resumed run must share. On a CPU that is so bit by bit, and no noise is ever added to
two different sums. On a GPU the sums of a repeated step may differ in rounding unless the caller enables
PyTorch's deterministic algorithms; only one of them is ever released.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dp_flash_attention.clipping.norm_forms import NormForms, using
from dp_flash_attention.core.durable import is_disk_error, replaced_atomically
from dp_flash_attention.core.errors import RunStateError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import fingerprint
from dp_flash_attention.training.averaging import ParameterAverage
from dp_flash_attention.training.checkpoint import load_latest_checkpoint, save_checkpoint
from dp_flash_attention.training.diagnostics import DiagnosticsSink, JsonLinesDiagnostics
from dp_flash_attention.training.execution import ExecutionConfig
from dp_flash_attention.training.loop import RunState, TrainingLoop
from dp_flash_attention.training.measured_norms import forms_of_run, write_fallbacks
from dp_flash_attention.training.memory_plan import measured_peaks, require_fit
from dp_flash_attention.training.microbatches import CollateFn, RecordSource
from dp_flash_attention.training.plan import PrivacyPlan
from dp_flash_attention.training.progress import OnStep
from dp_flash_attention.training.run_directory import RunDirectory
from dp_flash_attention.training.secrets import RunKeys, read_dataset_fingerprint, write_dataset_fingerprint
from dp_flash_attention.training.session import LossFn, make_private

MODEL_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What ``fit`` did. All of it is public.

    Attributes:
        plan: The plan that was carried out.
        num_steps: Number of finished steps of the whole run.
        first_step: Number of steps that were done before this process took over.
        epsilon_spent: The accountant's upper bound of ε at the plan's δ.
        model_path: The released parameters.
        num_threads: Threads that PyTorch's operators used.
        uses_test_key: Whether the run's key is public, so that nothing is private.
        secrets_destroyed: Whether the run's secrets are gone.
    """

    plan: PrivacyPlan
    num_steps: int
    first_step: int
    epsilon_spent: float
    model_path: Path
    num_threads: int
    uses_test_key: bool
    secrets_destroyed: bool


class PrivateTrainer:
    """Trains a model under a plan, in a run directory.

    Args:
        model: Any module; its trainable parameters are trained.
        plan: What is promised.
        optimizer: Holds exactly the trainable parameters.
        loss_fn: Maps the model and inputs of B rows to B losses.
        out_dir: A new or empty directory, or with ``resume`` that of the run; or an open ``RunDirectory``,
            whose owner then calls ``finish()`` and ``close()``.
        execution: Settings of speed.
        lr_schedule: Factor of each group's learning rate, as a function of the step.
        ema_decay: Decay of the parameters' running average, which is then what is released; None for none.
        settings: Further public JSON values that the run depends on, such as options of the data; a
            resumed run must have the same.
        fallback_modules: See ``ClippedGradientAccumulator``.
        collate_fn: See ``RecordSource``.
        on_step: Called after each step with a ``StepReport``.
        diagnostics: Where private diagnostics go; None means ``<out_dir>/diagnostics/steps.jsonl``.
        test_key: Makes a new run reproducible, and not private. For tests only.

    Guarantees:
        neighbouring relation: add or remove one record of the data set given to ``fit``.
        privacy unit: one record.
        sensitivity: ``plan.l2_clip_norm`` for the sum of clipped gradients of each step.
        public: the plan, every argument of this class, the run's ``run.json``, checkpoints and released
            model, which are (ε, δ)-DP. Private: ``.secrets/`` and ``diagnostics/``.
        theorem: that of ``PrivateSession``; averaging, schedules and checkpoints are post-processing.
            Assumed: the secrets stay unread until they are destroyed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plan: PrivacyPlan,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        out_dir: str | Path | RunDirectory,
        execution: ExecutionConfig | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        ema_decay: float | None = None,
        settings: Mapping[str, Any] | None = None,
        fallback_modules: Collection[str] = (),
        collate_fn: CollateFn | None = None,
        on_step: OnStep | None = None,
        diagnostics: DiagnosticsSink | None = None,
        test_key: TestKey | None = None,
    ) -> None:
        self._model, self._plan, self._optimizer, self._loss_fn = model, plan, optimizer, loss_fn
        self._out_dir = out_dir
        self._execution = ExecutionConfig() if execution is None else execution
        self._lr_schedule, self._ema_decay = lr_schedule, ema_decay
        self._settings = dict(settings or {})
        self._fallback_modules, self._collate_fn = tuple(fallback_modules), collate_fn
        self._on_step, self._diagnostics, self._test_key = on_step, diagnostics, test_key
        self._first_step = 0
        self._norm_forms = NormForms()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        # Before any step changes a learning rate.
        self._optimizer_settings = fingerprint.optimizer_settings(optimizer)

    def fit(self, dataset: object, *, resume: bool = False) -> TrainingResult:
        """Takes the plan's steps, or those that are left.

        Args:
            dataset: Any map-style data set; see ``RecordSource``.
            resume: Whether ``out_dir`` holds a run to be taken up. Ignored if it is an open ``RunDirectory``.

        Returns:
            What was done. The model holds the released parameters.

        Raises:
            InvalidInputError: If something does not fit, before anything is computed, written over or spent.
            RunStateError: If the run cannot be resumed with this data and these settings, or a checkpoint
                not be written.
            ExampleCouplingError: If the loss couples examples.
            MissingRuleError: If a parameter has no per-example rule.
            KeyboardInterrupt: After Ctrl-C, once the state is saved; the message says how to go on.
        """
        source = RecordSource(dataset, collate_fn=self._collate_fn)
        # Whatever may be wrong with model, optimizer or loss shows before a directory is made.
        self._rehearse(source)
        if isinstance(self._out_dir, RunDirectory):
            return self._fit_in(self._out_dir, source, dataset)
        with RunDirectory.open(self._out_dir, resume=resume, test_key=self._test_key) as run:
            self._fit_in(run, source, dataset)
            run.finish()
            return self._result(run)

    def _rehearse(self, source: RecordSource) -> None:
        session = make_private(
            self._model,
            self._optimizer,
            self._plan,
            fallback_modules=self._fallback_modules,
            strategy=self._execution.strategy,
        )
        rows = source.fetch(torch.arange(min(3, len(source))))
        try:
            with using(self._norm_forms):  # empty: it notes the shapes that there are
                session.verify(rows, self._loss_fn)
        finally:
            session.close()
        limit, strategy = self._execution.memory_limit_bytes, self._execution.strategy
        if limit is not None:
            peaks = measured_peaks(
                self._model,
                self._loss_fn,
                rows,
                strategies=(strategy,),
                fallback_modules=self._fallback_modules,
            )
            require_fit(peaks[strategy], microbatch_size=self._execution.microbatch_size, limit_bytes=limit)

    def _fit_in(self, run: RunDirectory, source: RecordSource, dataset: object) -> TrainingResult:
        num_threads = _recorded_threads(run) or self._execution.num_threads or torch.get_num_threads()
        device = next(self._model.parameters()).device
        with _reproducible(self._execution.num_threads or num_threads, device):
            self._norm_forms = forms_of_run(run, self._execution, self._norm_forms.fallbacks, device=device)
            settings = self._all_settings(run)
            state = self._state()
            if run.status == "preparing":
                self._begin(run, state, settings, source)
            else:
                self._take_up(run, state, settings, source)
            if run.status == "running":
                self._train(run, state, dataset)
            if state.average is not None:
                state.average.copy_to_model()
            _write_model(self._model, run.path / MODEL_FILE)
        return self._result(run)

    def _begin(
        self, run: RunDirectory, state: RunState, settings: dict[str, Any], source: RecordSource
    ) -> None:
        run.check_space(state.checkpoint_bytes())
        keys = _keys(run)
        # The first checkpoint holds the initial parameters, without which no step could be repeated.
        save_checkpoint(run.checkpoints, state.to_checkpoint(run, 0))
        write_dataset_fingerprint(
            run.path, fingerprint.dataset_fingerprint(source, keys.derive("fingerprint"))
        )
        run.mark_running(settings)

    def _take_up(
        self, run: RunDirectory, state: RunState, settings: dict[str, Any], source: RecordSource
    ) -> None:
        difference = fingerprint.first_difference(run.settings, settings)
        if difference is not None:
            raise RunStateError(
                f"{difference}, but a run goes on with exactly what it was started with, or the same noise "
                "would be added to other gradients. Restore that, or start a new run in another "
                "directory: its budget adds to what this one has spent."
            )
        if run.status == "running":
            now = fingerprint.dataset_fingerprint(source, _keys(run).derive("fingerprint"))
            if read_dataset_fingerprint(run.path) != now:
                raise RunStateError(
                    f"the data is not what the run in {run.path} was started with, but the same noise "
                    "added to other data would show the difference. Restore the data (it must be the same "
                    "each time it is read), or start a new run in another directory: its budget adds to "
                    "what this one has spent."
                )
        checkpoint = load_latest_checkpoint(run.checkpoints, run_id=run.run_id)
        if checkpoint is None:
            raise RunStateError(
                f"{run.checkpoints} holds no checkpoint, but the run needs one to go on. Restore it, or "
                "start a new run in another directory: its budget adds to what this one has spent."
            )
        state.load(checkpoint.state)
        self._first_step = checkpoint.step_index

    def _train(self, run: RunDirectory, state: RunState, dataset: object) -> None:
        session = make_private(
            self._model,
            self._optimizer,
            self._plan,
            keys=_keys(run),
            fallback_modules=self._fallback_modules,
            step_index=self._first_step,
            compile=self._execution.compile,
            strategy=self._execution.strategy,
        )
        diagnostics = self._diagnostics
        if diagnostics is None:
            diagnostics = JsonLinesDiagnostics(run.diagnostics, from_step=self._first_step)
        loop = TrainingLoop(
            session=session,
            state=state,
            run=run,
            loss_fn=self._loss_fn,
            execution=self._execution,
            diagnostics=diagnostics,
            collate_fn=self._collate_fn,
            lr_schedule=self._lr_schedule,
            on_step=self._on_step,
        )
        try:
            with using(self._norm_forms):
                loop.take_steps(dataset)
        finally:
            session.close()
            if self._execution.norm_forms == "measured":
                write_fallbacks(run, self._norm_forms)

    def _state(self) -> RunState:
        average = None
        if self._ema_decay is not None:
            trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
            average = ParameterAverage(trained, decay=self._ema_decay)
        return RunState(model=self._model, optimizer=self._optimizer, average=average)

    def _all_settings(self, run: RunDirectory) -> dict[str, Any]:
        """Everything that decides what a step computes, for comparison with a resumed run."""
        settings = {
            "plan": self._plan.to_dict(),
            "model": fingerprint.model_settings(self._model),
            "optimizer": self._optimizer_settings,
            "lr_schedule": fingerprint.schedule_settings(self._lr_schedule, self._plan.num_steps),
            "ema_decay": self._ema_decay,
            "loss_fn": fingerprint.function_settings(self._loss_fn),
            "fallback_modules": sorted(self._fallback_modules),
            "microbatch_size": self._execution.microbatch_size,
            "compile": self._execution.compile,
            "strategy": self._execution.strategy,
            "settings": self._settings,
            "numerics": fingerprint.numerics(next(self._model.parameters()).device, torch.get_num_threads()),
            "uses_test_key": run.settings["uses_test_key"] if run.keys is None else run.keys.uses_test_key,
        }
        if self._execution.norm_forms == "measured":
            settings["norm_forms"] = self._norm_forms.to_json()
        return fingerprint.as_json_values(settings)

    def _result(self, run: RunDirectory) -> TrainingResult:
        return TrainingResult(
            plan=self._plan,
            num_steps=self._plan.num_steps,
            first_step=self._first_step,
            epsilon_spent=self._plan.accounted_epsilon,
            model_path=run.path / MODEL_FILE,
            num_threads=_recorded_threads(run) or torch.get_num_threads(),
            uses_test_key=bool(run.settings["uses_test_key"]),
            secrets_destroyed=run.status == "finished",
        )


def _keys(run: RunDirectory) -> RunKeys:
    assert run.keys is not None, "only a finished run has no keys, and it takes no step"
    return run.keys


def _recorded_threads(run: RunDirectory) -> int | None:
    recorded: int | None = run.settings.get("numerics", {}).get("num_threads")
    return recorded


@contextmanager
def _reproducible(num_threads: int, device: torch.device) -> Iterator[None]:
    """Fixes what decides the order of floating-point additions; puts it back on leaving."""
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic  # its stub lacks what its documentation names
    fill_before = settings.fill_uninitialized_memory
    torch.set_num_threads(num_threads)
    if device.type == "cpu":
        # Adding into rows by index runs on several threads in any order otherwise.
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(deterministic_before)
        settings.fill_uninitialized_memory = fill_before


def _write_model(model: nn.Module, path: Path) -> None:
    """Writes the released parameters once; tied ones are stored once."""
    from safetensors.torch import save_model

    if path.exists():
        return
    try:
        with replaced_atomically(path) as temporary:
            save_model(model, str(temporary))
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise RunStateError(
            f"{path} cannot be written ({error}), but the last checkpoint is safe. Free disk "
            "space or repair permissions, then resume."
        ) from error
