"""What a back end of DP attention receives, and what it must return.

Shapes: B batch entries, H query heads, G key/value heads (H a multiple of G), Q queries, K key/value rows,
D width of queries and keys, E width of values. Query head h reads key/value head ``h // (H // G)``, as
``torch.nn.functional.scaled_dot_product_attention(enable_gqa=True)`` does.

One call computes, for every batch entry b, query head h and query t, in this order:

    x̄ = x · min(1, R/‖x‖)                    every row of query, key and value, R its ``RowNorms`` entry
    s_i = scale · ⟨q̄_t, k̄_i⟩                 over the rows i that t sees: not hidden, and i <= t if causal
    o = Σ_i e^{s_i} v̄_i / (m + Σ_i e^{s_i})   m = null_rows; o = 0 where t sees no row
    y = o + stddev[b, h, t] · z               z: float32 normals of ``noise``; o and y in float32
    output = y rounded to out_dtype            rounding after the noise is post-processing

and with noise ``"exact"``, on the row's grid γ = stddev[b, h, t] / k with k = ``noise.steps``, in float64:

    y = γ · (round(o/γ) + x)                  x: whole numbers of ``noise``
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

import torch
from torch import Tensor

from dp_flash_attention.noise import NoiseKey, NormalGenerator

AttentionNoise = Literal["secure", "fast", "exact"]
"""``secure`` and ``fast`` are float32 normals; ``exact`` is whole numbers on a public grid."""

Cipher = Literal["aes-256-ctr", "chacha20"]

PASS_ROWS = 1024
"""Key/value rows that a call without causal mask may add up in one pass. Longer contexts are summed pass by pass and the
passes merged, so that float32 sums round as Theorem 5 of docs/attention.md charges for; a back end that
cannot do so refuses calls with more rows. Causal calls are one pass of any length, and charged for it."""


class Rounding(StrEnum):
    """How a back end's arithmetic may depend on the data. It decides which slack the sensitivity is charged.

    Attributes:
        RUNNING_MAX: What every flash kernel does. A weight is e^{s_i − running maximum}, rounded to the compute
            dtype, so one changed row may re-round the weights of all; the denominator sums unrounded weights;
            the output may be rounded to the compute dtype *before* the noise.
        FIXED_SHIFT: A weight is e^{s_i − S} with the public bound S = ``AttentionCall.score_bound`` in place of a
            running maximum, rounded to the compute dtype, and the denominator sums the weights *as rounded*.
            So a row's weight is a function of its query and that row alone, and only float32 sums round
            differently between neighbours. The output stays float32 until the noise is in.
    """

    RUNNING_MAX = "running_max"
    FIXED_SHIFT = "fixed_shift"


@dataclass(frozen=True, kw_only=True)
class RowNorms:
    """L2 norms that rows are clipped to, one head's row at a time.

    They are already smaller than the public bounds, by what the rounding of norm, factor and product can
    add in the inputs' dtype (``sensitivity.clip_threshold``), so that the row *as the kernel reads it* obeys the
    public bound. Norms and factors are computed in float32; the product is rounded to the inputs' dtype.
    """

    query: float
    key: float
    value: float


@dataclass(frozen=True, kw_only=True)
class NoiseStream:
    """Where the normals of one call come from.

    Element (b, h, t, e) gets float32 number ``t·E + e`` of position (key, step = ``call_id``, stream = ``b·H + h``), in
    the layout of ``noise.keystream`` (tiles of 2,048 numbers): what ``NormalGenerator.fill_normal_`` writes into
    a contiguous float32 [Q, E] with ``stddev=1``, step and stream as said. Multiples of 2,048 / E rows are
    whole tiles.

    With ``"exact"``, element (b, h, t, e) gets whole number ``((b·H + h)·Q + t)·E + e`` of position (key, step =
    ``call_id``, stream = 0) of ``noise.rounded_gaussian.RoundedGaussian`` with standard
    deviation ``steps``.

    Attributes:
        key: Secret of the caller; a generator derives its own subkey from it (``noise.secure``, ``noise.fast``).
        name: ``"secure"``, ``"fast"`` or ``"exact"``.
        cipher: Cipher of ``"secure"`` and ``"exact"``.
        call_id: Number of the call under this key. It was claimed for this call, and is never used again.
        generator: The generator of ``name`` and ``cipher`` on ``key``, which writes to the CPU, for back ends that have
            none of their own. None with ``"exact"``.
        steps: k of the call's plan, steps of a row's grid in its σ; None unless ``name`` is ``"exact"``.
    """

    key: NoiseKey = field(repr=False)
    name: AttentionNoise
    cipher: Cipher
    call_id: int
    generator: NormalGenerator | None = field(repr=False)
    steps: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """One call, checked: everything a back end needs and nothing about ε.

    Attributes:
        query: [B, H, Q, D], not clipped; float32, bfloat16, float16 or float64. Any strides.
        key: [B, G, K, D], same dtype and device. K may be 0 if ``null_rows`` is above 0.
        value: [B, G, K, E], same dtype and device.
        norms: What rows are clipped to.
        scale: Factor of every score.
        score_bound: S: |s_i| <= S for every clipped pair.
        causal: Query t sees rows 0 … t (aligned at the top left, as torch's ``is_causal``).
        hidden: bool [B, K], true where a row is not seen by any query; None hides nothing.
        null_rows: m >= 0: so many public rows of score 0 and value 0, not necessarily a whole number.
        stddev: float32 [B, H, Q], possibly expanded (stride 0); None for the exact part alone (tests, reference).
        noise: None exactly where ``stddev`` is.
        out_dtype: Dtype of the output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    norms: RowNorms
    scale: float
    score_bound: float
    causal: bool
    hidden: Tensor | None
    null_rows: float
    stddev: Tensor | None
    noise: NoiseStream | None
    out_dtype: torch.dtype


class AttentionBackend(Protocol):
    """Something that runs a call. Stateless: one object serves every thread and device.

    A back end that lives in ``attention.kernels`` is made by ``attention.kernels.backend.make_backend()``, which raises
    ``DependencyMissingError`` where its compiler is not installed.

    The privacy of a call rests on three promises that the contract suite tests: rows are clipped as
    ``RowNorms`` says, before anything else reads them; noise is that of ``NoiseStream``, scaled in float32 or better
    and added before the output is rounded to ``out_dtype``; nothing of the exact output is returned.
    """

    @property
    def name(self) -> str:
        """What the caller asks for it by."""

    @property
    def roundings(self) -> Collection[Rounding]:
        """The models that its arithmetic obeys. ``FIXED_SHIFT`` implies ``RUNNING_MAX``; list both then."""

    @property
    def noises(self) -> Collection[AttentionNoise]:
        """The kinds of noise that it makes; calls with others are not given to it."""

    def refusal(self, call: AttentionCall, *, needs_grad: bool) -> str | None:
        """Returns why it cannot run this call (one clause with the reason), or None if it can."""

    def release(self, call: AttentionCall) -> Tensor:
        """Returns the noisy output, [B, H, Q, E] in ``out_dtype``, contiguous, differentiable if inputs need it."""
