"""The privacy plan: sampler, clip, noise, accountant and normaliser, bound to each other.

A plan that exists is a plan whose claim holds: it recomputes ε from its own sampler and noise and refuses
to be built when the claim is smaller. Nothing that can change privacy is set anywhere else; what can only
change speed is in ``execution.ExecutionConfig``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from dp_flash_attention.accounting import (
    Accountant,
    PoissonSampledGaussian,
    calibrate_noise_multiplier,
    epsilon_schedule,
)
from dp_flash_attention.accounting import epsilon as accounted_epsilon_of
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import (
    Guarantee,
    NeighboringRelation,
    PrivacyBudget,
    PrivacyUnit,
    Sensitivity,
)
from dp_flash_attention.core.validation import (
    non_negative_int,
    open_unit,
    positive_finite,
    positive_int,
    probability,
)
from dp_flash_attention.training.finite_precision import (
    FinitePrecision,
    TrainingNoise,
    finite_precision,
    multiplier_on_grid,
)

_CLIP_REMEDY = "Values between 0.1 and 10 are usual; 1.0 is a good start."
_STEPS_REMEDY = "Count the optimizer steps, empty batches included."
_BATCH_REMEDY = "Choose it yourself; it is public and never derived from the data."
_PROB_REMEDY = "Use expected batch size / number of records."
_SOURCES: dict[Accountant, str] = {
    "pld": "Abadi et al. 2016; Koskela et al. 2020; Zhu, Dong & Wang 2022, Thm 10; Doroshenko et al. 2022",
    "rdp": "Abadi et al. 2016; Mironov, Talwar & Zhang 2019, section 3.3; Canonne, Kamath & Steinke 2020",
}


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Everything about a run that its guarantee depends on. All of it is public.

    Attributes:
        epsilon: The ε that is claimed; at least what the accountant computes.
        delta: The δ that is claimed; below 1 / number of records.
        sampling_prob: q, with which each record enters each step, independently of all others.
        expected_batch_size: B̄, the public constant that the noisy sum is divided by. Usually q times the
            number of records, but it is the user's number: nothing derives it from the data.
        num_steps: Number of logical steps; no more are ever taken.
        l2_clip_norm: C, the bound on one record's gradient over all parameters together.
        noise_multiplier: σ, the noise's standard deviation over C; unitless.
        noise: ``"secure"`` (a cipher; for anything released), ``"exact"`` (a cipher, and whole numbers on a public
            grid: finite precision is accounted for) or ``"fast"`` (statistical only).
        accountant: ``"pld"`` or ``"rdp"``.
        dataset_size: The number of records if that number is public, otherwise None.
        num_parameters: Number of trainable coordinates; needed by noise ``"exact"`` and None for the others.

    Raises:
        InvalidInputError: If a value lies outside its range, δ is at least 1 / number of records (as
            stated, or else as ``expected_batch_size / sampling_prob`` says), or the accountant finds a
            larger ε than claimed.

    Guarantees:
        neighbouring relation: add or remove one record.
        privacy unit: one record (example).
        sensitivity: C in L2 norm, of each step's sum of clipped gradients.
        public: every field of the plan, the model's architecture and initial parameters, the optimizer.
        theorem: Poisson-subsampled Gaussian mechanism, adaptively composed ``num_steps`` times by privacy
            loss distributions with pessimistic rounding (or by Rényi DP); Abadi et al. 2016; Koskela et
            al. 2020; Zhu, Dong & Wang 2022, Theorem 10; Doroshenko et al. 2022. With noise ``"exact"``, see also
            ``finite_precision``.
    """

    epsilon: float
    delta: float
    sampling_prob: float
    expected_batch_size: float
    num_steps: int
    l2_clip_norm: float
    noise_multiplier: float
    noise: TrainingNoise = "secure"
    accountant: Accountant = "pld"
    dataset_size: int | None = None
    num_parameters: int | None = None

    def __post_init__(self) -> None:
        PrivacyBudget(epsilon=self.epsilon, delta=self.delta)
        checked: dict[str, object] = {
            "epsilon": float(self.epsilon),
            "delta": float(self.delta),
            "sampling_prob": probability("sampling_prob", self.sampling_prob, remedy=_PROB_REMEDY),
            "expected_batch_size": positive_finite(
                "expected_batch_size", self.expected_batch_size, remedy=_BATCH_REMEDY
            ),
            "num_steps": positive_int("num_steps", self.num_steps, remedy=_STEPS_REMEDY),
            "l2_clip_norm": positive_finite("l2_clip_norm", self.l2_clip_norm, remedy=_CLIP_REMEDY),
            "noise_multiplier": positive_finite(
                "noise_multiplier",
                self.noise_multiplier,
                remedy="Use PrivacyPlan.for_budget() to calibrate it.",
            ),
        }
        for name, value in checked.items():  # plain Python numbers, so that equality and JSON are exact
            object.__setattr__(self, name, value)
        _one_of(
            "noise", self.noise, ("secure", "exact", "fast"), remedy="Use 'secure' for anything released."
        )
        _one_of("accountant", self.accountant, ("pld", "rdp"), remedy="Leave it at 'pld'.")
        if self.dataset_size is not None:
            positive_int(
                "dataset_size", self.dataset_size, remedy="State the public number of records, or None."
            )
        _check_delta(self.delta, self.dataset_size or self.expected_batch_size / self.sampling_prob)
        if self.accounted_epsilon > self.epsilon:
            raise InvalidInputError(
                "epsilon",
                self.epsilon,
                bound=f"at least {self.accounted_epsilon:.6g}, which is what this sampler and noise spend",
                remedy="Use PrivacyPlan.for_budget() to calibrate noise_multiplier, or take fewer steps.",
            )

    @classmethod
    def for_budget(
        cls,
        *,
        epsilon: float,
        delta: float,
        expected_batch_size: float,
        num_steps: int,
        l2_clip_norm: float,
        sampling_prob: float | None = None,
        dataset_size: int | None = None,
        noise: TrainingNoise = "secure",
        accountant: Accountant = "pld",
        num_parameters: int | None = None,
    ) -> PrivacyPlan:
        """Returns the plan with the least noise that keeps ``num_steps`` steps within (ε, δ).

        Args:
            epsilon: Target ε.
            delta: Target δ.
            expected_batch_size: B̄, the public normaliser.
            num_steps: Number of logical steps.
            l2_clip_norm: C.
            sampling_prob: q; None means ``expected_batch_size / dataset_size``.
            dataset_size: The number of records, if it is public.
            noise: Name of the noise generator.
            accountant: Name of the accountant.
            num_parameters: Number of trainable coordinates, for noise ``"exact"``.

        Raises:
            InvalidInputError: If a value lies outside its range, neither ``sampling_prob`` nor
                ``dataset_size`` is given, or no noise reaches the budget.
        """
        batch = positive_finite("expected_batch_size", expected_batch_size, remedy=_BATCH_REMEDY)
        if sampling_prob is None:
            if dataset_size is None:
                raise InvalidInputError(
                    "sampling_prob",
                    None,
                    bound="given, unless dataset_size is public and given",
                    remedy=_PROB_REMEDY,
                )
            size = positive_int("dataset_size", dataset_size, remedy="State the public number of records.")
            if batch > size:
                raise InvalidInputError(
                    "expected_batch_size",
                    batch,
                    bound=f"at most dataset_size = {size}",
                    remedy="Take smaller batches.",
                )
            sampling_prob = batch / size
        sampling_prob = probability("sampling_prob", sampling_prob, remedy=_PROB_REMEDY)
        # Before the search for σ: that takes seconds, and this is the likelier mistake.
        _check_delta(
            open_unit("delta", delta, remedy="Choose well below 1 / (number of records)."),
            dataset_size or batch / sampling_prob,
        )
        precision = finite_precision(
            noise,
            epsilon=PrivacyBudget(epsilon=epsilon, delta=delta).epsilon,
            delta=delta,
            l2_clip_norm=positive_finite("l2_clip_norm", l2_clip_norm, remedy=_CLIP_REMEDY),
            num_parameters=num_parameters,
            num_steps=positive_int("num_steps", num_steps, remedy=_STEPS_REMEDY),
        )
        noise_multiplier = calibrate_noise_multiplier(
            epsilon=epsilon,
            delta=delta if precision is None else delta - precision.delta,
            sampling_prob=sampling_prob,
            num_steps=num_steps,
            accountant=accountant,
        )
        return cls(
            epsilon=epsilon,
            delta=delta,
            sampling_prob=sampling_prob,
            expected_batch_size=batch,
            num_steps=num_steps,
            l2_clip_norm=l2_clip_norm,
            noise_multiplier=multiplier_on_grid(noise_multiplier, precision),
            noise=noise,
            accountant=accountant,
            dataset_size=dataset_size,
            num_parameters=num_parameters,
        )

    @property
    def finite_precision(self) -> FinitePrecision | None:
        """Grid and cost of noise ``"exact"``; None for the others, whose analysis is one of real numbers."""
        return finite_precision(
            self.noise,
            epsilon=self.epsilon,
            delta=self.delta,
            l2_clip_norm=self.l2_clip_norm,
            num_parameters=self.num_parameters,
            num_steps=self.num_steps,
            noise_multiplier=self.noise_multiplier,
        )

    @property
    def accounted_delta(self) -> float:
        """The δ at which the accountant is asked: ``delta`` less what finite precision costs."""
        precision = self.finite_precision
        return self.delta if precision is None else self.delta - precision.delta

    @property
    def event(self) -> PoissonSampledGaussian:
        """What the accountant is told about the whole run: σ over the bound of what is really noised."""
        precision = self.finite_precision
        factor = 1.0 if precision is None else precision.sensitivity_factor
        return PoissonSampledGaussian(
            sampling_prob=self.sampling_prob,
            noise_multiplier=self.noise_multiplier / factor,
            num_steps=self.num_steps,
        )

    @property
    def accounted_epsilon(self) -> float:
        """The accountant's ε of the whole run at ``delta``; never above ``epsilon``."""
        return self.epsilon_after(self.num_steps)

    @property
    def sensitivity(self) -> Sensitivity:
        """Of one step's sum of clipped gradients."""
        return Sensitivity(l2=self.l2_clip_norm, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)

    @property
    def release_stddev(self) -> float:
        """Standard deviation σC/B̄ of the noise on each coordinate of a step's released mean gradient."""
        return self.noise_multiplier * self.l2_clip_norm / self.expected_batch_size

    @property
    def guarantee(self) -> Guarantee:
        """The five statements, for the certificate."""
        precision = self.finite_precision
        return Guarantee(
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            privacy_unit=PrivacyUnit.EXAMPLE,
            sensitivity=f"L2 norm {self.l2_clip_norm:g} of each step's sum of clipped gradients, over all "
            f"parameters together{'' if precision is None else precision.statement}",
            public=(
                *(field.name for field in fields(self)),
                "model architecture",
                "initial parameters",
                "optimizer",
            ),
            theorem=f"({self.epsilon:g}, {self.delta:g})-DP: {self.num_steps} adaptively composed "
            f"Poisson-subsampled Gaussian mechanisms, accounted by {self.accountant.upper()}",
            source=_SOURCES[self.accountant],
        )

    def epsilon_after(self, num_steps: int) -> float:
        """Returns the accountant's upper bound of ε at ``delta`` after ``num_steps`` steps.

        Raises:
            InvalidInputError: If the count is negative or above the plan's.
        """
        count = non_negative_int("num_steps", num_steps, remedy="Count the finished steps.")
        if count > self.num_steps:
            raise InvalidInputError(
                "num_steps",
                count,
                bound=f"at most the plan's {self.num_steps}",
                remedy="Make a plan for more steps.",
            )
        if count == 0:
            return 0.0
        return poisson_epsilon(
            self.sampling_prob, self.event.noise_multiplier, count, self.accounted_delta, self.accountant
        )

    def epsilon_schedule(self) -> Callable[[int], float]:
        """Returns a cheap upper bound of ε after k steps, for showing progress."""
        if self.accountant == "rdp":
            return self.epsilon_after
        return _schedule(
            self.sampling_prob, self.event.noise_multiplier, self.num_steps, self.accounted_delta
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values; ``from_dict`` reads them back to an equal plan."""
        values = asdict(self)
        if self.num_parameters is None:
            del values["num_parameters"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrivacyPlan:
        """Reads what ``to_dict`` wrote; the claim is recomputed.

        Raises:
            InvalidInputError: If a field is missing, unknown or out of range, or the claim does not hold.
        """
        known = {field.name for field in fields(cls)}
        wrong = sorted(known.symmetric_difference(values) - {"num_parameters"})
        if wrong:
            raise InvalidInputError(
                "plan",
                wrong,
                bound="a mapping with exactly the fields of PrivacyPlan",
                remedy="Use to_dict()'s result.",
            )
        return cls(**values)


def _check_delta(delta: float, dataset_size: float) -> None:
    if delta * dataset_size >= 1.0:
        raise InvalidInputError(
            "delta",
            delta,
            bound=f"below 1 / number of records = {1.0 / dataset_size:.3g}, or publishing one record would "
            "satisfy it",
            remedy=f"Use {0.1 / dataset_size:.0e} or less.",
        )


def _one_of(name: str, value: object, choices: tuple[str, ...], *, remedy: str) -> None:
    if value not in choices:
        raise InvalidInputError(
            name, value, bound=" or ".join(repr(choice) for choice in choices), remedy=remedy
        )


# A distribution of many steps takes up to a second; plans are copied, reloaded and asked again.
@lru_cache(maxsize=256)
def poisson_epsilon(
    sampling_prob: float, noise_multiplier: float, num_steps: int, delta: float, accountant: Accountant
) -> float:
    """Returns ε of Poisson-sampled Gaussian releases under add-or-remove; see ``accounting.epsilon``."""
    event = PoissonSampledGaussian(
        sampling_prob=sampling_prob,
        noise_multiplier=noise_multiplier,
        num_steps=num_steps,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
    return accounted_epsilon_of(event, delta=delta, accountant=accountant)


@lru_cache(maxsize=16)
def _schedule(
    sampling_prob: float, noise_multiplier: float, num_steps: int, delta: float
) -> Callable[[int], float]:
    return epsilon_schedule(
        sampling_prob=sampling_prob, noise_multiplier=noise_multiplier, num_steps=num_steps, delta=delta
    )
