"""The certificate: what a run guarantees, to whom, by which theorem, and what it takes for granted."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dp_flash_attention.accounting import Accountant
from dp_flash_attention.core.durable import write_atomically
from dp_flash_attention.core.errors import RunStateError
from dp_flash_attention.core.privacy import Guarantee
from dp_flash_attention.training.cached_accountant import cached_epsilon
from dp_flash_attention.training.evaluation import KINDS, Evaluation, evaluation_guarantee
from dp_flash_attention.training.finite_precision import TrainingNoise
from dp_flash_attention.training.plan import PrivacyPlan

FORMAT = 2
"""Of a certificate. Any change of its fields or fixed sentences is another format: a reader compares both."""
COVERED = ("model.safetensors and what describes it", "evaluation.json", "run.json", "checkpoints/")
"""What the guarantee covers, in words."""
ACCOUNTED: Mapping[str, Accountant] = {
    "training_epsilon_by_pld": "pld",
    "training_epsilon_by_rdp_as_cross_check": "rdp",
}
"""Certified fields, and the accountant of each."""
_PACKAGES = ("dp-flash-attention", "torch", "numpy", "dp-accounting", "cryptography")
_ASSUMED = (
    "The run's secrets stayed unread while it ran; the operating system's entropy is sound; AES-256 in counter "
    "mode is a pseudo-random function (128 bits against quantum search).",
    "One record is one unit. Whoever owns several records is protected for each of them, not for all together.",
    "Model, hyper-parameters, schema and classes were chosen without these records.",
    "Deleting a file removes it. Copies made by backups or by the storage device are out of reach.",
)
_REAL_NUMBERS = "Real numbers: the float32 rounding of sums and noise is not part of the analysis."
_STATISTICAL = "The noise is statistical only (Philox): whoever finds its key from outputs can subtract it."
_EXACT_ASSUMED = (
    "The float32 sums of clipped gradients, before they are rounded to the grid, move by at most the clip norm when a record "
    "comes or goes, as sums of real numbers do. The rounding of the matrix products that make them is not bounded: the rows of "
    "one record may cancel, so it is not relative to the clip norm. From the grid on nothing is assumed of arithmetic.",
    "The generator's advantage in delta: no attack on AES-256 beats key search with 2^64 sequential Grover iterations.",
    "The evaluation, if there is one: a record's scores do not depend on the records that share its batch, as if products of "
    "matrices were not rounded. Its sums are exact, and from there on nothing is assumed of arithmetic.",
)
_CLIPPING = {
    "flat": "one norm over all parameters",
    "per_layer": "one norm for each group of parameters, the squares of whose bounds add up to the squared clip norm",
}
_NOT_COVERED = (
    "diagnostics/ (losses, norms, sampled sizes, exact scores): private data.",
    "Running time, memory and error messages.",
)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A run's statement about itself. Everything in it is public or differentially private.

    Attributes:
        content: The statement as JSON values.
    """

    content: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the statement as JSON values."""
        return dict(self.content)

    def write(self, path: Path) -> None:
        """Writes the statement as indented JSON, durably."""
        write_atomically(path, json.dumps(self.content, indent=2, ensure_ascii=False).encode())

    @classmethod
    def read(cls, path: Path) -> Certificate:
        """Reads what ``write`` wrote.

        Raises:
            RunStateError: If the file is not a certificate.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["claim"]["epsilon"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunStateError(
                f"{path} is not a certificate ({error}). Pass the file that a finished run wrote."
            ) from error
        return cls(content=content)


@dataclass(frozen=True, kw_only=True)
class EvaluationStatement:
    """What a certificate says of an evaluation.

    Attributes:
        kind: A name in ``evaluation.KINDS``.
        epsilon: ε of the release.
        delta: δ of the release.
        noise: Kind of the noise.
        noise_stddev: Standard deviation of the noise of each released number.
        num_values: How many numbers were released.
        estimates: Figures computed from the release.
    """

    kind: str
    epsilon: float
    delta: float
    noise: TrainingNoise
    noise_stddev: float
    num_values: int
    estimates: Mapping[str, float]

    @classmethod
    def of(cls, evaluation: Evaluation) -> EvaluationStatement:
        """Returns what there is to say of an evaluation."""
        return cls(
            kind=evaluation.kind,
            epsilon=evaluation.epsilon,
            delta=evaluation.delta,
            noise=evaluation.noise,
            noise_stddev=evaluation.noise_stddev,
            num_values=evaluation.num_values,
            estimates=evaluation.estimates(),
        )

    @property
    def l2_sensitivity(self) -> float:
        """How far one record moves the released numbers together, in L2 norm."""
        return KINDS[self.kind].l2_sensitivity

    @property
    def guarantee(self) -> Guarantee:
        """The five statements."""
        return evaluation_guarantee(self.kind, epsilon=self.epsilon, delta=self.delta, noise=self.noise)

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry under ``mechanisms``."""
        return {
            "name": "evaluation",
            "data": "hold-out",
            "mechanism": "Gaussian",
            "kind": self.kind,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "noise": self.noise,
            "noise_stddev": self.noise_stddev,
            "num_values": self.num_values,
            "l2_sensitivity": self.l2_sensitivity,
            "guarantee": asdict(self.guarantee),
        }


def build_certificate(
    *,
    plan: PrivacyPlan,
    count_release: Mapping[str, Any] | None,
    holdout_prob: float,
    evaluation: EvaluationStatement | None,
    total_epsilon: float,
    task: Mapping[str, Any],
    public_statements: Sequence[str],
    hyper_parameters: Mapping[str, Any],
    uses_test_key: bool,
    files: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str] | None = None,
) -> Certificate:
    """Puts together what a finished run says about itself.

    Everything but ``task``, ``public_statements``, ``hyper_parameters``, ``files``, the evaluation's figures and
    ``versions`` follows from numbers, so that ``recomputation`` can put a certificate together again and compare.

    Args:
        plan: What training carried out.
        count_release: How the number of training records was released; None if it was stated as public.
        holdout_prob: Probability of a record to be in the hold-out.
        evaluation: What the released evaluation states; None without hold-out.
        total_epsilon: ε of the whole run; its δ is the plan's.
        task: Public description of the task.
        public_statements: What is taken as public about data and model.
        hyper_parameters: Public settings of the optimizer and the model.
        uses_test_key: Whether the run's key was public, so that nothing is certified.
        files: SHA-256 and size of the model, of what describes it and of the evaluation, by name.
        versions: Of Python and packages; None for those that run.
    """
    mechanisms: list[dict[str, Any]] = []
    if count_release is not None:
        mechanisms.append({"name": "number of training records", "data": "training part", **count_release})
    mechanisms.append(
        {
            "name": "training",
            "data": "training part",
            "epsilon": plan.epsilon,
            "delta": plan.delta,
            "guarantee": asdict(plan.guarantee),
            "parameters": plan.to_dict(),
        }
    )
    if evaluation is not None:
        mechanisms.append(evaluation.to_dict())
    private = not uses_test_key
    content = {
        "format": FORMAT,
        "claim": {
            "holds": private,
            "statement": _statement(plan, total_epsilon, uses_test_key=uses_test_key),
            "epsilon": total_epsilon,
            "delta": plan.delta,
            "neighboring_relation": plan.guarantee.neighboring_relation.value,
            "privacy_unit": plan.guarantee.privacy_unit.value,
            "covers": list(COVERED),
        },
        "mechanisms": mechanisms,
        "holdout_prob": holdout_prob,
        "composition": "A record is in the training part or in the hold-out, by one secret coin of its own, with "
        f"probability {holdout_prob:g} for the hold-out. On the training part the epsilons add up (Dwork & Roth "
        "2014, Theorem B.1); across the parts the larger counts (McSherry 2009, Theorem 4).",
        "certified": {
            **_accounted(plan),
            "l2_sensitivity_of_a_step": plan.l2_clip_norm,
            "clipping": plan.clipping,
            "method": f"exact per-example clipping, {_CLIPPING[plan.clipping]}; privacy loss distributions with "
            "pessimistic rounding",
            **_finite_precision(plan),
        }
        if private
        else {},
        "estimated": {} if evaluation is None else dict(evaluation.estimates),
        "assumed": assumptions(
            plan.noise, count_is_public=count_release is None, public_statements=public_statements
        ),
        "not_covered": list(_NOT_COVERED),
        "secrets": "The key of sampling, split and noise was kept apart with mode 600 and destroyed when the run "
        "ended, before this certificate was written.",
        "task": dict(task),
        "hyper_parameters": dict(hyper_parameters),
        "files": {name: dict(files[name]) for name in sorted(files)},
        "versions": dict(_versions() if versions is None else versions),
    }
    return Certificate(content=json.loads(json.dumps(content)))


def _statement(plan: PrivacyPlan, total_epsilon: float, *, uses_test_key: bool) -> str:
    if uses_test_key:
        return "NOT PRIVATE: the run's key is a public test key, so anyone can subtract the noise."
    return (
        f"The covered files together are ({total_epsilon:g}, {plan.delta:g})-differentially private under adding "
        "or removing one record."
    )


def fixed_assumptions(
    noise: TrainingNoise, *, count_is_public: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the assumptions that every such run makes: those before, and those after what is public of its data."""
    count = ("The number of records is public, as the user stated.",) if count_is_public else ()
    if noise == "exact":
        return _ASSUMED, (*count, *_EXACT_ASSUMED)
    if noise == "secure":
        return _ASSUMED, (*count, _REAL_NUMBERS)
    return _ASSUMED, (*count, _REAL_NUMBERS, _STATISTICAL)


def assumptions(
    noise: TrainingNoise, *, count_is_public: bool, public_statements: Sequence[str]
) -> list[str]:
    """Returns everything that a run takes for granted, in order."""
    before, after = fixed_assumptions(noise, count_is_public=count_is_public)
    return [*before, *public_statements, *after]


def _accounted(plan: PrivacyPlan) -> dict[str, float]:
    return {
        name: cached_epsilon(
            plan.sampling_prob, plan.event.noise_multiplier, plan.num_steps, plan.accounted_delta, accountant
        )
        for name, accountant in ACCOUNTED.items()
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _finite_precision(plan: PrivacyPlan) -> dict[str, Any]:
    """What is certified of exact noise; ``PrivacyPlan.from_dict`` of the parameters computes all of it again."""
    precision = plan.finite_precision
    if precision is None:
        return {}
    return {
        "finite_precision": {
            "noise": "rounded Gaussian on the grid, sampled as a discrete Gaussian within a certified distance",
            **asdict(precision),
            "delta_of_the_accountant": plan.accounted_delta,
            "noise_multiplier_of_the_accountant": plan.event.noise_multiplier,
        }
    }
