"""Checks of what noise is written to, and the rounding of its scale."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.core.validation import positive_finite
from dp_flash_attention.noise.keystream import MAX_NUMBERS

# The transform squares numbers between stddev * 2^-48 and stddev * 9.5; both ends must stay inside
# float32's range.
_MIN_FLOAT32_STDDEV: Final = 2.0**-40
_MAX_FLOAT32_STDDEV: Final = 2.0**60


def checked_stddev(stddev: object, dtype: torch.dtype) -> float:
    """Returns ``stddev`` as a float.

    Raises:
        InvalidInputError: If it is not a positive finite number, or float32 noise would over- or underflow.
    """
    value = positive_finite(
        "stddev",
        stddev,
        remedy="Pass the noise's absolute standard deviation (noise multiplier times clip norm).",
    )
    if dtype is torch.float32 and not _MIN_FLOAT32_STDDEV <= value <= _MAX_FLOAT32_STDDEV:
        raise InvalidInputError(
            "stddev", stddev, bound="between 2^-40 and 2^60 for float32", remedy="Rescale, or use float64."
        )
    return value


def float32_two_variance(stddev: float) -> np.float32:
    """Returns 2·stddev² rounded up: rounding may make the noise larger, never smaller than was accounted."""
    exact = 2.0 * stddev * stddev
    rounded = np.float32(exact)
    return rounded if float(rounded) >= exact else np.nextafter(rounded, np.float32(np.inf))


def checked_tensor(out: object) -> Tensor:
    """Returns ``out`` if noise can be written to it.

    Raises:
        InvalidInputError: If ``out`` is not a dense float32 or float64 tensor without overlap and gradient.
        NoiseUnavailableError: If ``out`` is neither on the CPU nor on a CUDA device.
    """
    return _checked_target(
        out,
        (torch.float32, torch.float64),
        bound="float32 or float64 (narrower noise leaks through its rounding)",
        remedy="Keep clipped sums and noise in float32 and convert after the noise is added.",
    )


def checked_integer_tensor(out: object) -> Tensor:
    """Returns ``out`` if exact noise can be written to it.

    Raises:
        InvalidInputError: If ``out`` is not a dense int64 tensor without overlap.
        NoiseUnavailableError: If ``out`` is neither on the CPU nor on a CUDA device.
    """
    return _checked_target(
        out,
        (torch.int64,),
        bound="int64 (exact noise is made of integers)",
        remedy="Round the values to a public grid and pass their integer coordinates.",
    )


def checked_integer_target(out: object) -> npt.NDArray[Any]:
    """Returns ``out``'s memory as an array.

    Raises:
        InvalidInputError: As ``checked_integer_tensor``.
        NoiseUnavailableError: If ``out`` is not on the CPU.
    """
    return _array_of(checked_integer_tensor(out))


def _checked_target(out: object, dtypes: tuple[torch.dtype, ...], *, bound: str, remedy: str) -> Tensor:
    if not isinstance(out, Tensor):
        raise InvalidInputError("out", type(out).__name__, bound="a torch.Tensor", remedy="Pass a tensor.")
    if out.device.type not in ("cpu", "cuda"):
        raise NoiseUnavailableError(
            f"out is on device {str(out.device)!r}, but this generator writes to the CPU and to CUDA devices. "
            "Keep the sums on the CPU, or fill a CPU tensor and copy it over."
        )
    if out.dtype not in dtypes:
        raise InvalidInputError("out.dtype", out.dtype, bound=bound, remedy=remedy)
    if out.layout is not torch.strided or out.is_neg():
        raise InvalidInputError("out", out.layout, bound="a plain dense tensor", remedy="Pass a dense clone.")
    if out.requires_grad and torch.is_grad_enabled():
        raise InvalidInputError(
            "out.requires_grad",
            True,
            bound="False outside torch.no_grad()",
            remedy="Call under torch.no_grad().",
        )
    if out.numel() > MAX_NUMBERS:
        raise InvalidInputError(
            "out.numel()", out.numel(), bound=f"at most {MAX_NUMBERS}", remedy="Split it."
        )
    if _may_overlap(out):
        raise InvalidInputError(
            "out.stride()",
            tuple(out.stride()),
            bound="free of overlap, or elements would share noise",
            remedy="Pass out.contiguous() or a clone.",
        )
    return out


def checked_target(out: object) -> npt.NDArray[Any]:
    """Returns ``out``'s memory as an array.

    Raises:
        InvalidInputError: As ``checked_tensor``.
        NoiseUnavailableError: If ``out`` is not on the CPU.
    """
    return _array_of(checked_tensor(out))


def _array_of(tensor: Tensor) -> npt.NDArray[Any]:
    if tensor.device.type != "cpu":
        raise NoiseUnavailableError(
            f"out is on device {str(tensor.device)!r}, but this is written on the CPU. "
            "Keep the sums on the CPU, or fill a CPU tensor and copy it over."
        )
    array: npt.NDArray[Any] = tensor.detach().numpy()
    return array


def runs_on_kernel(out: object) -> bool:
    """Whether a kernel writes the numbers: on a CUDA device, and never on the CPU."""
    return isinstance(out, Tensor) and out.device.type == "cuda"


def checked_row_stddev(row_stddev: object, out: object) -> npt.NDArray[Any]:
    """Returns one standard deviation for each row of ``out`` as an array.

    Raises:
        InvalidInputError: If ``out`` is not a contiguous matrix, or the deviations are not one positive
            number in range for each of its rows, in its dtype.
        NoiseUnavailableError: If ``out`` is not on the CPU.
    """
    checked_target(out)
    assert isinstance(out, Tensor)
    if out.ndim != 2 or not out.is_contiguous():
        raise InvalidInputError(
            "out.shape",
            tuple(out.shape),
            bound="a contiguous [rows, width]",
            remedy="Pass one head at a time.",
        )
    fits = (
        isinstance(row_stddev, Tensor)
        and row_stddev.dtype is out.dtype
        and row_stddev.device.type == "cpu"
        and tuple(row_stddev.shape) == (len(out),)
    )
    if not fits:
        raise InvalidInputError(
            "row_stddev",
            getattr(row_stddev, "shape", type(row_stddev).__name__),
            bound=f"a CPU tensor of shape [{len(out)}] and dtype {out.dtype}",
            remedy="Pass one absolute standard deviation for each row.",
        )
    assert isinstance(row_stddev, Tensor)
    for extreme in torch.aminmax(row_stddev) if len(out) else ():
        checked_stddev(float(extreme), out.dtype)
    array: npt.NDArray[Any] = row_stddev.detach().contiguous().numpy()
    # Equal factors as one number with stride 0: a product with a column runs row by row.
    return np.broadcast_to(array[:1], array.shape) if len(out) and bool((array == array[0]).all()) else array


def scale_rows_(numbers: npt.NDArray[Any], start: int, rows: npt.NDArray[Any], width: int) -> None:
    """Multiplies in place a run of a matrix's numbers, from flat index ``start``, by their rows' factors."""
    if rows.strides == (0,):  # one factor for all
        np.multiply(numbers, rows[0], out=numbers)
        return
    first, skipped = divmod(start, width)
    last = -(-(start + len(numbers)) // width)
    if skipped or len(numbers) % width:
        factors = np.repeat(rows[first:last], width)[skipped : skipped + len(numbers)]
        np.multiply(numbers, factors, out=numbers)
    else:
        matrix = numbers.reshape(-1, width)
        np.multiply(matrix, rows[first:last, None], out=matrix)


def _may_overlap(out: Tensor) -> bool:
    """Whether two elements may lie at one address (an expanded tensor, a sliding window)."""
    reach = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
