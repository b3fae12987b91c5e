"""Tensors, arrays and numbers as flat vectors, and back as what they were.

What a value *is* (kind, dtype, shape, whether it is empty) is public and may be refused. What it *holds* is private, and an
error is something an observer sees: so every content is taken, by maps that are fixed for each coordinate. NaN counts as 0,
and what is beyond a public bound counts as that bound. Saturation moves no two numbers further apart; NaN has no distance
from anything, so a sensitivity is one between values with their NaN counted as 0.
"""

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
_MAX_WHOLE = 2**52
LARGEST_FLOAT = 2.0**464
"""Where floats saturate before a norm is taken: the sum of squares of larger ones could overflow."""
_LARGEST_INT64 = 2.0**63 - 2.0**10  # the largest double that fits
_CHUNK = 1 << 15

_KINDS = "a float or whole number, a NumPy array or a dense torch tensor of them"
_NATIVE = (np.float32, np.float64, np.int64)


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A value as a vector.

    Attributes:
        flat: Its numbers as float32, float64 or int64 [d]; every supported kind fits one of them without rounding.
            It may share the value's memory: never write to it. It may hold NaN and infinity.
        whole: Whether its type holds whole numbers only, a property of the type and so public.
        restore: Turns a vector of that length into the kind that came in. Whole-numbered types narrower than the result
            saturate at their ends.
    """

    flat: npt.NDArray[Any]
    whole: bool
    restore: Callable[[npt.NDArray[Any]], Any]

    @property
    def vector(self) -> Vector:
        """A copy in double precision: NaN as 0, floats saturated at ±2^464, whole numbers at ±2^52, the rest exactly."""
        out = np.empty(self.flat.shape, dtype=np.float64)
        for start in range(0, len(out), _CHUNK):
            part = slice(start, start + _CHUNK)
            write_bounded(self.flat[part], out[part], limit=LARGEST_FLOAT)
        return out


def write_bounded(part: npt.NDArray[Any], out: Vector, *, limit: float, scale: float = 1.0) -> None:
    """Writes ``part * scale`` to ``out``: NaN as 0, saturated at ±``limit``. The work is the same whatever it holds.

    Args:
        part: float32, float64 or int64 [d]. Whole numbers first saturate at ±2^52, which doubles hold exactly.
        out: float64 [d].
        limit: Above 0.
        scale: A power of two.
    """
    numbers = torch.from_numpy(out)
    if part.dtype == np.int64:
        part = np.clip(part, -_MAX_WHOLE, _MAX_WHOLE)
    with np.errstate(all="ignore"):  # a warning of an overflow would be something to see
        np.copyto(out, part)  # by itself: a product that converts as well takes half as long again
        if scale != 1.0:
            np.multiply(out, scale, out=out)
    numbers.nan_to_num_(nan=0.0).clamp_(-limit, limit)


def unpack(value: object) -> Unpacked:
    """Returns ``value`` as a vector.

    A CUDA tensor is copied to the host and its result back, 16 bytes a coordinate over the bus in all.

    Raises:
        InvalidInputError: If it is of another kind or empty. What it holds never raises.
    """
    if isinstance(value, bool):
        raise InvalidInputError("value", "bool", bound=_KINDS, remedy="Convert it first.")
    if isinstance(value, torch.Tensor):
        flat, restore = _from_tensor(value)
    elif isinstance(value, np.ndarray):
        flat, restore = _from_array(value)
    elif isinstance(value, Integral):
        held = max(-_MAX_WHOLE, min(_MAX_WHOLE, int(value)))  # before 64 bits are too few
        flat, restore = np.array([held], dtype=np.int64), lambda found: round(float(found[0]))
    elif isinstance(value, float | np.float32 | np.float16):
        flat, restore = np.array([float(value)]), lambda found: float(found[0])
    else:
        raise InvalidInputError("value", type(value).__name__, bound=_KINDS, remedy="Convert it first.")
    if flat.size == 0:
        raise InvalidInputError("value", "empty", bound="at least one number", remedy="Release something.")
    return Unpacked(flat=flat, whole=flat.dtype == np.int64, restore=restore)


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
    # 64 unsigned bits saturate before they wrap round.
    held = np.minimum(array, _MAX_WHOLE) if array.dtype == np.uint64 else array
    native = held if held.dtype in _NATIVE else held.astype(np.int64 if whole else np.float64)
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
        with np.errstate(all="ignore"):  # half floats round to infinity, in silence
            return result.reshape(array.shape).astype(array.dtype, copy=False)

    return flat, restore


def _saturated(result: npt.NDArray[Any], low: int, high: int) -> npt.NDArray[np.int64]:
    if result.dtype != np.int64:
        result = np.clip(np.rint(result), -_LARGEST_INT64, _LARGEST_INT64).astype(np.int64)
    # 64-bit types have no ends to saturate at but 0.
    clipped: npt.NDArray[np.int64] = np.clip(result, max(low, -(2**63)), min(high, 2**63 - 1))
    return clipped
