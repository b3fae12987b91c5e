"""Settings that can change a run's speed and memory, and never its privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dp_flash_attention.clipping.one_example import check_one_example
from dp_flash_attention.clipping.strategies import Strategy, checked_strategy
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a plan is carried out.

    All but the last two decide the order of floating-point additions, so a run is resumed with the values it was
    started with; see ``trainer``.

    Attributes:
        microbatch_size: Rows of one forward and backward pass; every microbatch has this shape.
        num_threads: Threads of PyTorch's operators; None keeps what is set.
        compile: Whether a microbatch's step becomes one graph of ``torch.compile``, see ``clipping.compiled``.
        strategy: ``"bookkeeping"``; ``"two_pass"`` for less memory and more time; or ``"one_example"``, with
            ``microbatch_size=1``, for sequences of which one fills memory and for models without rules. See ``clipping``.
        norm_forms: ``"formula"``, or ``"measured"`` to time the forms of linear maps' norms on synthetic tensors before
            the first step and to keep the choice in the run's record; see ``clipping.norm_forms``.
        checkpoint_every: Logical steps between checkpoints; the first and the last step always have one.
        memory_limit_bytes: What a microbatch's step may hold beyond parameters, optimizer state and data. It is estimated from
            two small eager steps before anything is made or spent (``memory_plan``); None does not look.

    Raises:
        InvalidInputError: If a number is not a whole one of at least 1, a strategy or a way of choosing norms is
            unknown, anything but book-keeping is to be compiled into one graph, or microbatches of one example have
            several.
    """

    microbatch_size: int = 64
    num_threads: int | None = None
    compile: bool = False
    strategy: Strategy = "bookkeeping"
    norm_forms: Literal["formula", "measured"] = "formula"
    checkpoint_every: int = 50
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        positive_int("microbatch_size", self.microbatch_size, remedy="Use the largest that fits into memory.")
        positive_int("checkpoint_every", self.checkpoint_every, remedy="50 is a good start.")
        if checked_strategy(self.strategy, compile=self.compile) == "one_example":
            check_one_example(self.microbatch_size)
        if self.norm_forms not in ("formula", "measured"):
            raise InvalidInputError(
                "norm_forms",
                self.norm_forms,
                bound="'formula' or 'measured'",
                remedy="'measured' takes some seconds before the first step.",
            )
        if self.memory_limit_bytes is not None:
            positive_int("memory_limit_bytes", self.memory_limit_bytes, remedy="Pass bytes, or None.")
        if self.num_threads is not None:
            positive_int("num_threads", self.num_threads, remedy="Use the number of cores, or None.")
