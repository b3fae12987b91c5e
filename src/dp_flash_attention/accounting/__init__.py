"""Privacy accounting: events, certified bounds of what they cost, and the reverse questions. Never torch."""

from dp_flash_attention.accounting.accountant import (
    Accountant,
    EpsilonSchedule,
    delta,
    epsilon,
    epsilon_schedule,
)
from dp_flash_attention.accounting.calibration import (
    calibrate_noise_multiplier,
    max_sampling_prob,
    max_steps,
)
from dp_flash_attention.accounting.events import (
    GaussianRelease,
    PoissonSampledGaussian,
    PrivacyEvent,
    ShuffledGaussian,
)
from dp_flash_attention.accounting.pure import (
    BudgetSplit,
    basic_composition,
    discrete_laplace_epsilon,
    discrete_laplace_scale,
    split_budget,
)

__all__ = [
    "Accountant",
    "BudgetSplit",
    "EpsilonSchedule",
    "GaussianRelease",
    "PoissonSampledGaussian",
    "PrivacyEvent",
    "ShuffledGaussian",
    "basic_composition",
    "calibrate_noise_multiplier",
    "delta",
    "discrete_laplace_epsilon",
    "discrete_laplace_scale",
    "epsilon",
    "epsilon_schedule",
    "max_sampling_prob",
    "max_steps",
    "split_budget",
]
