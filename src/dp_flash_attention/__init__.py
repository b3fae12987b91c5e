"""Private transformers at flash-attention speed.

The names below load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dp_flash_attention.clipping import ClippedGradientAccumulator
    from dp_flash_attention.training import (
        ExecutionConfig,
        PrivacyPlan,
        PrivateSession,
        PrivateTrainer,
        RunKeys,
        StepReport,
        TrainingResult,
        make_private,
    )

_ROOMS = {
    "ClippedGradientAccumulator": "clipping",
    "ExecutionConfig": "training",
    "PrivacyPlan": "training",
    "PrivateSession": "training",
    "PrivateTrainer": "training",
    "RunKeys": "training",
    "StepReport": "training",
    "TrainingResult": "training",
    "make_private": "training",
}

__all__ = [
    "ClippedGradientAccumulator",
    "ExecutionConfig",
    "PrivacyPlan",
    "PrivateSession",
    "PrivateTrainer",
    "RunKeys",
    "StepReport",
    "TrainingResult",
    "make_private",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
