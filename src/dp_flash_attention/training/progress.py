"""What training tells whoever watches it. Everything here is public; drawing it is the caller's business."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dp_flash_attention.training.plan import PrivacyPlan


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """State of a run after a step.

    Attributes:
        step: Number of finished steps.
        num_steps: Number of steps of the plan.
        epsilon_spent: Upper bound of ε so far, at the plan's δ.
        examples_per_s: Expected batch size times steps over time. The sampled sizes are private data.
        elapsed_s: Seconds since this process began training.
        eta_s: Expected seconds until the last step.
    """

    step: int
    num_steps: int
    epsilon_spent: float
    examples_per_s: float
    elapsed_s: float
    eta_s: float


OnStep = Callable[[StepReport], None]


class Stopwatch:
    """Makes the reports of one process.

    Args:
        plan: The plan.
        first_step: Number of steps that were done before.
    """

    def __init__(self, plan: PrivacyPlan, first_step: int) -> None:
        self._plan, self._first_step = plan, first_step
        self._epsilon_after = plan.epsilon_schedule()
        self._began_s = time.monotonic()

    def report(self, step: int) -> StepReport:
        """Returns the report after ``step`` finished steps."""
        elapsed_s = max(time.monotonic() - self._began_s, 1e-9)
        steps_per_s = max(step - self._first_step, 1) / elapsed_s
        return StepReport(
            step=step,
            num_steps=self._plan.num_steps,
            epsilon_spent=self._epsilon_after(step),
            examples_per_s=self._plan.expected_batch_size * steps_per_s,
            elapsed_s=elapsed_s,
            eta_s=(self._plan.num_steps - step) / steps_per_s,
        )
