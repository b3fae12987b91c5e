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
from dp_flash_attention.accounting.discrete_gaussian import (
    concentrated_delta,
    discrete_gaussian_delta,
    discrete_gaussian_epsilon,
    discrete_gaussian_rho,
    discrete_gaussian_sigma,
)
from dp_flash_attention.accounting.events import (
    GaussianRelease,
    PoissonSampledGaussian,
    PrivacyEvent,
    ShuffledGaussian,
)
from dp_flash_attention.accounting.filters import GaussianFilter
from dp_flash_attention.accounting.gdp import compose_gdp, gdp_delta, gdp_epsilon, gdp_mu
from dp_flash_attention.accounting.near_gdp import near_gdp_delta, near_gdp_epsilon
from dp_flash_attention.accounting.pure import (
    BudgetSplit,
    basic_composition,
    discrete_laplace_epsilon,
    discrete_laplace_scale,
    split_budget,
)
from dp_flash_attention.accounting.skellam import skellam_epsilon, skellam_rdp, skellam_variance
from dp_flash_attention.accounting.summed_gaussian import (
    summed_discrete_gaussian_delta,
    summed_discrete_gaussian_rho,
    summed_discrete_gaussian_tau,
)

__all__ = [
    "Accountant",
    "BudgetSplit",
    "EpsilonSchedule",
    "GaussianFilter",
    "GaussianRelease",
    "PoissonSampledGaussian",
    "PrivacyEvent",
    "ShuffledGaussian",
    "basic_composition",
    "calibrate_noise_multiplier",
    "compose_gdp",
    "concentrated_delta",
    "delta",
    "discrete_gaussian_delta",
    "discrete_gaussian_epsilon",
    "discrete_gaussian_rho",
    "discrete_gaussian_sigma",
    "discrete_laplace_epsilon",
    "discrete_laplace_scale",
    "epsilon",
    "epsilon_schedule",
    "gdp_delta",
    "gdp_epsilon",
    "gdp_mu",
    "max_sampling_prob",
    "max_steps",
    "near_gdp_delta",
    "near_gdp_epsilon",
    "skellam_epsilon",
    "skellam_rdp",
    "skellam_variance",
    "split_budget",
    "summed_discrete_gaussian_delta",
    "summed_discrete_gaussian_rho",
    "summed_discrete_gaussian_tau",
]
