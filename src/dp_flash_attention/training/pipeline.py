"""A whole private run: split, count, plan, train, evaluate, certify. It can be killed anywhere and resumed.

Each record goes to the training part or to the hold-out by a secret coin of its own. The training part pays
for its count and for training (basic composition), the hold-out for the evaluation; no record is in both, so
the run costs the larger of the two (parallel composition).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dp_flash_attention.accounting import discrete_laplace_scale, split_budget
from dp_flash_attention.clipping import ClippedGradientAccumulator, check_examples_independent
from dp_flash_attention.clipping.clip_groups import BoundedGroups, bounded_groups
from dp_flash_attention.core.durable import write_atomically
from dp_flash_attention.core.errors import InvalidInputError, RunStateError
from dp_flash_attention.crypto.shared_files import fingerprint
from dp_flash_attention.noise import TestKey, discrete_laplace
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.training.certificate import Certificate, EvaluationStatement, build_certificate
from dp_flash_attention.training.choices import Choices, RunRequest, choose
from dp_flash_attention.training.data.split import Split, Subset, split_records
from dp_flash_attention.training.evaluation import Evaluation, ReleaseTerms, read_evaluation
from dp_flash_attention.training.execution import ExecutionConfig
from dp_flash_attention.training.plan import PrivacyPlan
from dp_flash_attention.training.progress import StepReport
from dp_flash_attention.training.run_directory import RECORD_FILE, RunDirectory
from dp_flash_attention.training.tasks import Task
from dp_flash_attention.training.trainer import PrivateTrainer
from dp_flash_attention.training.twin import train_without_privacy

CERTIFICATE_FILE = "certificate.json"
EVALUATION_FILE = "evaluation.json"
COMPARISON_FILE = "comparison.json"
REQUEST_FACT = "request"

_FILES_FACT = "files"
_EVALUATION_ROWS = 1024
_REHEARSAL_ROWS = 3


@dataclass(frozen=True, kw_only=True)
class Observer:
    """Who watches a run; every call carries public things only.

    Attributes:
        on_phase: Called with one line when something begins that takes time.
        on_plan: Called with the choices and the plan before anything is spent on training.
        on_step: Called after each private step.
        on_twin_step: Called after each step of the non-private twin, with the finished and all steps.
    """

    on_phase: Callable[[str], None] = lambda phase: None
    on_plan: Callable[[Choices, PrivacyPlan], None] = lambda choices, plan: None
    on_step: Callable[[StepReport], None] = lambda report: None
    on_twin_step: Callable[[int, int], None] = lambda step, num_steps: None


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What a finished run left.

    Attributes:
        path: The run's directory.
        plan: The plan that was carried out.
        choices: Its numbers with their reasons.
        certificate: What is guaranteed.
        evaluation: The differentially private evaluation; None without hold-out.
        comparison: The twin's exact scores. PRIVATE unless the data is public.
    """

    path: Path
    plan: PrivacyPlan
    choices: Choices
    certificate: Certificate
    evaluation: Evaluation | None
    comparison: Mapping[str, Any] | None


def run_private_training(
    task: Task,
    request: RunRequest,
    *,
    out_dir: str | Path,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
    execution: ExecutionConfig | None = None,
    with_twin: bool = False,
    observer: Observer | None = None,
    test_key: TestKey | None = None,
) -> RunOutcome:
    """Trains, evaluates and certifies, or goes on with a run that was stopped.

    Args:
        task: What is trained on what.
        request: What the user asked for.
        out_dir: A new or empty directory; with ``resume`` that of the run.
        resume: Whether to go on with the run in ``out_dir``.
        facts: Further public JSON values that the run keeps.
        execution: Settings of speed; None takes the task's microbatch size.
        with_twin: Whether to train the non-private twin too; its scores go to ``diagnostics/``.
        observer: Who watches.
        test_key: Makes the run reproducible, and not private. For tests only.

    Raises:
        InvalidInputError: If something does not fit, before anything is written over or spent.
        RunStateError: If the run cannot be resumed with this task and request.
        MissingRuleError: If a parameter has no per-example rule.
        ExampleCouplingError: If examples touch each other.
        KeyboardInterrupt: After Ctrl-C, once the state is saved.

    Guarantees:
        neighbouring relation: add or remove one record of ``task.dataset``.
        privacy unit: one record.
        sensitivity: 1 for the count of the training part; C for each step's sum of clipped gradients; the
            evaluation's is stated with it.
        public: the request, the task's statements, everything in the directory but ``.secrets/`` and
            ``diagnostics/``.
        theorem: (ε, δ)-DP of count, model and evaluation together. Given the coins, the training part pays
            ε_count + ε_training (Dwork & Roth 2014, Theorem B.1), the hold-out pays for the evaluation,
            which may depend on the model, and no record is in both (McSherry 2009, Theorem 4). A mixture
            over coins that do not depend on the data keeps the bound.
    """
    watch = Observer() if observer is None else observer
    model = task.build_model()
    if not resume:
        # Whatever may be wrong with the model or the loss shows before a directory is made or a count spent.
        _rehearse(model, task, request, execution)
    with RunDirectory.open(out_dir, resume=resume, test_key=test_key) as run:
        for name, value in {**(facts or {}), REQUEST_FACT: asdict(request)}.items():
            run.remember(name, value)
        return _Run(task, request, run, model, execution, watch, with_twin).carry_out()


class _Run:
    """One run in its open directory."""

    def __init__(
        self,
        task: Task,
        request: RunRequest,
        run: RunDirectory,
        model: nn.Module,
        execution: ExecutionConfig | None,
        watch: Observer,
        with_twin: bool,
    ) -> None:
        self._task, self._request, self._run, self._model = task, request, run, model
        self._watch, self._with_twin = watch, with_twin
        self._execution = execution or ExecutionConfig(microbatch_size=task.defaults.microbatch_size)
        self._split = None if run.keys is None else self._divide(run.keys.derive("split"))

    def carry_out(self) -> RunOutcome:
        task, run, watch = self._task, self._run, self._watch
        public_count = self._public_count()
        try:
            choices = choose(self._request, task.defaults, public_count)
            watch.on_phase("Calibrating the noise")
            plan = self._plan(choices)
        except InvalidInputError:
            # Nothing was released yet: without its directory the count is gone, and what the message says of it
            # is for the data's owner, as every error is.
            if not run.resumed:
                run.discard()
            raise
        watch.on_plan(choices, plan)
        watch.on_phase("Training with differential privacy")
        self._train(choices, plan)
        evaluation = self._evaluate(plan)
        comparison = self._compare(choices)
        task.write_companions(run.path)
        if _FILES_FACT not in run.facts:
            run.remember(_FILES_FACT, _fingerprints(run.path))
        uses_test_key = bool(run.settings["uses_test_key"])
        # From here on nothing can be repeated: the secrets are gone, and what follows is made of facts alone.
        run.finish()
        certificate = self._certify(plan, choices, evaluation, uses_test_key=uses_test_key)
        certificate.write(run.path / CERTIFICATE_FILE)
        return RunOutcome(
            path=run.path,
            plan=plan,
            choices=choices,
            certificate=certificate,
            evaluation=evaluation,
            comparison=comparison,
        )

    def _divide(self, key: NoiseKey) -> Split:
        split = split_records(len(self._task.dataset), holdout_prob=self._request.holdout_prob, key=key)
        if len(split.train) == 0:
            raise InvalidInputError(
                "training part",
                "empty",
                bound="at least one record",
                remedy="Use more records or --holdout 0.",
            )
        return split

    def _public_count(self) -> int:
        """Returns a public number of training records: stated by the user, or released with noise once."""
        request, facts = self._request, self._run.facts
        if request.dataset_size is not None:
            return max(1, round(request.dataset_size * (1.0 - request.holdout_prob)))
        if "training_record_count" not in facts:
            keys, split = self._run.keys, self._split
            assert keys is not None, "a finished run has released its count"
            assert split is not None
            scale = discrete_laplace_scale(epsilon=self._epsilon_count())
            noisy = len(split.train) + discrete_laplace(scale, key=keys.derive("count"))
            self._run.remember("training_record_count", max(1, noisy))
        return int(self._run.facts["training_record_count"])

    def _epsilon_count(self) -> float:
        return split_budget(epsilon=self._request.epsilon, delta=0.5).epsilon_count

    def _plan(self, choices: Choices) -> PrivacyPlan:
        request = self._request
        epsilon = request.epsilon
        if request.dataset_size is None:
            epsilon = split_budget(epsilon=epsilon, delta=choices.delta).training.epsilon
        known = self._run.facts.get("plan")
        if known is not None:
            return PrivacyPlan.from_dict(known)
        plan = PrivacyPlan.for_budget(
            epsilon=epsilon,
            delta=choices.delta,
            expected_batch_size=choices.expected_batch_size,
            num_steps=choices.num_steps,
            l2_clip_norm=choices.l2_clip_norm,
            sampling_prob=choices.sampling_prob,
            noise=request.noise,
            num_parameters=_count_trained(self._model) if request.noise == "exact" else None,
            clipping=request.clipping,
        )
        self._run.remember("plan", plan.to_dict())
        return plan

    def _train(self, choices: Choices, plan: PrivacyPlan) -> None:
        run, task = self._run, self._task
        if run.status == "finished":
            return
        assert self._split is not None
        PrivateTrainer(
            self._model,
            plan=plan,
            optimizer=_optimizer(self._model, choices),
            loss_fn=task.loss_fn,
            out_dir=run,
            execution=self._execution,
            lr_schedule=choices.learning_rate_factor,
            ema_decay=choices.ema_decay,
            settings={"task": dict(task.settings)},
            on_step=self._watch.on_step,
        ).fit(Subset(task.dataset, self._split.train))

    def _groups(self, plan: PrivacyPlan) -> BoundedGroups:
        return bounded_groups(
            self._model, l2_clip_norm=plan.l2_clip_norm, clipping=plan.clipping, groups=plan.clip_groups
        )

    def _evaluate(self, plan: PrivacyPlan) -> Evaluation | None:
        run, request = self._run, self._request
        if "evaluation" not in run.facts:
            # Released once: what is remembered is what every later process shows.
            run.remember(
                "evaluation",
                None if request.holdout_prob == 0.0 else self._released_evaluation(plan).to_dict(),
            )
        known = run.facts["evaluation"]
        if known is None:
            return None
        write_atomically(run.path / EVALUATION_FILE, _json(known))
        return read_evaluation(known)

    def _released_evaluation(self, plan: PrivacyPlan) -> Evaluation:
        run, request, task = self._run, self._request, self._task
        if run.keys is None or self._split is None:
            raise RunStateError(
                f"{run.path} is finished but lacks its evaluation. Start a new run elsewhere."
            )
        self._watch.on_phase("Evaluating on the hold-out with differential privacy")
        terms = ReleaseTerms(
            epsilon=request.epsilon,
            delta=plan.delta,
            key=run.keys.derive("evaluation"),
            noise=request.noise,
        )
        return task.evaluate(self._model, Subset(task.dataset, self._split.holdout), terms)

    def _compare(self, choices: Choices) -> Mapping[str, Any] | None:
        """Trains the twin and scores both models exactly. The result is private data."""
        run, task = self._run, self._task
        path = run.diagnostics / COMPARISON_FILE
        if path.exists():
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return known
        if not self._with_twin or self._split is None or len(self._split.holdout) == 0:
            return None
        self._watch.on_phase("Training the same model without privacy")
        twin = task.build_model()
        train_without_privacy(
            twin,
            Subset(task.dataset, self._split.train),
            optimizer=_optimizer(twin, choices),
            loss_fn=task.loss_fn,
            sampling_prob=choices.sampling_prob,
            num_steps=choices.num_steps,
            microbatch_size=self._execution.microbatch_size,
            lr_schedule=choices.learning_rate_factor,
            ema_decay=choices.ema_decay,
            on_step=self._watch.on_twin_step,
        )
        holdout = Subset(task.dataset, self._split.holdout)
        comparison = {
            "private": task.exact_scores(self._model, holdout),
            "non_private": task.exact_scores(twin, holdout),
        }
        write_atomically(path, _json(comparison))
        path.chmod(0o600)
        return comparison

    def _certify(
        self,
        plan: PrivacyPlan,
        choices: Choices,
        evaluation: Evaluation | None,
        *,
        uses_test_key: bool,
    ) -> Certificate:
        request, run, task = self._request, self._run, self._task
        count_release = None
        said = task.settings if task.certified_settings is None else task.certified_settings
        if request.dataset_size is None:
            epsilon_count = self._epsilon_count()
            count_release = {
                "mechanism": "discrete Laplace",
                "epsilon": epsilon_count,
                "scale": discrete_laplace_scale(epsilon=epsilon_count),
                "released_count": run.facts["training_record_count"],
            }
        return build_certificate(
            plan=plan,
            count_release=count_release,
            holdout_prob=request.holdout_prob,
            evaluation=None if evaluation is None else EvaluationStatement.of(evaluation),
            total_epsilon=request.epsilon,
            task={"name": task.name, "classes": task.classes, **said},
            public_statements=task.public_statements,
            hyper_parameters={
                "learning_rate": choices.learning_rate,
                "beta2": choices.beta2,
                "ema_decay": choices.ema_decay,
                "microbatch_size": self._execution.microbatch_size,
                "compile": self._execution.compile,
                "strategy": self._execution.strategy,
                "num_clip_groups": len(self._groups(plan).groups),
                "reasons": dict(choices.reasons),
            },
            uses_test_key=uses_test_key,
            files=run.facts[_FILES_FACT],
        )


def _rehearse(model: nn.Module, task: Task, request: RunRequest, execution: ExecutionConfig | None) -> None:
    accumulator = ClippedGradientAccumulator(
        model,
        l2_clip_norm=request.l2_clip_norm or task.defaults.l2_clip_norm,
        strategy=(execution or ExecutionConfig()).strategy,
        clipping=request.clipping,
    )
    few = task.dataset.take(torch.arange(min(_REHEARSAL_ROWS, len(task.dataset))))
    check_examples_independent(accumulator, model, lambda rows: task.loss_fn(model, rows), few)


def _fingerprints(directory: Path) -> dict[str, Any]:
    """Fingerprints the model, what describes it and the evaluation: all that lies at the top but the run's own record."""
    names = [path.name for path in directory.iterdir() if path.is_file() and not path.name.startswith(".")]
    return {name: fingerprint(directory / name) for name in sorted(names) if name != RECORD_FILE}


def _count_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _optimizer(model: nn.Module, choices: Choices) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # One pass over parameter, gradient and both moments instead of a dozen (benchmarks/optimizer_update.py).
    return torch.optim.Adam(trained, lr=choices.learning_rate, betas=(0.9, choices.beta2), fused=True)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()
