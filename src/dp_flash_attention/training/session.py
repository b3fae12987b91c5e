"""The training engine: what makes a model, an optimizer and a plan private.

    session = make_private(model, optimizer, plan)
    for step in session.steps(dataset, microbatch_size=64):
        for microbatch in step:
            session.accumulate(microbatch, loss_fn)
        session.apply(step)

Bound (``accumulate``), then noise, then account (``apply``) are separate, and a call out of order raises
before anything is computed or spent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dp_flash_attention.clipping import (
    ClippedGradientAccumulator,
    MicrobatchNorms,
    check_examples_independent,
)
from dp_flash_attention.clipping.compiled import CompiledClipping
from dp_flash_attention.clipping.one_example import check_one_example
from dp_flash_attention.clipping.strategies import Strategy, checked_strategy
from dp_flash_attention.core.errors import (
    BudgetExhaustedError,
    InvalidInputError,
    NoiseReuseError,
    RunStateError,
)
from dp_flash_attention.core.privacy import Guarantee
from dp_flash_attention.core.validation import non_negative_int, positive_int
from dp_flash_attention.noise import SecureBits
from dp_flash_attention.training.dropout_seed import seeded
from dp_flash_attention.training.microbatches import (
    CollateFn,
    LogicalStep,
    Microbatch,
    RecordSource,
    static_chunks,
)
from dp_flash_attention.training.noisy_adamw import NoisyAdamW
from dp_flash_attention.training.ownership import check_same_parameters
from dp_flash_attention.training.plan import PrivacyPlan
from dp_flash_attention.training.sampler import PoissonSampler
from dp_flash_attention.training.secrets import RunKeys
from dp_flash_attention.training.step_noise import make_step_noise, noisy_sums

_PROBE_ROWS = 3

LossFn = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a tree of inputs with B rows to one loss for each row, shape [B]."""


class PrivateSession:
    """Runs a plan over a model. Build one with ``make_private``.

    Attributes:
        model: The model, unchanged in its use.
        optimizer: Any optimizer over the clipped parameters; only the session may call its ``step``.
        plan: The plan.
        uses_test_key: Whether the keys are public test keys, so that nothing is private.

    Guarantees:
        neighbouring relation: add or remove one record of the data set given to ``steps``.
        privacy unit: one record.
        sensitivity: ``plan.l2_clip_norm`` for the sum of clipped gradients of each step, whether they are clipped
            flat or in the plan's groups.
        public: the plan, the model's architecture and initial parameters, the optimizer and its settings.
        theorem: step t releases ``(1/B̄)(Σ_{i∈S_t} clip_C(g_i) + N(0, σ²C² I))`` with a Poisson sample
            S_t, once, and nothing else; the parameters after any number of steps are post-processing. The
            whole run is (ε, δ)-DP by ``PrivacyPlan``'s theorem, up to float32 rounding of sums and noise (with
            noise ``"exact"``: of sums alone, before they are rounded to the grid).

        Not covered: what ``accumulate`` returns, the number of microbatches, and time, memory and
        errors during training, which depend on the sample.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: PrivacyPlan,
        *,
        keys: RunKeys,
        fallback_modules: Collection[str] = (),
        step_index: int = 0,
        compile: bool = False,
        strategy: Strategy = "bookkeeping",
    ) -> None:
        if not isinstance(plan, PrivacyPlan):
            raise InvalidInputError(
                "plan",
                type(plan).__name__,
                bound="a PrivacyPlan",
                remedy="Make one with PrivacyPlan.for_budget().",
            )
        self.model, self.optimizer, self.plan = model, optimizer, plan
        self._step_index = non_negative_int("step_index", step_index, remedy="Count the finished steps.")
        self._accumulator = ClippedGradientAccumulator(
            model,
            l2_clip_norm=plan.l2_clip_norm,
            fallback_modules=fallback_modules,
            strategy=checked_strategy(strategy, compile=compile, clipping=plan.clipping),
            clipping=plan.clipping,
            clip_groups=plan.clip_groups,
        )
        self._compiled = CompiledClipping(self._accumulator, model) if compile else None
        assert self._accumulator.sensitivity == plan.sensitivity, "noise is scaled to what is really bounded"
        check_same_parameters(model, optimizer, self._accumulator.parameters)
        keys.claim()
        self.uses_test_key = keys.uses_test_key
        self._stddev = plan.noise_multiplier * self._accumulator.sensitivity.l2
        count = sum(parameter.numel() for parameter in self._accumulator.parameters.values())
        in_update, noise_key = isinstance(optimizer, NoisyAdamW), keys.derive("noise")
        self._generator = make_step_noise(plan, noise_key, num_parameters=count, in_update=in_update)
        self._sampling_key = keys.derive("sampling")
        self._dropout_bits = SecureBits(keys.derive("dropout"))
        self._source: RecordSource | None = None
        self._sampler: PoissonSampler | None = None
        self._open_step: LogicalStep | None = None
        self._next_position = 0
        self._noise_drawn_for = -1
        self._verified = False
        self._applying = False
        self._hook = optimizer.register_step_pre_hook(self._refuse_foreign_step)

    @property
    def step_index(self) -> int:
        """Number of finished steps."""
        return self._step_index

    @property
    def epsilon_spent(self) -> float:
        """The accountant's upper bound of ε at the plan's δ so far."""
        return self.plan.epsilon_after(self._step_index)

    @property
    def guarantee(self) -> Guarantee:
        """The five statements of the plan."""
        return self.plan.guarantee

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The private parameters by name, each once."""
        return self._accumulator.parameters

    def steps(
        self, dataset: object, *, microbatch_size: int, collate_fn: CollateFn | None = None
    ) -> Iterator[LogicalStep]:
        """Draws the plan's remaining logical steps from a map-style data set.

        Args:
            dataset: Anything with ``__len__`` and ``__getitem__``, or ``take(indices)``; always the same
                object during a session.
            microbatch_size: Rows of each microbatch; changes speed and memory only.
            collate_fn: See ``RecordSource``.

        Returns:
            An iterator that ends after ``plan.num_steps`` steps. A step that was broken off before
            ``apply`` is drawn again, with the same sample.

        Raises:
            InvalidInputError: If ``dataset`` is not a map-style data set, but for example a loader.
            BudgetExhaustedError: If all steps of the plan are done.
            RunStateError: If another data set was given before, or (while iterating) a step was not applied.
        """
        size = positive_int(
            "microbatch_size", microbatch_size, remedy="Use the largest that fits into memory."
        )
        if self._accumulator.strategy == "one_example":
            check_one_example(size)
        if self._source is None:
            self._source = RecordSource(dataset, collate_fn=collate_fn)
            self._sampler = PoissonSampler(len(self._source), self.plan, self._sampling_key)
        elif not self._source.holds(dataset):
            raise RunStateError(
                f"steps() got another {type(dataset).__name__} than before, but a session draws all its "
                "samples from one data set. Pass the same object, or make another model private."
            )
        self._check_budget(self._step_index)
        return self._draw_steps(size)

    def accumulate(self, microbatch: Microbatch, loss_fn: LossFn) -> MicrobatchNorms:
        """Adds a microbatch's clipped per-example gradients to the step's sum.

        Dropout inside the model is seeded from the run's secrets, the step and the microbatch, so a repeated
        step repeats its masks.

        Args:
            microbatch: The next one of the open step.
            loss_fn: Maps model and inputs to one loss for each row, shape [B].

        Returns:
            Norms and losses, padding rows included. Private data: never release them.

        Raises:
            RunStateError: If it is not the next microbatch of the open step.
            ExampleCouplingError: If an example's loss or gradient depends on others.
            MissingRuleError: If a parameter has no per-example rule or saw no gradient.
            CompilationError: If the session compiles, and this step cannot be compiled.
        """
        step = self._open_step
        if step is None or microbatch.step != step.index or microbatch.position != self._next_position:
            expected = (
                "no step is open"
                if step is None
                else f"microbatch {self._next_position} of step {step.index} is next"
            )
            raise RunStateError(
                f"accumulate() got microbatch {microbatch.position} of step {microbatch.step}, but "
                f"{expected}. Take each microbatch of a step once, in the order in which the step yields "
                "them."
            )
        if not self._verified:
            self.verify(self._to_be_verified(microbatch), loss_fn)
        position = microbatch.position
        with seeded(self._dropout_bits, step=step.index, position=position, device=self._device):
            inputs, weights = microbatch.inputs, microbatch.weights
            if self._compiled is not None:
                norms = self._compiled.add(loss_fn, inputs, batch_size=len(weights), weights=weights)
            else:
                norms = self._accumulator.add(
                    lambda: loss_fn(self.model, inputs), batch_size=len(weights), weights=weights
                )
        self._next_position += 1
        return norms

    def verify(self, inputs: Any, loss_fn: LossFn) -> None:
        """Checks on real inputs that examples do not touch each other; the first ``accumulate`` calls it.

        Args:
            inputs: A tree of tensors with at least one row; the first three rows are used.
            loss_fn: As for ``accumulate``.

        Raises:
            ExampleCouplingError: If an example's loss or gradient depends on others.
            MissingRuleError: If a parameter has no exact per-example rule.
        """
        few = pytree.tree_map_only(Tensor, lambda leaf: leaf[:_PROBE_ROWS].to(self._device), inputs)
        check_examples_independent(self._accumulator, self.model, lambda rows: loss_fn(self.model, rows), few)
        # One row beside its own copies cannot show every coupling; the next microbatch is looked at too.
        alone = self._accumulator.strategy == "one_example"
        self._verified = alone or all(
            len(leaf) > 1 for leaf in pytree.tree_leaves(few) if isinstance(leaf, Tensor)
        )

    def _to_be_verified(self, microbatch: Microbatch) -> Any:
        if self._accumulator.strategy == "one_example" and self._source is not None:
            return self._source.fetch(torch.arange(min(_PROBE_ROWS, len(self._source))))
        real = microbatch.weights > 0
        return pytree.tree_map_only(Tensor, lambda leaf: leaf[real], microbatch.inputs)

    def apply(self, step: LogicalStep) -> None:
        """Adds the step's noise, once, divides by the public batch size, and takes the optimizer's step.

        Raises:
            RunStateError: If ``step`` is not open, misses a microbatch or was applied before, or the
                optimizer has got other parameters.
            BudgetExhaustedError: If the plan has no step left.
            NoiseReuseError: If an earlier call failed after the step's noise was drawn.
        """
        if step is not self._open_step:
            raise RunStateError(
                f"apply() got step {step.index}, which is not open: it was applied before or replaced by "
                "another. Apply each step that steps() yields once, before asking for the next."
            )
        self._check_budget(step.index)
        if self._next_position != step.num_microbatches:
            raise RunStateError(
                f"microbatch {self._next_position} of step {step.index} was not accumulated, but a step is "
                "applied whole. Call accumulate() for every microbatch of the step first."
            )
        if self._noise_drawn_for >= step.index:
            raise NoiseReuseError(
                f"the noise of step {step.index} was drawn before and its release failed, but each noise "
                "may be used once. Load the last checkpoint and resume from it."
            )
        check_same_parameters(self.model, self.optimizer, self._accumulator.parameters)
        self._noise_drawn_for = step.index
        self._set_noisy_gradients(step.index)
        self._applying = True
        try:
            self.optimizer.step()
        finally:
            self._applying = False
        self.optimizer.zero_grad(set_to_none=True)
        self._accumulator.reset()
        self._open_step = None
        self._step_index = step.index + 1

    def close(self) -> None:
        """Gives the optimizer back to whoever wants to call its ``step``."""
        self._hook.remove()

    def _set_noisy_gradients(self, step_index: int) -> None:
        """Releases (Σ clip(g_i) + N(0, σ²C²)) / B̄ into ``.grad``, or to an optimizer that makes it in its step."""
        parameters, batch = self._accumulator.parameters, self.plan.expected_batch_size
        if isinstance(self.optimizer, NoisyAdamW):
            staged = {parameters[name]: total for name, total in self._accumulator.sums.items()}
            self.optimizer.stage(staged, self._generator, stddev=self._stddev, divisor=batch, step=step_index)
            return
        sums = self._accumulator.sums
        for name, noisy in noisy_sums(self._generator, sums, stddev=self._stddev, step=step_index):
            parameters[name].grad = noisy.div_(batch).to(parameters[name].dtype)

    def _draw_steps(self, microbatch_size: int) -> Iterator[LogicalStep]:
        while self._step_index < self.plan.num_steps:
            index = self._step_index
            yield self._open(index, microbatch_size)
            if self._step_index == index:
                raise RunStateError(
                    f"step {index} was not applied, but the next one was asked for. Call apply(step) first."
                )

    def _open(self, index: int, microbatch_size: int) -> LogicalStep:
        assert self._source is not None
        assert self._sampler is not None
        # What a broken-off step left behind must not enter this one.
        self._accumulator.reset()
        chunks = list(static_chunks(self._sampler.indices(index), microbatch_size))
        self._open_step = LogicalStep(index, self._source, chunks, self._device)
        self._next_position = 0
        return self._open_step

    @property
    def _device(self) -> torch.device:
        return next(iter(self._accumulator.parameters.values())).device

    def _check_budget(self, index: int) -> None:
        if index >= self.plan.num_steps:
            raise BudgetExhaustedError(
                f"step {index} was asked for, but the plan has {self.plan.num_steps} steps and its epsilon "
                f"{self.plan.epsilon:g} is spent. Stop here; another run needs a plan and a budget of its "
                "own."
            )

    def _refuse_foreign_step(self, *_: object) -> None:
        if not self._applying:
            raise RunStateError(
                "optimizer.step() was called outside of session.apply(), but only the session's noisy "
                "gradients may move the parameters. Call session.apply(step) instead."
            )


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: PrivacyPlan,
    *,
    keys: RunKeys | None = None,
    fallback_modules: Collection[str] = (),
    step_index: int = 0,
    compile: bool = False,
    strategy: Strategy = "bookkeeping",
) -> PrivateSession:
    """Makes training of ``model`` private under ``plan``, for a training loop of your own.

    Args:
        model: Any module; its trainable parameters at this moment are trained.
        optimizer: Holds exactly those parameters.
        plan: What is promised.
        keys: Secrets of the run; None draws fresh ones from the operating system. To continue a run of
            your own, restore the keys it was started with and give ``step_index``; ``PrivateTrainer`` does
            so for you.
        fallback_modules: Modules to differentiate per example by ``torch.func``; see
            ``ClippedGradientAccumulator``.
        step_index: Number of steps that are done.
        compile: Whether a microbatch's step becomes one graph of ``torch.compile``: slow once, faster then. Keep
            ``loss_fn`` the same and shapes static. See ``clipping.compiled``.
        strategy: ``"two_pass"`` takes less memory and more time, ``"one_example"`` microbatches of one and any module;
            see ``ClippedGradientAccumulator``. What is clipped together is the plan's: ``clipping``.

    Raises:
        InvalidInputError: If optimizer and model do not hold the same trainable parameters, or a value is
            out of range.
        MissingRuleError: If a trainable parameter has no per-example rule.
        ExampleCouplingError: If the model mixes examples, as BatchNorm does.
        NoiseUnavailableError: If the plan's noise cannot be made here.
        NoiseReuseError: If another session uses the keys.
    """
    return PrivateSession(
        model,
        optimizer,
        plan,
        keys=RunKeys.from_os() if keys is None else keys,
        fallback_modules=fallback_modules,
        step_index=step_index,
        compile=compile,
        strategy=strategy,
    )
