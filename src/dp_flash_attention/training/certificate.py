"""The certificate: what a run guarantees, to whom, by which theorem, and what it takes for granted."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dp_flash_attention.accounting import epsilon as accounted_epsilon
from dp_flash_attention.core.durable import write_atomically
from dp_flash_attention.core.errors import RunStateError
from dp_flash_attention.training.evaluation import Evaluation
from dp_flash_attention.training.plan import PrivacyPlan

_PACKAGES = ("dp-flash-attention", "torch", "numpy", "dp-accounting", "cryptography")
_ASSUMED = (
    "The run's secrets stayed unread while it ran; the operating system's entropy is sound; AES-256 in counter "
    "mode is a pseudo-random function (128 bits against quantum search).",
    "One record is one unit. Whoever owns several records is protected for each of them, not for all together.",
    "Model, hyper-parameters, schema and classes were chosen without these records.",
    "Deleting a file removes it. Copies made by backups or by the storage device are out of reach.",
)
_REAL_NUMBERS = "Real numbers: the float32 rounding of sums and noise is not part of the analysis."
_EXACT_ASSUMED = (
    "The float32 sums of clipped gradients, before they are rounded to the grid, move by at most the clip norm when a record "
    "comes or goes, as sums of real numbers do. The rounding of the matrix products that make them is not bounded: the rows of "
    "one record may cancel, so it is not relative to the clip norm. From the grid on nothing is assumed of arithmetic.",
    "The generator's advantage in delta: no attack on AES-256 beats key search with 2^64 sequential Grover iterations.",
    "The evaluation, if there is one: a record's scores do not depend on the records that share its batch, as if products of "
    "matrices were not rounded. Its sums are exact, and from there on nothing is assumed of arithmetic.",
)
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


def build_certificate(
    *,
    plan: PrivacyPlan,
    count_release: Mapping[str, Any] | None,
    holdout_prob: float,
    evaluation: Evaluation | None,
    total_epsilon: float,
    task: Mapping[str, Any],
    public_statements: Sequence[str],
    hyper_parameters: Mapping[str, Any],
    uses_test_key: bool,
    released: Sequence[str],
) -> Certificate:
    """Puts together what a finished run says about itself.

    Args:
        plan: What training carried out.
        count_release: How the number of training records was released; None if it was stated as public.
        holdout_prob: Probability of a record to be in the hold-out.
        evaluation: The released evaluation; None without hold-out.
        total_epsilon: ε of the whole run; its δ is the plan's.
        task: Public description of the task.
        public_statements: What is taken as public about data and model.
        hyper_parameters: Public settings of the optimizer and the model.
        uses_test_key: Whether the run's key was public, so that nothing is certified.
        released: Names of the files that the guarantee covers.
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
        mechanisms.append(
            {
                "name": "evaluation",
                "data": "hold-out",
                "epsilon": evaluation.epsilon,
                "delta": evaluation.delta,
                "guarantee": asdict(evaluation.guarantee),
            }
        )
    private = not uses_test_key
    rdp = accounted_epsilon(plan.event, delta=plan.accounted_delta, accountant="rdp")
    content = {
        "format": 1,
        "claim": {
            "holds": private,
            "statement": _statement(plan, total_epsilon, uses_test_key=uses_test_key),
            "epsilon": total_epsilon,
            "delta": plan.delta,
            "neighboring_relation": plan.guarantee.neighboring_relation.value,
            "privacy_unit": plan.guarantee.privacy_unit.value,
            "covers": list(released),
        },
        "mechanisms": mechanisms,
        "composition": "A record is in the training part or in the hold-out, by one secret coin of its own, with "
        f"probability {holdout_prob:g} for the hold-out. On the training part the epsilons add up (Dwork & Roth "
        "2014, Theorem B.1); across the parts the larger counts (McSherry 2009, Theorem 4).",
        "certified": {
            "training_epsilon_by_pld": plan.accounted_epsilon,
            "training_epsilon_by_rdp_as_cross_check": rdp,
            "l2_sensitivity_of_a_step": plan.l2_clip_norm,
            "method": "exact per-example clipping; privacy loss distributions with pessimistic rounding",
            **_finite_precision(plan),
        }
        if private
        else {},
        "estimated": {} if evaluation is None else evaluation.estimates(),
        "assumed": [
            *_ASSUMED,
            *public_statements,
            *_count_assumption(count_release),
            *_noise_assumption(plan),
        ],
        "not_covered": list(_NOT_COVERED),
        "secrets": "The key of sampling, split and noise was kept apart with mode 600 and destroyed when the run "
        "ended, before this certificate was written.",
        "task": dict(task),
        "hyper_parameters": dict(hyper_parameters),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }
    return Certificate(content=json.loads(json.dumps(content)))


def _statement(plan: PrivacyPlan, total_epsilon: float, *, uses_test_key: bool) -> str:
    if uses_test_key:
        return "NOT PRIVATE: the run's key is a public test key, so anyone can subtract the noise."
    return (
        f"The covered files together are ({total_epsilon:g}, {plan.delta:g})-differentially private under adding "
        "or removing one record."
    )


def _count_assumption(count_release: Mapping[str, Any] | None) -> tuple[str, ...]:
    if count_release is not None:
        return ()
    return ("The number of records is public, as the user stated.",)


def _noise_assumption(plan: PrivacyPlan) -> tuple[str, ...]:
    if plan.noise == "exact":
        return _EXACT_ASSUMED
    if plan.noise == "secure":
        return (_REAL_NUMBERS,)
    return (
        _REAL_NUMBERS,
        "The noise is statistical only (Philox): whoever finds its key from outputs can subtract it.",
    )


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
