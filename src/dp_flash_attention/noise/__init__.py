"""Entropy, counter-based generators and exact samplers. Receives a standard deviation; knows no ε.

``cryptography`` is imported only when a secure generator is built.
"""

from dp_flash_attention.noise.bits import SecureBits
from dp_flash_attention.noise.discrete_gaussian import DiscreteGaussianGenerator, ExactCipher
from dp_flash_attention.noise.discrete_gaussian_layers import (
    GaussianCertificate,
    Layers,
    certify_layers,
    convolution_distance,
    plan_layers,
)
from dp_flash_attention.noise.discrete_gaussian_table import (
    DiscreteGaussianTable,
    TableCertificate,
    build_table,
    certify_table,
    hockey_stick_of_shift,
    hockey_stick_to_ideal,
)
from dp_flash_attention.noise.discrete_laplace import discrete_laplace
from dp_flash_attention.noise.entropy import NoiseKey, SecretKey, TestKey
from dp_flash_attention.noise.entropy_sources import (
    CpuInstruction,
    EntropySource,
    ExternalSource,
    KeyFile,
    OsPool,
)
from dp_flash_attention.noise.fast import FastNormalGenerator
from dp_flash_attention.noise.interface import NoiseName, NormalGenerator, make_generator
from dp_flash_attention.noise.secure import SecureNormalGenerator
from dp_flash_attention.noise.seeds import SeedReport, SourceReport, WideSecretKey, draw_wide_key

__all__ = [
    "CpuInstruction",
    "DiscreteGaussianGenerator",
    "DiscreteGaussianTable",
    "EntropySource",
    "ExactCipher",
    "ExternalSource",
    "FastNormalGenerator",
    "GaussianCertificate",
    "KeyFile",
    "Layers",
    "NoiseKey",
    "NoiseName",
    "NormalGenerator",
    "OsPool",
    "SecretKey",
    "SecureBits",
    "SecureNormalGenerator",
    "SeedReport",
    "SourceReport",
    "TableCertificate",
    "TestKey",
    "WideSecretKey",
    "build_table",
    "certify_layers",
    "certify_table",
    "convolution_distance",
    "discrete_laplace",
    "draw_wide_key",
    "hockey_stick_of_shift",
    "hockey_stick_to_ideal",
    "make_generator",
    "plan_layers",
]
