"""What surrounds one recorded pass: forwards that record, and checks that nothing went past them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from dp_flash_attention.clipping.coverage import Recorded
from dp_flash_attention.clipping.tape import Tape
from dp_flash_attention.core.errors import ExampleCouplingError, MissingRuleError


@contextmanager
def recording_forwards(
    recorded: Iterable[Recorded], parameters: Mapping[str, nn.Parameter], tape: Tape
) -> Iterator[None]:
    """Replaces the forwards for the duration of one microbatch, and takes gradients off their parameters.

    Raises:
        MissingRuleError: If a forward was replaced by somebody else.
    """
    recorded = tuple(recorded)
    for item in recorded:
        if "forward" in item.module.__dict__:
            raise MissingRuleError(
                f"the forward of module {item.name!r} ({type(item.module).__name__}) was replaced on the object, by a "
                f"hook or a patched kernel, and its rule knows the class's own only. Remove the replacement before "
                f"making the model private."
            )
    before = {name: p.grad for name, p in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        for item in recorded:
            item.module.__dict__["forward"] = item.rule.recording_forward(
                item.module, name=item.name, parameters=item.parameters, tape=tape
            )
        yield
    finally:
        for item in recorded:
            item.module.__dict__.pop("forward", None)
        for name, parameter in parameters.items():
            parameter.grad = before[name]


def check_no_gradient_outside(parameters: Mapping[str, nn.Parameter]) -> None:
    """Checks, after a recorded backward pass, that every gradient went through a rule.

    Raises:
        MissingRuleError: If a parameter got an ordinary gradient.
    """
    outside = [name for name, p in parameters.items() if p.grad is not None]
    if outside:
        raise MissingRuleError(
            f"{_listed(outside)} took part in the loss outside the module that owns it, where no rule sees it. "
            f"Call the module instead of using its weight directly, or name the enclosing module in "
            f"fallback_modules."
        )


def check_all_seen(parameters: Iterable[str], tape: Tape) -> None:
    """Checks that every parameter had a gradient in this microbatch.

    Raises:
        MissingRuleError: If one had none.
    """
    unseen = [name for name in parameters if not tape.has_seen(name)]
    if unseen:
        raise MissingRuleError(
            f"{_listed(unseen)} is trainable but saw no gradient in this microbatch. Freeze it with "
            f"requires_grad_(False) before making the model private, or use it in the loss."
        )


def check_losses(losses: object, batch_size: int) -> None:
    """Checks that there is one loss for each example.

    Raises:
        ExampleCouplingError: If not.
    """
    if not isinstance(losses, Tensor) or losses.shape != (batch_size,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ExampleCouplingError(
            f"the loss has shape {shape}, but it must have one entry for each of the {batch_size} examples. Use "
            f"reduction='none' and divide each example's sum by its own number of tokens."
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"parameter {shown}{more}"
