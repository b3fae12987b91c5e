"""One per-example gradient rule a file, and the table that finds a module's rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from dp_flash_attention.clipping.tape import Tape


class Rule(Protocol):
    """How one kind of module records per-example gradients.

    A rule replaces the module's ``forward`` while a tape is recording. The replacement computes the
    same output; in the backward pass it returns the same input gradients, leaves ``parameter.grad``
    alone, and puts contributions on the tape.
    """

    def matches(self, module: nn.Module) -> bool:
        """Whether this rule is exact for the module as it is configured."""
        ...

    def recording_forward(
        self, module: nn.Module, *, name: str, parameters: dict[str, str], tape: Tape
    ) -> Callable[..., Any]:
        """Returns the replacement of ``module.forward``.

        Args:
            module: The module.
            name: Its name in the model, for errors.
            parameters: For each of the module's own trainable parameters, its attribute name and
                the name under which the tape records it (tied weights share one).
            tape: Where contributions go.
        """
        ...


def find_rule(module: nn.Module) -> Rule | None:
    """Returns the rule for a module that owns parameters, or None if no rule is exact for it."""
    from dp_flash_attention.clipping.rules.broadcast import BroadcastRule
    from dp_flash_attention.clipping.rules.conv import ConvRule
    from dp_flash_attention.clipping.rules.embedding import EmbeddingRule
    from dp_flash_attention.clipping.rules.layer_norm import LayerNormRule
    from dp_flash_attention.clipping.rules.linear import LinearRule
    from dp_flash_attention.clipping.rules.linear_cross_entropy import LinearCrossEntropyRule
    from dp_flash_attention.clipping.rules.rms_norm import RMSNormRule

    rules: tuple[Rule, ...] = (
        LinearRule(),
        LinearCrossEntropyRule(),
        EmbeddingRule(),
        LayerNormRule(),
        RMSNormRule(),
        ConvRule(),
        BroadcastRule(),
    )
    return next((rule for rule in rules if rule.matches(module)), None)
