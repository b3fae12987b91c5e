"""Private transformers at flash-attention speed.

The names below load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dp_flash_attention.attention import DPFlashAttention, dp_flash_attention, plan_attention_release
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
    "DPFlashAttention": "attention",
    "ExecutionConfig": "training",
    "PrivacyPlan": "training",
    "PrivateSession": "training",
    "PrivateTrainer": "training",
    "RunKeys": "training",
    "StepReport": "training",
    "TrainingResult": "training",
    "dp_flash_attention": "attention",
    "make_private": "training",
    "plan_attention_release": "attention",
}

__all__ = [
    "ClippedGradientAccumulator",
    "DPFlashAttention",
    "ExecutionConfig",
    "PrivacyPlan",
    "PrivateSession",
    "PrivateTrainer",
    "RunKeys",
    "StepReport",
    "TrainingResult",
    "dp_flash_attention",
    "make_private",
    "plan_attention_release",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
