"""What a run was started with, in a form that a resumed run can be compared with.

Resuming a step with other data or settings would add the same noise to another sum; the difference of the two
would show the data. So a run goes on only with exactly what it was started with.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import struct
import types
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.training.microbatches import RecordSource

_ROWS_AT_ONCE = 4096


def dataset_fingerprint(source: RecordSource, key: NoiseKey) -> str:
    """Returns a keyed hash of all records in their order, as hexadecimal digits.

    Without the key it tells nothing about the data, not even whether a guess of it is right.

    Raises:
        InvalidInputError: If the data set does not return one row for each record.
    """
    digest = hashlib.blake2b(struct.pack("<Q", len(source)), key=key.export(), digest_size=32)
    for start in range(0, len(source), _ROWS_AT_ONCE):
        rows = source.fetch(torch.arange(start, min(start + _ROWS_AT_ONCE, len(source))))
        leaves, structure = pytree.tree_flatten(rows)
        _add(digest, str(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                _add(digest, f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                _add(digest, leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            else:
                _add(digest, repr(leaf).encode())
    return digest.hexdigest()


def numerics(device: torch.device, num_threads: int) -> dict[str, Any]:
    """Returns what decides how floating-point numbers come out, beside the settings of the run."""
    return {
        "dp_flash_attention": version("dp-flash-attention"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version_tuple()[:2],
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": num_threads,
    }


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the optimizer's class and the settings of its groups, as JSON values."""
    groups = [
        {name: _plain(value) for name, value in group.items() if name != "params"}
        | {"num_params": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return {"class": _name_of(type(optimizer)), "groups": groups}


def model_settings(model: nn.Module) -> dict[str, Any]:
    """Returns the model's class and hashes of its parameters (names, shapes, dtypes) and of its printed modules.

    What the modules print is what decides their results beside the parameters: dropout, epsilons, shapes.
    """
    listed = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    return {
        "class": _name_of(type(model)),
        "parameters": _hash(listed),
        "modules": _hash(_without_addresses(repr(model))),
    }


def schedule_settings(schedule: Callable[[int], float] | None, num_steps: int) -> str | None:
    """Returns a hash of a schedule's values, or None without one."""
    return None if schedule is None else _hash([float(schedule(step)).hex() for step in range(num_steps)])


def function_settings(function: object) -> str:
    """Returns a function's name with a hash of its code, by which a changed function is told.

    The hash covers the code with its constants and nested functions, default arguments and, as far as they are plain
    values, what it captured. Functions that it calls are known by their names alone.
    """
    inner = getattr(function, "func", None)
    if callable(inner):  # functools.partial
        arguments = (getattr(function, "args", ()), sorted(getattr(function, "keywords", {}).items()))
        return f"{function_settings(inner)} with {_hash([_plain_or_kind(value) for value in arguments])}"
    if not hasattr(function, "__qualname__"):
        return f"{_name_of(type(function))}#{_hash(_code_of(type(function).__call__))}"
    return f"{_name_of(function)}#{_hash(_code_of(function))}"


def _code_of(function: Any) -> list[Any]:
    code = getattr(function, "__code__", None)
    if code is None:  # built in
        return []
    captured = [_plain_or_kind(_content(cell)) for cell in getattr(function, "__closure__", None) or ()]
    defaults = [_plain_or_kind(value) for value in getattr(function, "__defaults__", None) or ()]
    keyword_only = sorted((getattr(function, "__kwdefaults__", None) or {}).items())
    return [*_code_parts(code), captured, defaults, [(k, _plain_or_kind(v)) for k, v in keyword_only]]


def _code_parts(code: types.CodeType) -> list[Any]:
    """Returns what a code object does, without where it stands."""
    constants: list[Any] = []
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            constants.append(_code_parts(value))
        else:
            # The order of a set's members changes from process to process.
            constants.append(sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value))
    return [code.co_code, code.co_names, code.co_varnames, constants]


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _plain_or_kind(value: object) -> object:
    """Returns numbers and texts as they are, and of anything else its type."""
    if isinstance(value, tuple | list):
        return [_plain_or_kind(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else _name_of(type(value))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str | None:
    """Returns a sentence on the first entry in which two trees of JSON values differ, or None."""
    for name in sorted(before.keys() | now.keys()):
        path = f"{prefix}{name}"
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            nested = first_difference(old, new, f"{path}.")
            if nested is not None:
                return nested
        elif old != new:
            return f"{path} was {old!r} and is now {new!r}"
    return None


def as_json_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what reading the settings back from JSON would give."""
    values: dict[str, Any] = json.loads(json.dumps(settings, default=_plain))
    return values


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _name_of(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _hash(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def _add(digest: Any, data: bytes) -> None:
    # Lengths keep neighbouring fields from running into each other.
    digest.update(struct.pack("<Q", len(data)))
    digest.update(data)
