"""The two built-in transformers: records of fields as tokens, and text.

Both are made of ``nn.Linear``, ``nn.Embedding``, ``nn.LayerNorm`` and
``scaled_dot_product_attention`` alone, so that every parameter has an exact per-example gradient rule.
There is no dropout: it costs accuracy under noise and clipping already regularises.

Shape letters: B records, T tokens, F fields, V vocabulary, D model width, H heads, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int


@dataclass(frozen=True, kw_only=True)
class TabularTransformerConfig:
    """Sizes of a ``TabularTransformer``. All are public.

    Attributes:
        vocab_size: Rows of the one embedding table; id 0 is the CLS token.
        num_fields: F, tokens of a record without CLS.
        num_classes: K.
        d_model: D, a multiple of ``num_heads``.
        num_heads: H.
        num_layers: Blocks; the last one computes the CLS position alone.
        mlp_ratio: Hidden width of the feed-forward layers over D.

    Raises:
        InvalidInputError: If a size is not a positive whole number, or the heads do not divide D.
    """

    vocab_size: int
    num_fields: int
    num_classes: int
    d_model: int
    num_heads: int
    num_layers: int
    mlp_ratio: int = 2

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.num_classes < 2:
            raise InvalidInputError(
                "num_classes", self.num_classes, bound="at least 2", remedy="List every class, both of two."
            )


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """Sizes of a ``TextTransformer``. All are public.

    Attributes:
        vocab_size: V.
        seq_len: Longest sequence in tokens.
        d_model: D, a multiple of ``num_heads``.
        num_heads: H.
        num_layers: Blocks.
        num_classes: K for a classifier; None for a language model.
        tie_head: Whether the language-model head shares the token embedding's weight.
        mlp_ratio: Hidden width of the feed-forward layers over D.

    Raises:
        InvalidInputError: If a size is not a positive whole number, or the heads do not divide D.
    """

    vocab_size: int
    seq_len: int
    d_model: int
    num_heads: int
    num_layers: int
    num_classes: int | None = None
    tie_head: bool = True
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.num_classes is not None and self.num_classes < 2:
            raise InvalidInputError(
                "num_classes",
                self.num_classes,
                bound="at least 2, or None",
                remedy="None is a language model.",
            )


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a GELU feed-forward layer.

    Args:
        d_model: D.
        num_heads: H.
        mlp_ratio: Hidden width over D.
        is_causal: Whether a position sees only itself and earlier ones.
    """

    def __init__(self, *, d_model: int, num_heads: int, mlp_ratio: int, is_causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.attention_norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.attention_out = nn.Linear(d_model, d_model)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp_in = nn.Linear(d_model, mlp_ratio * d_model)
        self.mlp_out = nn.Linear(mlp_ratio * d_model, d_model)

    def forward(self, x_BTD: Tensor, *, num_queries: int | None = None) -> Tensor:
        """Returns the block's output, shape [B, T, D], or of the first ``num_queries`` positions only."""
        q_BHTE, k_BHTE, v_BHTE = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x_BTD)).chunk(3, dim=-1)
        )
        if num_queries is not None:
            q_BHTE = q_BHTE[:, :, :num_queries]
            x_BTD = x_BTD[:, :num_queries]
        mixed_BHTE = scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=self.is_causal)
        x_BTD = x_BTD + self.attention_out(mixed_BHTE.transpose(1, 2).flatten(2))
        out_BTD: Tensor = x_BTD + self.mlp_out(gelu(self.mlp_in(self.mlp_norm(x_BTD))))
        return out_BTD


class TabularTransformer(nn.Module):
    """A transformer over a record's fields, each one token, read out at a CLS token.

    A field arrives as two ids with two weights (a number between two public knots; a category is one id
    with weight 1), so the whole record needs one embedding table. Fields own disjoint ids, which makes
    a position embedding redundant. The last block computes the CLS position alone: no other one is read.

    Args:
        config: Sizes.
        generator: Source of the initial weights; None uses torch's global one. Initial weights are public.
    """

    def __init__(self, config: TabularTransformerConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = _blocks(config, is_causal=False)
        self.final_norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.num_classes)
        _initialise(self, generator, embedding_std=1.0)

    def forward(self, ids: Tensor, mix: Tensor) -> Tensor:
        """Returns the logits of each record.

        Args:
            ids: Token ids, shape [B, F, 2], long.
            mix: Interpolation weights, shape [B, F, 2].

        Returns:
            Logits, shape [B, K].
        """
        # The CLS token, id 0 with weights (1, 0), goes in front.
        vectors_BT2D = self.embedding(pad(ids, (0, 0, 1, 0)))
        mix_BT2 = pad(mix, (0, 0, 1, 0))
        mix_BT2[:, 0, 0] = 1.0
        x_BTD = (vectors_BT2D * mix_BT2.to(vectors_BT2D.dtype).unsqueeze(-1)).sum(dim=2)
        for block in self.blocks[:-1]:
            x_BTD = block(x_BTD)
        cls_B1D = self.blocks[-1](x_BTD, num_queries=1)
        logits: Tensor = self.head(self.final_norm(cls_B1D.squeeze(1)))
        return logits


class TextTransformer(nn.Module):
    """A causal transformer over tokens: a language model, or a classifier of whole texts.

    Sequences are padded on the right; under causal attention a pad is never seen by a real token, so
    the language model needs no mask. The classifier averages the positions that its mask keeps.

    Args:
        config: Sizes.
        generator: Source of the initial weights; None uses torch's global one. Initial weights are public.
    """

    def __init__(self, config: TextTransformerConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.seq_len, config.d_model)
        self.blocks = _blocks(config, is_causal=True)
        self.final_norm = nn.LayerNorm(config.d_model)
        is_language_model = config.num_classes is None
        self.head = nn.Linear(
            config.d_model, config.num_classes or config.vocab_size, bias=not is_language_model
        )
        # A tied table is also the head: rows of norm about 0.02·sqrt(D) keep the first logits small.
        _initialise(self, generator, embedding_std=0.02)
        if is_language_model and config.tie_head:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns the logits.

        Args:
            input_ids: Token ids, shape [B, T], long, T ≤ ``seq_len``.
            attention_mask: 1 for tokens and 0 for pads, shape [B, T]; only the classifier reads it,
                None counts every position.

        Returns:
            Shape [B, T, V] for a language model, [B, K] for a classifier.

        Raises:
            InvalidInputError: If the sequence is longer than ``seq_len``.
        """
        batch_size, length = input_ids.shape
        if length > self.config.seq_len:
            raise InvalidInputError(
                "sequence length",
                length,
                bound=f"at most seq_len = {self.config.seq_len}",
                remedy="Truncate the text or configure a longer seq_len.",
            )
        # Repeated over the batch, so that each record owns its rows of the position table's gradient.
        positions_BT = torch.arange(length, device=input_ids.device).repeat(batch_size, 1)
        x_BTD = self.embedding(input_ids) + self.positions(positions_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.final_norm(x_BTD)
        if self.config.num_classes is not None:
            x_BTD = _masked_mean(x_BTD, attention_mask)
        logits: Tensor = self.head(x_BTD)
        return logits


def _masked_mean(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Averages each record over its own kept positions, shape [B, D]."""
    if mask_BT is None:
        return x_BTD.mean(dim=1)
    weights_BT1 = mask_BT.to(x_BTD.dtype).unsqueeze(-1)
    return (x_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1).clamp(min=1.0)


def _blocks(config: TabularTransformerConfig | TextTransformerConfig, *, is_causal: bool) -> nn.ModuleList:
    return nn.ModuleList(
        Block(
            d_model=config.d_model,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            is_causal=is_causal,
        )
        for _ in range(config.num_layers)
    )


def _initialise(
    model: TabularTransformer | TextTransformer, generator: torch.Generator | None, *, embedding_std: float
) -> None:
    """Draws the initial weights. They depend on no data, so they are public.

    Layers that write into the residual stream shrink with depth (Radford et al. 2019, section 2.3). The
    head of a classifier starts at zero: the first steps then fit it alone, instead of spending the budget
    on undoing a random one.
    """
    residual_scale = (2 * model.config.num_layers) ** -0.5
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, embedding_std, generator=generator)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith(("attention_out", "mlp_out")):
                    std *= residual_scale
                elif name == "head" and model.config.num_classes is not None:
                    std = 0.0
                module.weight.normal_(0.0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


def _check_sizes(config: TabularTransformerConfig | TextTransformerConfig) -> None:
    for name in ("vocab_size", "d_model", "num_heads", "num_layers", "mlp_ratio"):
        positive_int(name, getattr(config, name), remedy="Give a positive whole number.")
    if config.d_model % config.num_heads:
        raise InvalidInputError(
            "d_model",
            config.d_model,
            bound=f"a multiple of num_heads = {config.num_heads}",
            remedy="Change one.",
        )
