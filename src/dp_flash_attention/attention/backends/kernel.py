"""What a flash kernel offers, and how its output becomes that of a call: chunks, hidden rows, null rows.

A kernel that returns the log-sum-exp of its scores can be merged exactly. With L = e^{lse} the denominator, two runs
over different rows give ``o = (L₁·o₁ + L₂·o₂)/(L₁ + L₂)``, and m null rows, whose scores and values are 0, give
``o = o₁·L₁/(L₁ + m)``: no row is copied. The backward pass of a flash kernel recomputes weights as e^{s − lse}; given the
merged lse and output it returns the exact gradient of the merged result, chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dp_flash_attention.attention.interface import PASS_ROWS, AttentionCall

Load = Callable[[int, int], tuple[Tensor, Tensor]]
"""Keys [B, G, rows, D] and values [B, G, rows, E] of a pass, from its first row and the one after its last."""


class FlashKernel(Protocol):
    """One attention kernel. Shapes as in ``interface``; rows are already clipped."""

    @property
    def name(self) -> str:
        """What a caller asks for it by."""

    @property
    def devices(self) -> frozenset[str]:
        """Types of devices that it runs on."""

    @property
    def equal_widths(self) -> bool:
        """Whether it needs E = D."""

    def check_installed(self) -> None:
        """Raises ``DependencyMissingError`` if what it needs is not installed."""

    def refusal(self, call: AttentionCall, *, needs_grad: bool) -> str | None:
        """Returns why it cannot run the call, or None."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the output [B, H, Q, E] and the log-sum-exp [B, H, Q] of the scores.

        Args:
            q: [B, H, Q, D], Q >= 1.
            k: [B, G, K, D], K >= 1.
            v: [B, G, K, E].
            scale: Factor of the scores.
            causal: Query t sees rows 0 … t.
            bias: [B, 1, 1, K] in q's dtype, 0 or -infinity, added to the scores; or None. What is returned
                for a query that sees no row is not used.
        """

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of q, k and v for weights e^{s − lse} and the output ``out``."""


def attend(kernel: FlashKernel, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns the exact output of clipped rows, [B, H, Q, E], differentiable with respect to q, k and v."""
    width = v.shape[-1]
    if kernel.equal_widths:
        q, k, v = _of_equal_width(q, k, v)
    out = cast(Tensor, _Attend.apply(q, k, v, _settings(kernel, call)))  # type: ignore[no-untyped-call]
    return out[..., :width] if out.shape[-1] != width else out


def attend_by_pass(kernel: FlashKernel, call: AttentionCall, q: Tensor, load: Load) -> Tensor:
    """Returns what ``attend`` does, without gradients, of keys and values that are read and clipped pass by pass.

    Args:
        kernel: The kernel.
        call: What ``q`` belongs to; its keys and values are not read.
        q: Clipped queries.
        load: Returns the clipped keys and values of rows start to stop, which are used before it is asked again.
    """
    width = call.value.shape[-1]

    def loaded(start: int, stop: int) -> tuple[Tensor, Tensor]:
        k, v = load(start, stop)
        return _of_equal_width(q, k, v)[1:] if kernel.equal_widths else (k, v)

    queries = q
    if kernel.equal_widths and width > q.shape[-1]:
        queries = torch.nn.functional.pad(q, (0, width - q.shape[-1]))
    widest = max(width, q.shape[-1]) if kernel.equal_widths else width
    out, _ = _merged_passes(queries, loaded, call.key.shape[2], widest, _settings(kernel, call))
    return out[..., :width] if widest != width else out


def _settings(kernel: FlashKernel, call: AttentionCall) -> tuple[Any, ...]:
    return (kernel, call.scale, call.causal, call.hidden, call.null_rows)


def _of_equal_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds zeros to what is narrower: they change neither scores nor the values in front of them."""
    if q.shape[-1] == v.shape[-1]:
        return q, k, v
    widest = max(q.shape[-1], v.shape[-1])
    padded = [torch.nn.functional.pad(rows, (0, widest - rows.shape[-1])) for rows in (q, k, v)]
    return padded[0], padded[1], padded[2]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: tuple[Any, ...]) -> Tensor:
        def load(start: int, stop: int) -> tuple[Tensor, Tensor]:
            return k[:, :, start:stop], v[:, :, start:stop]

        out, total = _merged_passes(q, load, k.shape[2], v.shape[-1], settings)
        if any(ctx.needs_input_grad[:3]):
            lse = total.log().to(torch.promote_types(q.dtype, torch.float32))
            ctx.save_for_backward(q, k, v, out.to(q.dtype), lse)
            ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        kernel, scale, causal, hidden, _ = ctx.settings
        # A query that saw nothing has no weights: e^{s − ∞} = 0.
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        grad_q = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for start, stop in _chunks(k.shape[2], causal):
            bias, _ = _hiding(hidden, start, stop, q, causal)
            part_q, grad_k[:, :, start:stop], grad_v[:, :, start:stop] = kernel.backward(
                grad.to(q.dtype).contiguous(),
                q,
                k[:, :, start:stop],
                v[:, :, start:stop],
                out,
                lse,
                scale=scale,
                causal=causal,
                bias=bias,
            )
            grad_q += part_q
        return grad_q.to(q.dtype), grad_k, grad_v, None


def _chunks(num_rows: int, causal: bool) -> list[tuple[int, int]]:
    # Chunks of a causal call would each need their own diagonal; its rows are bounded by its queries anyway.
    size = max(1, num_rows) if causal else PASS_ROWS
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _hiding(
    hidden: Tensor | None, start: int, stop: int, q: Tensor, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the bias [B, 1, 1, rows] of a chunk, and which queries see none of it, [B, 1, Q or 1]."""
    if hidden is None:
        return None, None
    part = hidden[:, start:stop]
    bias = torch.zeros(part.shape, dtype=q.dtype, device=q.device).masked_fill_(part, -math.inf)
    if causal:
        # Whether any of the rows 0 … t is seen; queries beyond the last row see all of them.
        seen = torch.cummax((~part).to(torch.int8), dim=1).values.bool()
        last = torch.arange(q.shape[2], device=q.device).clamp_max(part.shape[1] - 1)
        blind = ~seen[:, None, last]
    else:
        blind = part.all(dim=1)[:, None, None]
    return bias[:, None, None], blind


def _merged_passes(
    q: Tensor, load: Load, num_rows: int, width: int, settings: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Returns the output of all passes and null rows together, and its sum of e^score in float64."""
    kernel, scale, causal, hidden, null_rows = settings
    out: Tensor | None = None
    # Sums of e^score: within [e^-40, e^40] times the number of rows (MAX_SCORE_BOUND), so float64 needs no running maximum.
    total: Tensor | None = None
    for start, stop in _chunks(num_rows, causal):
        bias, blind = _hiding(hidden, start, stop, q, causal)
        k, v = load(start, stop)
        part, part_lse = kernel.forward(q, k, v, scale=scale, causal=causal, bias=bias)
        # Shares of passes and null rows are quotients of sums: float32 would cost them digits.
        mass = part_lse.to(torch.float64).exp_()
        if blind is not None and bool(blind.any()):
            # What a kernel answers for a query that sees nothing is undefined, and 0 times NaN would stay.
            mass.masked_fill_(blind, 0.0)
            part = part.masked_fill(blind.unsqueeze(-1), 0.0)
        if out is None or total is None:
            out, total = part, mass
        else:
            total = total.add_(mass)
            out = _towards(out, part, _share(mass, total, out))
        del part, part_lse, mass  # or the next pass would run beside this one's output
    if out is None or total is None:
        out = q.new_zeros((*q.shape[:3], width))
        total = torch.zeros(q.shape[:3], dtype=torch.float64, device=q.device)
    elif null_rows > 0.0:
        working = torch.promote_types(out.dtype, torch.float32)
        mass, total = total, total + null_rows
        out = out.to(working).mul_(_share(mass, total, out))
    return out, total


def _towards(out: Tensor, part: Tensor, share: Tensor) -> Tensor:
    """Returns ``out + share·(part − out)``, in place where ``out`` is in the working dtype already."""
    return out.to(share.dtype).lerp_(part.to(share.dtype), share)


def _share(mass: Tensor, total: Tensor, out: Tensor) -> Tensor:
    """Returns mass / total, [B, H, Q, 1] in the working dtype; 0 where both are 0."""
    working = torch.promote_types(out.dtype, torch.float32)
    return (mass / total.clamp_min(1e-300)).to(working).unsqueeze(-1)
