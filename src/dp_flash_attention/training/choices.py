"""The numbers of a run: what the user asked for, and a default with its reason for everything else.

Every default is computed from public things: the request, the task's kind, and a record count that is public
or released under differential privacy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dp_flash_attention.clipping.clip_groups import Clipping, checked_clipping
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import open_unit, positive_finite, positive_int
from dp_flash_attention.training.finite_precision import TrainingNoise

_WARMUP_SHARE = 0.05
_FINAL_LEARNING_RATE = 0.1
_LARGEST_DEFAULT_DELTA = 1e-5


@dataclass(frozen=True, kw_only=True)
class TaskDefaults:
    """What a run of one kind of task does unless the user asks for something else.

    Attributes:
        epochs: Expected passes over the training records.
        expected_batch_size: B̄; None derives it from the public record count.
        l2_clip_norm: C.
        learning_rate: Of Adam, after warm-up.
        beta2: Adam's memory of squared gradients.
        ema_decay: Of the averaged parameters that are released.
        microbatch_size: Rows of one forward and backward pass.
        d_model, num_heads, num_layers: Sizes of the built-in model.
    """

    epochs: float = 5.0
    expected_batch_size: int | None = None
    l2_clip_norm: float = 4.0
    learning_rate: float = 1e-2
    beta2: float = 0.99
    ema_decay: float = 0.9
    microbatch_size: int = 512
    d_model: int = 32
    num_heads: int = 4
    num_layers: int = 1


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What the user asked for; None leaves a number to its default.

    Attributes:
        epsilon: Total ε of the run.
        delta: Total δ.
        l2_clip_norm: C.
        expected_batch_size: B̄.
        epochs: Expected passes over the training records; not together with ``num_steps``.
        num_steps: Logical steps.
        learning_rate: Of Adam, after warm-up.
        noise: Name of the noise generator.
        dataset_size: The number of records, if it is public; None releases it under differential privacy.
        holdout_prob: Probability with which a record is kept for the evaluation; 0 for no evaluation.
        clipping: What of a record's gradient is clipped together; see ``PrivacyPlan``.

    Raises:
        InvalidInputError: If a value lies outside its range.
    """

    epsilon: float = 1.0
    delta: float | None = None
    l2_clip_norm: float | None = None
    expected_batch_size: int | None = None
    epochs: float | None = None
    num_steps: int | None = None
    learning_rate: float | None = None
    noise: TrainingNoise = "secure"
    dataset_size: int | None = None
    holdout_prob: float = 0.1
    clipping: Clipping = "flat"

    def __post_init__(self) -> None:
        positive_finite("epsilon", self.epsilon, remedy="Common values lie between 0.1 and 10.")
        if self.delta is not None:
            open_unit("delta", self.delta, remedy="Choose well below 1 / (number of records), such as 1e-6.")
        for name, remedy in (
            ("l2_clip_norm", "Values between 0.1 and 10 are usual; 1.0 is a good start."),
            ("epochs", "Values between 1 and 50 are usual."),
            ("learning_rate", "Values between 1e-4 and 1e-2 are usual."),
        ):
            if getattr(self, name) is not None:
                positive_finite(name, getattr(self, name), remedy=remedy)
        for name in ("expected_batch_size", "num_steps", "dataset_size"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name), remedy="Give a whole number of at least 1.")
        if self.delta is not None and self.dataset_size is not None and self.delta * self.dataset_size >= 1.0:
            raise InvalidInputError(
                "delta",
                self.delta,
                bound=f"below 1 / number of records = {1.0 / self.dataset_size:.3g}, or publishing one record "
                "would satisfy it",
                remedy=f"Use {0.1 / self.dataset_size:.0e} or less.",
            )
        checked_clipping(self.clipping, None)
        if self.noise not in ("secure", "exact", "fast"):
            raise InvalidInputError(
                "noise",
                self.noise,
                bound="'secure', 'exact' or 'fast'",
                remedy="Use 'secure' or 'exact' for anything released.",
            )
        if self.epochs is not None and self.num_steps is not None:
            raise InvalidInputError(
                "epochs",
                self.epochs,
                bound="left out when the number of steps is given",
                remedy="Give one of --epochs and --steps.",
            )
        if not 0.0 <= self.holdout_prob < 1.0:
            raise InvalidInputError(
                "holdout_prob",
                self.holdout_prob,
                bound="at least 0 and below 1",
                remedy="0.1 keeps a tenth for the evaluation, 0 gives none.",
            )


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The numbers of a run, each with its reason.

    Attributes:
        delta: Total δ.
        sampling_prob: q.
        expected_batch_size: B̄.
        num_steps: Logical steps.
        l2_clip_norm: C.
        learning_rate: Of Adam, after warm-up.
        beta2: Adam's memory of squared gradients.
        ema_decay: Of the averaged parameters that are released.
        reasons: For each number, why it is what it is.
    """

    delta: float
    sampling_prob: float
    expected_batch_size: int
    num_steps: int
    l2_clip_norm: float
    learning_rate: float
    beta2: float
    ema_decay: float
    reasons: Mapping[str, str]

    def learning_rate_factor(self, step: int) -> float:
        """Returns the share of the learning rate at ``step``: a short warm-up, then a cosine to a tenth."""
        warmup = max(1, round(_WARMUP_SHARE * self.num_steps))
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, self.num_steps - warmup)
        return _FINAL_LEARNING_RATE + (1 - _FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def choose(request: RunRequest, defaults: TaskDefaults, public_count: int) -> Choices:
    """Fills in what the request leaves open.

    Args:
        request: What the user asked for.
        defaults: The task's defaults.
        public_count: About how many training records there are; public or differentially private, at least 1.

    Raises:
        InvalidInputError: If the batch is larger than the training part.
    """
    reasons: dict[str, str] = {}

    def given_or(name: str, default: float, reason: str) -> float:
        value = getattr(request, name)
        reasons[name] = reason if value is None else "as asked"
        return default if value is None else value

    delta = given_or(
        "delta",
        default_delta(public_count),
        f"the largest power of ten below 1 / (2 x {public_count:,} training records), at most 1e-5",
    )
    batch = int(
        given_or(
            "expected_batch_size",
            min(defaults.expected_batch_size or default_batch_size(public_count), public_count),
            "a large batch: its sum grows with its size and the noise does not",
        )
    )
    if batch > public_count:
        raise InvalidInputError(
            "expected_batch_size",
            batch,
            bound=f"at most the number of training records, about {public_count}",
            remedy="Take a smaller batch.",
        )
    sampling_prob = batch / public_count
    epochs = given_or("epochs", defaults.epochs, "passes over the data that suffice under this noise")
    steps = given_or(
        "num_steps",
        max(1, round(epochs / sampling_prob)),
        f"{epochs:g} expected passes over the training records",
    )
    if request.num_steps is not None:
        del reasons["epochs"]
    clip_norm = given_or(
        "l2_clip_norm",
        defaults.l2_clip_norm,
        "noise is proportional to it; Adam makes up for the smaller gradient (De et al. 2022; Li et al. 2022)",
    )
    learning_rate = given_or(
        "learning_rate", defaults.learning_rate, "Adam's, after a warm-up of 5 % of the steps"
    )
    reasons["ema_decay"] = (
        "the released parameters are a running average, which cancels noise at no privacy cost"
    )
    reasons["sampling_prob"] = f"expected batch size / {public_count:,} training records"
    return Choices(
        delta=delta,
        sampling_prob=sampling_prob,
        expected_batch_size=batch,
        num_steps=int(steps),
        l2_clip_norm=clip_norm,
        learning_rate=learning_rate,
        beta2=defaults.beta2,
        ema_decay=defaults.ema_decay,
        reasons=MappingProxyType(reasons),
    )


def default_delta(public_count: int) -> float:
    """Returns the largest power of ten below 1 / (2 · count), and at most 1e-5.

    The count may be a noisy one, far below the truth where the data set is small: a δ near 1 / count could
    then be one that publishing a whole record satisfies.

    >>> default_delta(300_000), default_delta(60_000), default_delta(1)
    (1e-06, 1e-06, 1e-05)
    """
    return min(_LARGEST_DEFAULT_DELTA, float(f"1e{math.ceil(-math.log10(2 * public_count)) - 1}"))


def default_batch_size(public_count: int) -> int:
    """Returns a power of two near a fortieth of the records, between 16 and 8192.

    >>> default_batch_size(300_000), default_batch_size(1_000)
    (8192, 32)
    """
    return int(min(8192, max(16, 2 ** round(math.log2(max(1.0, public_count / 40))))))
