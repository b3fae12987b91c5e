"""What is clipped together: all parameters as one vector, or groups of them, each to a bound of its own.

With bounds ``C_k`` of groups 1..K and ``Σ C_k² = C²`` an example adds a vector whose part in group k has norm at most C_k,
so the whole has norm at most ``sqrt(Σ C_k²) = C``: the same sensitivity, and the same noise, as flat clipping to C.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_finite

Clipping = Literal["flat", "per_layer"]
"""``"flat"``: one norm over all parameters. ``"per_layer"``: one norm for each group of parameters."""


@dataclass(frozen=True, kw_only=True)
class ClipGroup:
    """Parameters whose gradients are clipped as one vector. Public.

    Attributes:
        name: For people.
        parameters: Names as in ``model.named_parameters()``.
        weight: The group's share: ``C_k = C · weight_k / sqrt(Σ weight²)``.

    Raises:
        InvalidInputError: If there is no parameter, or the weight is not a positive finite number.
    """

    name: str
    parameters: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        names: object = self.parameters
        if isinstance(names, str) or not self.parameters:
            raise InvalidInputError(
                f"parameters of group {self.name!r}",
                self.parameters,
                bound="one or more names of parameters",
                remedy="Leave the group out, or name its parameters as in model.named_parameters().",
            )
        object.__setattr__(self, "parameters", tuple(self.parameters))
        weight = positive_finite(
            f"weight of group {self.name!r}", self.weight, remedy="Equal weights are a good start."
        )
        object.__setattr__(self, "weight", weight)


@dataclass(frozen=True, kw_only=True)
class BoundedGroups:
    """A partition of a model's parameters with the bound of each part.

    Attributes:
        groups: The parts.
        l2_clip_norms: C_k, in their order.

    Guarantees:
        sensitivity: a vector whose part in group k has norm at most C_k has norm at most
            ``sqrt(Σ C_k²)``, which is C up to the rounding of float64 (Pythagoras).
    """

    groups: tuple[ClipGroup, ...]
    l2_clip_norms: tuple[float, ...]

    def index_of(self) -> dict[str, int]:
        """Returns each parameter's group number."""
        return {name: k for k, group in enumerate(self.groups) for name in group.parameters}


def checked_clipping(clipping: object, groups: Sequence[ClipGroup] | None) -> Clipping:
    """Returns the kind of clipping.

    Raises:
        InvalidInputError: If there is none of that name, or flat clipping is given groups.
    """
    if clipping not in get_args(Clipping):
        raise InvalidInputError(
            "clipping",
            clipping,
            bound=" or ".join(map(repr, get_args(Clipping))),
            remedy="Use 'flat' unless memory or speed ask for 'per_layer'.",
        )
    if clipping == "flat" and groups is not None:
        raise InvalidInputError(
            "clip_groups",
            [group.name for group in groups],
            bound="left out with clipping 'flat', which has one group",
            remedy="Use clipping='per_layer'.",
        )
    return "flat" if clipping == "flat" else "per_layer"


def read_groups(values: Sequence[Any] | None) -> tuple[ClipGroup, ...] | None:
    """Returns groups that may have been through JSON, as groups."""
    if values is None:
        return None
    return tuple(value if isinstance(value, ClipGroup) else ClipGroup(**value) for value in values)


def bounded_groups(
    model: nn.Module,
    *,
    l2_clip_norm: float,
    clipping: Clipping = "flat",
    groups: Sequence[ClipGroup] | None = None,
) -> BoundedGroups:
    """Returns the parts of a model's trainable parameters and their bounds.

    Args:
        model: The model.
        l2_clip_norm: C, a checked number.
        clipping: The kind.
        groups: For ``"per_layer"``; None means one of equal weight for each module that owns parameters, modules that
            share a parameter being one.

    Raises:
        InvalidInputError: If the groups are no partition of the trainable parameters.
    """
    clipping = checked_clipping(clipping, groups)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if clipping == "flat":
        return BoundedGroups(
            groups=(ClipGroup(name="all", parameters=tuple(trainable)),), l2_clip_norms=(l2_clip_norm,)
        )
    parts = _groups_by_module(model, trainable) if groups is None else tuple(groups)
    _check_partition(parts, trainable)
    length = math.hypot(*(group.weight for group in parts))
    norms = tuple(l2_clip_norm * (group.weight / length) for group in parts)
    return BoundedGroups(groups=parts, l2_clip_norms=norms)


def _groups_by_module(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> tuple[ClipGroup, ...]:
    canonical = {id(p): name for name, p in trainable.items()}
    group_of: dict[str, str] = {}  # parameter to the module that its group is named after
    for module_name, module in model.named_modules():
        own = [canonical[id(p)] for p in module.parameters(recurse=False) if id(p) in canonical]
        # A parameter of an earlier module joins the two.
        joined = {group_of[name] for name in own if name in group_of}
        name = min(joined, default=module_name or type(model).__name__)
        group_of.update({p: name for p, group in group_of.items() if group in joined})
        group_of.update(dict.fromkeys(own, name))
    members: dict[str, list[str]] = {}
    for parameter in trainable:
        members.setdefault(group_of[parameter], []).append(parameter)
    return tuple(ClipGroup(name=name, parameters=tuple(names)) for name, names in members.items())


def _check_partition(groups: Sequence[ClipGroup], trainable: Mapping[str, nn.Parameter]) -> None:
    listed = [name for group in groups for name in group.parameters]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    unknown = sorted(set(listed) - trainable.keys())
    missing = sorted(trainable.keys() - set(listed))
    for names, what in (
        (twice, "each parameter in one group"),
        (unknown, "names of trainable parameters, a tied one under its first name"),
        (missing, "every trainable parameter in a group, and these are in none"),
    ):
        if names:
            raise InvalidInputError(
                "clip_groups", names[:4], bound=what, remedy="Leave the groups out for one a module."
            )
