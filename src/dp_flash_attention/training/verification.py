"""Checks that a session releases what its plan says: evidence, not proof.

Each check compares something measured with what the definition in ``PrivateSession`` implies, and fails
when the engine adds no noise or too little, clips at another bound, skips a parameter, divides by another
number, draws its batches otherwise, or carries something over from one step to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.clip_groups import bounded_groups
from dp_flash_attention.clipping.reference import clipped_sum_of_groups, per_example_gradients
from dp_flash_attention.core.validation import open_unit
from dp_flash_attention.noise import SecureBits, TestKey, make_generator
from dp_flash_attention.noise.rounded_gaussian import RoundedGaussian
from dp_flash_attention.training.microbatches import RecordSource
from dp_flash_attention.training.plan import PrivacyPlan
from dp_flash_attention.training.secrets import RunKeys
from dp_flash_attention.training.session import LossFn, make_private

_RATE_REMEDY = "1e-6 is a good start."


@dataclass(frozen=True, kw_only=True)
class Check:
    """A statistic and the interval it must lie in.

    Attributes:
        name: What was checked.
        statistic: What was measured.
        low: Smallest value that passes.
        high: Largest value that passes.
    """

    name: str
    statistic: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        """Whether the statistic lies in the interval; a NaN does not."""
        return self.low <= self.statistic <= self.high


def check_noise_scale(samples: Tensor, *, stddev: float, false_alarm_rate: float = 1e-6) -> Check:
    """Checks that independent samples are N(0, stddev²), by their sum of squares.

    Args:
        samples: Any shape, n numbers.
        stddev: What they must have.
        false_alarm_rate: Probability that a correct sample fails; exact.
    """
    from scipy.stats import chi2

    scaled = samples.detach().double().flatten() / stddev
    low, high = _two_sided(chi2(scaled.numel()).ppf, false_alarm_rate)
    return Check(name="noise scale", statistic=float(scaled.square().sum()), low=low, high=high)


def check_batch_sizes(
    sizes: Sequence[int], *, num_records: int, sampling_prob: float, false_alarm_rate: float = 1e-6
) -> Check:
    """Checks that batch sizes spread as those of Poisson samples; batches of a fixed size do not.

    Args:
        sizes: Sampled batch sizes of distinct steps.
        num_records: Number of records.
        sampling_prob: q.
        false_alarm_rate: Probability that a correct sampler fails; approximate, for the binomial is
            taken as normal: have num_records·q·(1 − q) ≥ 10.
    """
    from scipy.stats import chi2

    variance = num_records * sampling_prob * (1.0 - sampling_prob)
    deviations = torch.tensor(sizes, dtype=torch.float64) - num_records * sampling_prob
    low, high = _two_sided(chi2(len(sizes)).ppf, false_alarm_rate)
    return Check(
        name="batch sizes", statistic=float(deviations.square().sum() / variance), low=low, high=high
    )


def check_inclusion_counts(
    counts: Tensor, *, num_steps: int, sampling_prob: float, false_alarm_rate: float = 1e-6
) -> Check:
    """Checks that records take part in steps as often, and as unequally often, as in Poisson samples.

    Args:
        counts: For each record, in how many of the steps it took part.
        num_steps: Number of steps.
        sampling_prob: q.
        false_alarm_rate: As in ``check_batch_sizes``: have num_steps·q·(1 − q) ≥ 10.
    """
    from scipy.stats import chi2

    variance = num_steps * sampling_prob * (1.0 - sampling_prob)
    deviations = counts.double() - num_steps * sampling_prob
    low, high = _two_sided(chi2(counts.numel()).ppf, false_alarm_rate)
    return Check(
        name="inclusion counts", statistic=float(deviations.square().sum() / variance), low=low, high=high
    )


def check_steps_follow_definition(
    model: nn.Module,
    loss_fn: LossFn,
    dataset: object,
    plan: PrivacyPlan,
    *,
    key: TestKey,
    microbatch_size: int,
) -> Check:
    """Takes all steps of a plan and recomputes each from its definition.

    The recomputation shares no code with the engine but the generators: one backward pass for each
    sampled example, clipping in float64, one noise for each step and parameter, the public normaliser.

    Args:
        model: Deterministic (no dropout); it is changed.
        loss_fn: Per-example loss.
        dataset: A map-style data set.
        plan: A plan of a few steps.
        key: Test key that both sides use.
        microbatch_size: Rows of a microbatch.

    Returns:
        The largest deviation of a coordinate of any step's update, in units of (σ + 1)·C / B̄.
    """
    session = make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), plan, keys=RunKeys(key))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    source, bits = RecordSource(dataset), SecureBits(key.derive("sampling"))
    worst = 0.0
    for index in range(plan.num_steps):
        sample = torch.from_numpy(bits.bernoulli_indices(len(source), plan.sampling_prob, step=index))
        expected = _definition(model, loss_fn, source, sample, plan, key, index)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        step = next(session.steps(dataset, microbatch_size=microbatch_size))
        for microbatch in step:
            session.accumulate(microbatch, loss_fn)
        session.apply(step)
        for name, parameter in parameters.items():
            released = before[name].double() - parameter.detach().double()
            worst = max(worst, float((released - expected[name]).abs().max()))
    session.close()
    unit = (plan.noise_multiplier + 1.0) * plan.l2_clip_norm / plan.expected_batch_size
    # float32 rounding of parameters of order 1 and of sums; the smallest planted error is far above.
    return Check(name="steps follow definition", statistic=worst / unit, low=0.0, high=1e-3)


def _definition(
    model: nn.Module,
    loss_fn: LossFn,
    source: RecordSource,
    sample: Tensor,
    plan: PrivacyPlan,
    key: TestKey,
    index: int,
) -> dict[str, Tensor]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    if len(sample) > 0:
        gradients = per_example_gradients(
            model, lambda rows: loss_fn(model, rows), source.fetch(sample), batch_size=len(sample)
        )
        sums, _ = clipped_sum_of_groups(gradients, groups=_groups(model, plan))
    stddev = plan.noise_multiplier * plan.l2_clip_norm
    if plan.noise == "exact":
        return _on_grid(sums, plan, key, index)
    generator = make_generator(plan.noise, key.derive("noise"))
    for stream, (name, parameter) in enumerate(parameters.items()):
        noise = generator.fill_normal_(
            torch.empty_like(parameter.detach()), stddev=stddev, step=index, stream=stream
        )
        sums[name] = (sums[name].double() + noise.double()) / plan.expected_batch_size
    return sums


def _on_grid(sums: dict[str, Tensor], plan: PrivacyPlan, key: TestKey, index: int) -> dict[str, Tensor]:
    """Exact noise of a small model, whose tensors all read one stream."""
    precision = plan.finite_precision
    assert precision is not None, "exact noise has a grid"
    flat = torch.cat([total.double().flatten() for total in sums.values()])
    noise = RoundedGaussian(plan.noise_multiplier * plan.l2_clip_norm / precision.grid).draw(
        key.derive("noise"), len(flat), step=index, stream=0
    )
    noisy = ((flat / precision.grid).round() + torch.from_numpy(noise)) * precision.grid
    parts = torch.split(noisy / plan.expected_batch_size, [total.numel() for total in sums.values()])
    return {name: part.view(sums[name].shape) for name, part in zip(sums, parts, strict=True)}


def _two_sided(quantile: Callable[[float], float], false_alarm_rate: float) -> tuple[float, float]:
    rate = open_unit("false_alarm_rate", false_alarm_rate, remedy=_RATE_REMEDY)
    return float(quantile(rate / 2.0)), float(quantile(1.0 - rate / 2.0))


def _groups(model: nn.Module, plan: PrivacyPlan) -> list[tuple[tuple[str, ...], float]]:
    """Returns the plan's groups of parameters; their bounds are computed here, from the definition."""
    groups = bounded_groups(model, l2_clip_norm=1.0, clipping=plan.clipping, groups=plan.clip_groups).groups
    total = sum(group.weight**2 for group in groups)
    return [(group.parameters, plan.l2_clip_norm * (group.weight**2 / total) ** 0.5) for group in groups]
