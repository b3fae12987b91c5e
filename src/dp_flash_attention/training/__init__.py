"""Private training: the plan, the engine for loops of your own, and a trainer for everyone else."""

from dp_flash_attention.training.averaging import ParameterAverage
from dp_flash_attention.training.diagnostics import DiagnosticsSink, JsonLinesDiagnostics
from dp_flash_attention.training.execution import ExecutionConfig
from dp_flash_attention.training.microbatches import LogicalStep
from dp_flash_attention.training.noisy_adamw import NoisyAdamW
from dp_flash_attention.training.plan import PrivacyPlan
from dp_flash_attention.training.progress import StepReport
from dp_flash_attention.training.run_directory import RunDirectory
from dp_flash_attention.training.secrets import RunKeys
from dp_flash_attention.training.session import PrivateSession, make_private
from dp_flash_attention.training.trainer import PrivateTrainer, TrainingResult

__all__ = [
    "DiagnosticsSink",
    "ExecutionConfig",
    "JsonLinesDiagnostics",
    "LogicalStep",
    "NoisyAdamW",
    "ParameterAverage",
    "PrivacyPlan",
    "PrivateSession",
    "PrivateTrainer",
    "RunDirectory",
    "RunKeys",
    "StepReport",
    "TrainingResult",
    "make_private",
]
