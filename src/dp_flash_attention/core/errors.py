"""The errors this library raises on purpose.

Each message states the name, the value, the bound and the remedy on one line.
"""

from __future__ import annotations


class DPFlashAttentionError(Exception):
    """Base class of every error that this library raises on purpose."""


class InvalidInputError(DPFlashAttentionError, ValueError):
    """A value that the caller passed lies outside its bound.

    Args:
        name: What the caller calls the value, for example ``epsilon``.
        value: The offending value, shown with ``repr``.
        bound: What the value must satisfy.
        remedy: What to do about it.
    """

    def __init__(self, name: str, value: object, *, bound: str, remedy: str) -> None:
        self.name = name
        self.value = value
        self.bound = bound
        self.remedy = remedy
        super().__init__(f"{name} is {value!r}, but it must be {bound}. {remedy}")


class DataError(DPFlashAttentionError, ValueError):
    """A data file cannot be used as asked (missing column, bad rows, no rows)."""


class MissingRuleError(DPFlashAttentionError, ValueError):
    """A trainable parameter has no per-example gradient rule, or its rule saw no gradient."""


class ExampleCouplingError(DPFlashAttentionError, ValueError):
    """One example's loss or gradient depends on another example of its batch."""


class BudgetExhaustedError(DPFlashAttentionError, RuntimeError):
    """The next release would exceed the privacy budget; nothing was computed or spent."""


class NoiseUnavailableError(DPFlashAttentionError, RuntimeError):
    """The requested noise cannot be produced (no secure entropy, no cipher); there is no fallback."""


class NoiseReuseError(DPFlashAttentionError, RuntimeError):
    """A (key, step, stream) position of a noise generator would be used for two releases."""


class KernelMismatchError(DPFlashAttentionError, RuntimeError):
    """A kernel disagrees with its reference on this machine; its result must not be used, and was not."""


class CompilationError(DPFlashAttentionError, RuntimeError):
    """A step cannot be compiled, or its compiled form disagrees with the eager one; nothing was added or spent."""


class RunStateError(DPFlashAttentionError, RuntimeError):
    """A run directory, checkpoint or call order does not allow the requested action."""


class DependencyMissingError(DPFlashAttentionError, ImportError):
    """An optional package is needed for what was asked; the message names its install command."""
