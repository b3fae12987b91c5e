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
# Sums of squares of larger numbers could overflow, and a norm could not be computed.
_LARGEST_FLOAT = 1e140

_KINDS = "a finite float or whole number, a NumPy array or a dense torch tensor of them"
_NATIVE = (np.float32, np.float64, np.int64)


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A value as a vector.

    Attributes:
        flat: Its numbers as float32, float64 or int64 [d]; every supported kind fits one of them without rounding.
            It may share the value's memory: never write to it.
        whole: Whether its type holds whole numbers only, a property of the type and so public.
        largest: Largest magnitude; as private as the value.
        restore: Turns a vector of that length into the kind that came in. Whole-numbered types narrower than the result
            saturate at their ends.
    """

    flat: npt.NDArray[Any]
    whole: bool
    largest: float
    restore: Callable[[npt.NDArray[Any]], Any]

    @property
    def vector(self) -> Vector:
        """The numbers in double precision, exactly."""
        return self.flat.astype(np.float64, copy=False)


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
        flat, restore = _from_tensor(value)
    elif isinstance(value, np.ndarray):
        flat, restore = _from_array(value)
    elif isinstance(value, Integral):
        if abs(int(value)) > MAX_MAGNITUDE:
            raise _too_large()
        flat, restore = np.array([int(value)], dtype=np.int64), lambda found: round(float(found[0]))
    elif isinstance(value, float | np.float32 | np.float16):
        flat, restore = np.array([float(value)]), lambda found: float(found[0])
    else:
        raise InvalidInputError("value", type(value).__name__, bound=_KINDS, remedy="Convert it first.")
    if flat.size == 0:
        raise InvalidInputError("value", "empty", bound="at least one number", remedy="Release something.")
    low, high = torch.aminmax(torch.from_numpy(flat))  # a NaN anywhere comes out as NaN
    largest = max(-low.item(), high.item()) if low.item() == low.item() else float("nan")
    whole = flat.dtype == np.int64
    if whole and largest > MAX_MAGNITUDE:
        raise _too_large()
    if not whole and not largest <= _LARGEST_FLOAT:
        raise InvalidInputError(
            "value", "not shown", bound="finite (no NaN, no infinity)", remedy="Find where it overflowed."
        )
    return Unpacked(flat=flat, whole=whole, largest=float(largest), restore=restore)


def _from_tensor(tensor: torch.Tensor) -> tuple[npt.NDArray[Any], Callable[[npt.NDArray[Any]], Any]]:
    refused = (torch.bool, torch.uint64)  # uint64 would wrap round in int64
    if tensor.layout is not torch.strided or tensor.is_complex() or tensor.dtype in refused:
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
    wide = torch.float32 if tensor.dtype is torch.float32 else torch.float64
    dtype = wide if tensor.is_floating_point() else torch.int64
    flat = tensor.detach().reshape(-1).to(device="cpu", dtype=dtype).numpy()

    def restore(result: npt.NDArray[Any]) -> torch.Tensor:
        if dtype is torch.int64:
            limits = torch.iinfo(tensor.dtype)
            result = _saturated(result, limits.min, limits.max)
        back = torch.from_numpy(np.ascontiguousarray(result)).reshape(tensor.shape)
        return back.to(device=tensor.device, dtype=tensor.dtype)

    return flat, restore


def _from_array(array: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], Callable[[npt.NDArray[Any]], Any]]:
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise InvalidInputError("value", f"array of {array.dtype}", bound=_KINDS, remedy="Convert it first.")
    whole = array.dtype.kind in "iu"
    if array.dtype == np.uint64 and array.size and int(array.max()) > MAX_MAGNITUDE:
        raise _too_large()  # before it wraps round
    native = array if array.dtype in _NATIVE else array.astype(np.int64 if whole else np.float64)
    flat = np.ascontiguousarray(native).reshape(-1)
    # torch takes neither read-only nor foreign-endian memory.
    flat = (
        flat
        if flat.flags.writeable and flat.dtype.isnative
        else np.array(flat, dtype=flat.dtype.newbyteorder("="))
    )

    def restore(result: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if whole:
            limits = np.iinfo(array.dtype)
            result = _saturated(result, int(limits.min), int(limits.max))
        return result.reshape(array.shape).astype(array.dtype, copy=False)

    return flat, restore


def _saturated(result: npt.NDArray[Any], low: int, high: int) -> npt.NDArray[np.int64]:
    whole = result if result.dtype == np.int64 else np.rint(result).astype(np.int64)
    # Nothing beyond 2^63 can come in, so 64-bit types have no ends to saturate at but 0.
    clipped: npt.NDArray[np.int64] = np.clip(whole, max(low, -(2**63)), min(high, 2**63 - 1))
    return clipped


def _too_large() -> InvalidInputError:
    return InvalidInputError(
        "value", "not shown", bound="at most 2^52 in magnitude", remedy="Scale it down first."
    )
