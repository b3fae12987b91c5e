"""Tensors, arrays and numbers as flat vectors, and back as what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dp_flash_attention.core.errors import InvalidInputError

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
# Doubles hold every integer up to 2^53; one bit is left for the noise.
MAX_MAGNITUDE = 2.0**52

_KINDS = "a finite float or whole number, a NumPy array or a dense torch tensor of them"


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A value as a vector.

    Attributes:
        vector: Its numbers, float64 [d]; every supported kind fits without rounding.
        whole: Whether its type holds whole numbers only, a property of the type and so public.
        restore: Turns a vector of that length into the kind that came in.
    """

    vector: Vector
    whole: bool
    restore: Callable[[Vector], Any]


def unpack(value: object) -> Unpacked:
    """Returns ``value`` as a vector.

    A CUDA tensor is copied to the host and its result back, 16 bytes a coordinate over the bus in all.

    Raises:
        InvalidInputError: If it is of another kind, empty, not finite or too large. The message names no
            number of the value: errors end up in logs.
    """
    if isinstance(value, bool):
        raise InvalidInputError("value", "bool", bound=_KINDS, remedy="Convert it first.")
    if isinstance(value, torch.Tensor):
        found = _from_tensor(value)
    elif isinstance(value, np.ndarray):
        found = _from_array(value)
    elif isinstance(value, Integral):
        whole_number = int(value)
        if abs(whole_number) > MAX_MAGNITUDE:
            raise _too_large()
        found = Unpacked(
            vector=np.array([whole_number], dtype=np.float64), whole=True, restore=lambda v: round(v[0])
        )
    elif isinstance(value, float | np.float32 | np.float16):
        found = Unpacked(
            vector=np.array([float(value)], dtype=np.float64), whole=False, restore=lambda v: float(v[0])
        )
    else:
        raise InvalidInputError("value", type(value).__name__, bound=_KINDS, remedy="Convert it first.")
    if found.vector.size == 0:
        raise InvalidInputError("value", "empty", bound="at least one number", remedy="Release something.")
    # One pass: a sum of squares is finite only if every number is, and none is near the top of the range.
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(np.dot(found.vector, found.vector))
    if not np.isfinite(squared):
        raise InvalidInputError(
            "value", "not shown", bound="finite (no NaN, no infinity)", remedy="Find where it overflowed."
        )
    return found


def _from_tensor(tensor: torch.Tensor) -> Unpacked:
    if tensor.layout is not torch.strided or tensor.is_complex() or tensor.dtype is torch.bool:
        raise InvalidInputError(
            "value", f"tensor of {tensor.dtype}", bound=_KINDS, remedy="Convert it first."
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InvalidInputError(
            "value.requires_grad",
            True,
            bound="False, for noise has no gradient",
            remedy="Pass value.detach().",
        )
    whole = not tensor.is_floating_point()
    if whole and int(tensor.abs().max() if tensor.numel() else 0) > MAX_MAGNITUDE:
        raise _too_large()
    vector = tensor.detach().reshape(-1).to(device="cpu", dtype=torch.float64).numpy()

    def restore(result: Vector) -> torch.Tensor:
        back = torch.from_numpy(result).reshape(tensor.shape)
        return back.to(device=tensor.device, dtype=tensor.dtype)

    return Unpacked(vector=vector, whole=whole, restore=restore)


def _from_array(array: npt.NDArray[Any]) -> Unpacked:
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise InvalidInputError("value", f"array of {array.dtype}", bound=_KINDS, remedy="Convert it first.")
    whole = array.dtype.kind in "iu"
    if whole and array.size and max(abs(int(array.max())), abs(int(array.min()))) > MAX_MAGNITUDE:
        raise _too_large()

    def restore(result: Vector) -> npt.NDArray[Any]:
        return result.reshape(array.shape).astype(array.dtype)

    return Unpacked(vector=array.astype(np.float64).reshape(-1), whole=whole, restore=restore)


def _too_large() -> InvalidInputError:
    return InvalidInputError(
        "value", "not shown", bound="at most 2^52 in magnitude", remedy="Scale it down first."
    )
