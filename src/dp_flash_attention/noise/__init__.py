"""Entropy, counter-based generators and exact samplers. Receives a standard deviation; knows no ε.

``cryptography`` is imported only when a secure generator is built.
"""

from dp_flash_attention.noise.bits import SecureBits
from dp_flash_attention.noise.discrete_laplace import discrete_laplace
from dp_flash_attention.noise.entropy import NoiseKey, SecretKey, TestKey
from dp_flash_attention.noise.fast import FastNormalGenerator
from dp_flash_attention.noise.interface import NoiseName, NormalGenerator, make_generator
from dp_flash_attention.noise.secure import SecureNormalGenerator

__all__ = [
    "FastNormalGenerator",
    "NoiseKey",
    "NoiseName",
    "NormalGenerator",
    "SecretKey",
    "SecureBits",
    "SecureNormalGenerator",
    "TestKey",
    "discrete_laplace",
    "make_generator",
]
