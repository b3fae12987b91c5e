"""Makes a back end of a kernel that knows nothing of privacy: clip, attend, add noise."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from dp_flash_attention.attention.backends.kernel import FlashKernel, attend
from dp_flash_attention.attention.backends.selfcheck import disagreement
from dp_flash_attention.attention.interface import AttentionCall, Rounding
from dp_flash_attention.attention.noising import add_noise
from dp_flash_attention.attention.rows import clip_rows


class PlainBackend:
    """A back end over any ``FlashKernel``.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: FlashKernel) -> None:
        self._kernel = kernel

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self._kernel.name

    @property
    def roundings(self) -> Collection[Rounding]:
        """The model of every flash kernel."""
        return (Rounding.RUNNING_MAX,)

    def refusal(self, call: AttentionCall, *, needs_grad: bool) -> str | None:
        """Returns the kernel's reason, or by how much it misses the reference, or None."""
        reason = self._kernel.refusal(call, needs_grad=needs_grad)
        if reason is not None:
            return reason
        return disagreement(
            self._kernel,  # type: ignore[arg-type]  # kernels are hashed by identity
            str(call.query.device),
            call.query.dtype,
            grouped=call.query.shape[1] != call.key.shape[1],
            causal=call.causal,
            hides=call.hidden is not None,
        )

    def release(self, call: AttentionCall) -> Tensor:
        """Returns the noisy output; without noise where the call has none (tests and benchmarks)."""
        norms = call.norms
        exact = attend(
            self._kernel,
            call,
            clip_rows(call.query, norms.query),
            clip_rows(call.key, norms.key),
            clip_rows(call.value, norms.value),
        )
        if call.stddev is None or call.noise is None:
            return exact.to(call.out_dtype)
        return add_noise(exact, call.stddev, call.noise, call.out_dtype)
