"""Makes a back end of a kernel that knows nothing of privacy: clip, attend, add noise."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from dp_flash_attention.attention.backends.kernel import FlashKernel, attend, attend_by_pass
from dp_flash_attention.attention.backends.selfcheck import disagreement
from dp_flash_attention.attention.interface import AttentionCall, AttentionNoise, Rounding
from dp_flash_attention.attention.noising import add_noise, add_noise_into
from dp_flash_attention.attention.rows import clip_rows, clip_rows_into

SLICE_NUMBERS: Final = 1 << 19
"""Numbers of the queries (or keys) of one slice: 2 MiB in float32, so that clipped rows take at most that three times (or
one head's for each thread, if that is more). Slices of 2^18 numbers, which would fit the second-level cache, were 2 % slower at 4
heads of 2,048 × 64."""

Slice = tuple[slice, slice]
Scratch = dict[str, Tensor]


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

    @property
    def noises(self) -> Collection[AttentionNoise]:
        """All: noise meets the output in ``noising``, which knows them."""
        return ("secure", "fast", "exact")

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
        rows = (call.query, call.key, call.value)
        if torch.is_grad_enabled() and any(each.requires_grad for each in rows):
            exact = attend(self._kernel, call, *_clipped(call))
            if call.stddev is None or call.noise is None:
                return exact.to(call.out_dtype)
            return add_noise(exact, call.stddev, call.noise, call.out_dtype)
        with torch.no_grad():
            return self._release_in_slices(call)

    def _exact(self, call: AttentionCall, scratch: Scratch) -> Tensor:
        """Returns the exact output, of rows that are clipped just before the kernel reads them, in its cache."""
        norms = call.norms
        query = _clipped_into(call.query, norms.query, "query", scratch)

        def load(start: int, stop: int) -> tuple[Tensor, Tensor]:
            key, value = call.key[:, :, start:stop], call.value[:, :, start:stop]
            return (
                _clipped_into(key, norms.key, "key", scratch),
                _clipped_into(value, norms.value, "value", scratch),
            )

        return attend_by_pass(self._kernel, call, query, load)

    def _release_in_slices(self, call: AttentionCall) -> Tensor:
        """Runs some heads at a time, so that clipped rows take little memory whatever the call's size."""
        shape = (*call.query.shape[:3], call.value.shape[3])
        slices = list(_slices(call))
        if len(slices) == 1:
            exact = self._exact(call, {})
            fits = exact.dtype is call.out_dtype and exact.is_contiguous()
            out = exact if fits else torch.empty(shape, dtype=call.out_dtype, device=exact.device)
            _finish(out, exact, call, entry=0, head=0)
            return out
        out = torch.empty(shape, dtype=call.out_dtype, device=call.query.device)
        scratch: Scratch = {}
        for each in slices:
            self._run_slice(call, out, each, scratch)
        return out

    def _run_slice(self, call: AttentionCall, out: Tensor, where: Slice, scratch: Scratch) -> None:
        """Clips, attends and adds noise for one slice of a call."""
        entries, groups = where
        group = call.query.shape[1] // call.key.shape[1]
        heads = slice(groups.start * group, groups.stop * group)
        part = replace(
            call,
            query=call.query[entries, heads],
            key=call.key[entries, groups],
            value=call.value[entries, groups],
            hidden=None if call.hidden is None else call.hidden[entries],
        )
        exact = self._exact(part, scratch)
        _finish(out, exact, call, entry=entries.start, head=heads.start)


def _finish(out: Tensor, exact: Tensor, call: AttentionCall, *, entry: int, head: int) -> None:
    """Writes a slice's output to its place, with the call's noise if there is any."""
    if call.stddev is not None and call.noise is not None:
        add_noise_into(out, exact, call.stddev, call.noise, entry=entry, head=head)
    elif out is not exact:
        out[entry : entry + len(exact), head : head + exact.shape[1]] = exact


def _slices(call: AttentionCall) -> Iterator[Slice]:
    """Yields ranges of batch entries and of key/value heads that together are the call."""
    batch, groups = call.key.shape[:2]
    one = max(each[:1, :1].numel() for each in (call.key, call.value))
    one = max(one, call.query[:1, :1].numel() * (call.query.shape[1] // groups))
    # Kernels give each thread an equal run of query blocks. Of one causal head the later blocks are several times the work
    # of the earlier ones, so threads take whole heads: 1.67 times torch's own call became 1.17 (4,096 x 128, 2 heads, 2 threads).
    # Threads of our own, a head each from the clip to the noise, took 1.45 for 1.24 at 2,048 rows: those of torch spin beside.
    threads = torch.get_num_threads() if call.query.device.type == "cpu" else 1
    per_slice = max(1, SLICE_NUMBERS // max(1, one) // threads) * threads
    heads = min(groups, per_slice)
    entries = max(1, per_slice // groups) if heads == groups else 1
    for entry in range(0, batch, entries):
        for head in range(0, groups, heads):
            yield slice(entry, min(entry + entries, batch)), slice(head, min(head + heads, groups))


def _clipped(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    norms = call.norms
    return (
        clip_rows(call.query, norms.query),
        clip_rows(call.key, norms.key),
        clip_rows(call.value, norms.value),
    )


def _clipped_into(rows: Tensor, norm: float, name: str, scratch: Scratch) -> Tensor:
    """Clips into memory that passes and slices share: fresh memory costs more than the arithmetic."""
    if name not in scratch or len(scratch[name]) < rows.numel():
        scratch[name] = torch.empty(rows.numel(), dtype=rows.dtype, device=rows.device)
    return clip_rows_into(rows, norm, scratch[name][: rows.numel()].view(rows.shape))
