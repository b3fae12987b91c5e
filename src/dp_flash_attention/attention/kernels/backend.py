"""The Triton kernel as a back end of DP attention."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from dp_flash_attention.attention.interface import AttentionCall, AttentionNoise, Rounding
from dp_flash_attention.core.errors import DependencyMissingError, NoiseUnavailableError
from dp_flash_attention.noise.device import require_triton

if TYPE_CHECKING:
    from dp_flash_attention.attention.interface import AttentionBackend

_VALUE_WIDTHS: Final = (16, 32, 64, 128, 256)
_MAX_WIDTH: Final = 256
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
# Squares of numbers around the bounds, and products of rows up to 2^40 bounds, stay inside float32's range.
_MIN_NORM: Final = 2.0**-40
_MAX_NORM: Final = 2.0**40
# A weight is at least e^(-2S) = 2^-58 and a value's factor 2^-40 or 0: their product is a normal number of
# float32's range, so that rounding it is a relative error (docs/kernels.md).
_MAX_SCORE_BOUND: Final = 20.0


class TritonBackend:
    """One kernel that clips, attends and adds noise; the output is written once. Two kernels for its gradients.

    Guarantees:
        * Neighbouring relation, privacy unit, sensitivity, what is public: those of the call's plan; this object
          promises ``AttentionBackend``'s three conditions and ``Rounding.FIXED_SHIFT``.
        * Theorem: docs/kernels.md, "Why the folded factors clip": the row that is averaged for a query is a function of
          that query and the record's row, has norm at most the public bound, and its weight lies between e^(-2S) and
          1.
        * Source: Dao et al. 2022 (tiling); the clipping and the noise are this library's.
    """

    name: Final = "triton"
    roundings: Final[Collection[Rounding]] = (Rounding.FIXED_SHIFT, Rounding.RUNNING_MAX)
    noises: Final[Collection[AttentionNoise]] = ("secure", "fast")

    def refusal(self, call: AttentionCall, *, needs_grad: bool) -> str | None:
        """Returns why it cannot run ``call``, or None if it can."""
        return (
            _refused_device(call.query)
            or _refused_shape(call)
            or _refused_range(call)
            or _refused_noise(call)
            or _failed_check(call, needs_grad=needs_grad)
        )

    def release(self, call: AttentionCall) -> Tensor:
        """Returns the noisy output, [B, H, Q, E] in ``out_dtype``, contiguous; differentiable if inputs need it."""
        from dp_flash_attention.attention.kernels.differentiable import differentiable_attention
        from dp_flash_attention.attention.kernels.launch import attention_forward

        if torch.is_grad_enabled() and any(rows.requires_grad for rows in (call.query, call.key, call.value)):
            return differentiable_attention(call)
        output, _ = attention_forward(call)
        return output


def _refused_device(query: Tensor) -> str | None:
    import triton

    if triton.knobs.runtime.interpret:
        return None if query.device.type == "cpu" else "Triton's interpreter is on, which runs on the CPU"
    if query.device.type != "cuda":
        return f"it needs a CUDA device, not {str(query.device)!r}"
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


def _refused_shape(call: AttentionCall) -> str | None:
    if call.query.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {call.query.dtype}"
    if not 1 <= call.query.shape[3] <= _MAX_WIDTH:
        return f"queries of width {call.query.shape[3]} are wider than {_MAX_WIDTH}"
    if call.value.shape[3] not in _VALUE_WIDTHS:
        return f"values of width {call.value.shape[3]} do not fill whole tiles of noise; it takes {_VALUE_WIDTHS}"
    return None


def _refused_range(call: AttentionCall) -> str | None:
    norms = call.norms
    if not all(_MIN_NORM <= norm <= _MAX_NORM for norm in (norms.query, norms.key, norms.value)):
        return "a row bound is outside 2^-40 to 2^40, where squares would leave float32's range"
    if call.score_bound > _MAX_SCORE_BOUND:
        return f"the score bound {call.score_bound:.3g} is above {_MAX_SCORE_BOUND:g}"
    return None


def _refused_noise(call: AttentionCall) -> str | None:
    if call.noise is not None and call.noise.name == "secure" and call.noise.cipher != "chacha20":
        return f"cipher {call.noise.cipher!r} has no GPU kernel; it needs 'chacha20'"
    return None


def _failed_check(call: AttentionCall, *, needs_grad: bool) -> str | None:
    """Runs the kernels on small problems at their first use on a device, before anything is spent."""
    from dp_flash_attention.attention.kernels.launch import kernel_key
    from dp_flash_attention.attention.kernels.launch_split import default_splits
    from dp_flash_attention.attention.kernels.selfcheck import (
        disagreement,
        gradient_disagreement,
        split_disagreement,
    )
    from dp_flash_attention.noise.kernels.writer import require_agreement

    if call.noise is not None:
        try:
            require_agreement(call.query, kernel_key(call.noise))
        except NoiseUnavailableError as error:
            return str(error)
    device, dtype = str(call.query.device), call.query.dtype
    reason = disagreement(device, dtype)
    if reason is None and default_splits(call) > 1:
        reason = split_disagreement(device, dtype)
    if reason is None and needs_grad:
        reason = gradient_disagreement(device, dtype)
    return reason


def make_backend() -> AttentionBackend:
    """Returns the back end.

    Raises:
        DependencyMissingError: If triton is missing, or its interpreter is on, which is for tests alone.
    """
    require_triton("The back end 'triton'")
    import triton

    if triton.knobs.runtime.interpret:
        raise DependencyMissingError(
            "The back end 'triton' needs Triton's compiler, but TRITON_INTERPRET=1 chose its interpreter. Unset it."
        )
    return TritonBackend()
