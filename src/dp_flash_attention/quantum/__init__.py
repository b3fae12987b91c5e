"""Mechanisms whose guarantee outlives today's cryptography, and the checks that try to refute them.

The names below load on first use. What is checked is in ``evidence`` and ``verification``; a subject's checks are one
file under ``checks``; simulated attackers are in ``attackers``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dp_flash_attention.quantum.amplitude_estimation_resistant import AmplitudeEstimationResistant
    from dp_flash_attention.quantum.charges import ChargeBook, ConcentratedBudget
    from dp_flash_attention.quantum.durable_charges import DurableChargeBook
    from dp_flash_attention.quantum.interface import DeltaParts, Layer, Mechanism, Release
    from dp_flash_attention.quantum.lattice_gaussian import LatticeGaussian
    from dp_flash_attention.quantum.layered_noise import LayeredNoise
    from dp_flash_attention.quantum.memo_key import create_memo_key, load_memo_key
    from dp_flash_attention.quantum.post_quantum_gaussian import PostQuantumGaussian

_MODULES = {
    "AmplitudeEstimationResistant": "amplitude_estimation_resistant",
    "ChargeBook": "charges",
    "ConcentratedBudget": "charges",
    "DeltaParts": "interface",
    "DurableChargeBook": "durable_charges",
    "LatticeGaussian": "lattice_gaussian",
    "Layer": "interface",
    "LayeredNoise": "layered_noise",
    "Mechanism": "interface",
    "PostQuantumGaussian": "post_quantum_gaussian",
    "Release": "interface",
    "create_memo_key": "memo_key",
    "load_memo_key": "memo_key",
}

__all__ = [
    "AmplitudeEstimationResistant",
    "ChargeBook",
    "ConcentratedBudget",
    "DeltaParts",
    "DurableChargeBook",
    "LatticeGaussian",
    "Layer",
    "LayeredNoise",
    "Mechanism",
    "PostQuantumGaussian",
    "Release",
    "create_memo_key",
    "load_memo_key",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
