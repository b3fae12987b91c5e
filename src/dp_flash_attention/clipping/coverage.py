"""Which rule records which parameter, decided once and refused loudly."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dp_flash_attention.clipping.rules import Rule, find_rule
from dp_flash_attention.clipping.rules.per_module import PerModuleFallback
from dp_flash_attention.core.errors import ExampleCouplingError, InvalidInputError, MissingRuleError

# Routers choose experts by comparing tokens of the whole batch and carry load-balancing losses.
_ROUTER_NAMES = ("router", "sparsemoe", "topkgate", "experts")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One module whose forward is replaced while recording.

    Attributes:
        name: The module's name in the model.
        module: The module.
        rule: Its rule.
        parameters: Attribute (or path, for the fallback) to canonical parameter name.
    """

    name: str
    module: nn.Module
    rule: Rule
    parameters: dict[str, str]


def plan_recording(model: nn.Module, fallback_modules: Collection[str]) -> tuple[Recorded, ...]:
    """Assigns every trainable parameter of a model to a rule.

    Raises:
        InvalidInputError: If a fallback name is unknown or nothing is trainable.
        MissingRuleError: If a parameter has no rule; the message names it and its module.
        ExampleCouplingError: If a module mixes the examples of a batch.
    """
    modules = dict(model.named_modules())
    for name in fallback_modules:
        if name not in modules:
            near = get_close_matches(name, modules, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "See model.named_modules() for the names."
            raise InvalidInputError("fallback_modules", name, bound="the name of a module", remedy=hint)
    canonical = {id(p): name for name, p in trainable_parameters(model).items()}
    refuse_batch_statistics(modules)
    _refuse_routers(modules)
    recorded: list[Recorded] = []
    without_rule: list[tuple[str, str]] = []
    for name, module in modules.items():
        if any(name.startswith(f"{outer}.") or outer == "" != name for outer in fallback_modules):
            continue
        if name in fallback_modules:
            paths = {path: canonical[id(p)] for path, p in module.named_parameters() if id(p) in canonical}
            if paths:
                recorded.append(
                    Recorded(name=name, module=module, rule=PerModuleFallback(), parameters=paths)
                )
            continue
        own = {a: canonical[id(p)] for a, p in module.named_parameters(recurse=False) if id(p) in canonical}
        if not own:
            continue
        rule = find_rule(module)
        if rule is None:
            without_rule.extend(
                (p, f"{name}.{a} ({type(module).__name__})".lstrip(".")) for a, p in own.items()
            )
        else:
            recorded.append(Recorded(name=name, module=module, rule=rule, parameters=own))
    # A second name of a parameter that another module records (BERT's decoder bias) needs no rule
    # of its own; the accumulator refuses any use of it outside the recording module.
    covered = {parameter for item in recorded for parameter in item.parameters.values()}
    missing = [shown for parameter, shown in without_rule if parameter not in covered]
    if missing:
        raise MissingRuleError(
            f"no per-example gradient rule for {', '.join(missing)}. Name the owning module in fallback_modules to run it "
            f"one example at a time, or freeze the parameter with requires_grad_(False)."
        )
    return tuple(recorded)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that are trained by name, a tied one once.

    Raises:
        InvalidInputError: If there is none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise InvalidInputError(
            "model",
            type(model).__name__,
            bound="a module with a trainable parameter",
            remedy="Unfreeze some of it.",
        )
    return found


def modules_with_batch_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules that may use statistics of the batch, depending on their mode, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (_BatchNorm, _InstanceNorm))}


def refuse_batch_statistics(modules: Mapping[str, nn.Module]) -> None:
    """Checks that no module uses statistics of the batch in its present mode.

    Raises:
        ExampleCouplingError: If one does; ``model.train()`` after planning can make it so.
    """
    for name, module in modules.items():
        uses_batch = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        tracks_batch = isinstance(module, _InstanceNorm) and module.track_running_stats
        if uses_batch or tracks_batch:
            raise ExampleCouplingError(
                f"module {name!r} is a {type(module).__name__}, which mixes the examples of a batch. Replace it with "
                f"LayerNorm or GroupNorm."
            )


def _refuse_routers(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        kind = type(module).__name__
        if any(part in kind.lower() for part in _ROUTER_NAMES):
            raise ExampleCouplingError(
                f"module {name!r} is a {kind}: routing and load balancing mix the examples of a batch. Use a dense model."
            )
