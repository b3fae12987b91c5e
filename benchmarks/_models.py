"""The models of the step benchmarks, from sizes alone: nothing is downloaded, weights are random.

GPT is the package's own ``TextTransformer``. The Llama-style block is plain torch here: RMSNorm, rotary positions,
grouped-query attention, SwiGLU, no biases. A slice is one such block on random hidden states, for widths whose whole
model would not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from dp_flash_attention.training.losses import language_model_loss
from dp_flash_attention.training.models import TextTransformer, TextTransformerConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model and batch.

    Attributes:
        vocab_size: V; 0 for a slice.
        seq_len: T.
        d_model: D.
        num_heads: Query heads.
        num_layers: Blocks.
        batch_size: B.
        family: Which of the three models.
        num_kv_heads: Key/value heads of a Llama block.
        hidden: Width of a Llama block's feed-forward layer.
        name: What it is called in a table.
    """

    vocab_size: int
    seq_len: int
    d_model: int
    num_heads: int
    num_layers: int
    batch_size: int
    family: Literal["gpt", "llama", "slice"] = "gpt"
    num_kv_heads: int = 0
    hidden: int = 0
    name: str = ""


class LlamaBlock(nn.Module):
    """Attention with rotary positions and fewer key/value heads, then a gated feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, self.num_heads, self.num_kv_heads = shape.d_model, shape.num_heads, shape.num_kv_heads
        width = d // shape.num_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, width * shape.num_kv_heads, bias=False)
        self.v = nn.Linear(d, width * shape.num_kv_heads, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.gate, self.up = (nn.Linear(d, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, d, bias=False)
        angles = torch.outer(torch.arange(shape.seq_len), 10_000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns the block's output, shape [B, T, D]."""
        normed = self.attention_norm(x_BTD)
        q, k, v = (
            layer(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer, heads in (
                (self.q, self.num_heads),
                (self.k, self.num_kv_heads),
                (self.v, self.num_kv_heads),
            )
        )
        repeats = self.num_heads // self.num_kv_heads
        k, v = (t.repeat_interleave(repeats, dim=1) for t in (self._rotated(k), v))
        mixed = scaled_dot_product_attention(self._rotated(q), k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(x_BTD)
        return x_BTD + self.down(silu(self.gate(normed)) * self.up(normed))

    def _rotated(self, x_BHTE: Tensor) -> Tensor:
        first, second = x_BHTE.chunk(2, dim=-1)
        cosines, sines = self.cosines.to(x_BHTE.dtype), self.sines.to(x_BHTE.dtype)
        return torch.cat([first * cosines - second * sines, first * sines + second * cosines], -1)


class Llama(nn.Module):
    """A language model of such blocks, its head untied."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        self.blocks = nn.ModuleList(LlamaBlock(shape) for _ in range(shape.num_layers))
        self.final_norm = nn.RMSNorm(shape.d_model)
        self.head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns logits, shape [B, T, V]."""
        x_BTD = self.embedding(ids)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.final_norm(x_BTD))


class Slice(nn.Module):
    """A few blocks on hidden states."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(LlamaBlock(shape) for _ in range(shape.num_layers)))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns hidden states, shape [B, T, D]."""
        return self.blocks(x_BTD)


def build_model(shape: Shape, *, tied: bool, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Returns the model and its one batch: token ids, or hidden states of a slice."""
    torch.manual_seed(0)
    if shape.family == "gpt":
        config = TextTransformerConfig(
            vocab_size=shape.vocab_size,
            seq_len=shape.seq_len,
            d_model=shape.d_model,
            num_heads=shape.num_heads,
            num_layers=shape.num_layers,
            tie_head=tied,
        )
        model: nn.Module = TextTransformer(config)
    else:
        model = Llama(shape) if shape.family == "llama" else Slice(shape)
    if shape.family == "slice":
        data = torch.randn(shape.batch_size, shape.seq_len, shape.d_model)
    else:
        data = torch.randint(0, shape.vocab_size, (shape.batch_size, shape.seq_len))
    return model.to(device), data.to(device)


def losses_of(out: Tensor, data: Tensor) -> Tensor:
    """Returns one loss for each example: next-token cross entropy, or a slice's mean square."""
    return (
        language_model_loss(out, data) if not data.is_floating_point() else out.float().square().mean((1, 2))
    )


def _gpt2(name: str, d_model: int, num_heads: int, num_layers: int, seq_len: int, tokens: int) -> Shape:
    return Shape(
        vocab_size=50257,
        seq_len=seq_len,
        d_model=d_model,
        num_heads=num_heads,
        num_layers=num_layers,
        batch_size=max(1, tokens // seq_len),
        name=name,
    )


def shape_of(name: str, seq_len: int) -> Shape:
    """Returns a named model at a length, with as many examples as fit beside its states into 80 GB.

    Raises:
        KeyError: If there is no model of that name.
    """
    llama = {"num_heads": 32, "num_kv_heads": 8, "d_model": 2048, "hidden": 8192}
    slice_ = {"num_heads": 32, "num_kv_heads": 8, "d_model": 4096, "hidden": 14336}
    small = {"num_heads": 4, "num_kv_heads": 2, "d_model": 16, "hidden": 40}
    shapes = {
        # Tokens of a microbatch: activations, and logits in float32 three times, of 16 k tokens are 35 GB at V = 50 k.
        "gpt2-small": lambda: _gpt2("gpt2-small", 768, 12, 12, seq_len, 16_384),
        "gpt2-medium": lambda: _gpt2("gpt2-medium", 1024, 16, 24, seq_len, 8_192),
        "gpt2-large": lambda: _gpt2("gpt2-large", 1280, 20, 36, seq_len, 8_192),
        "llama-1b": lambda: Shape(
            vocab_size=128_256,
            seq_len=seq_len,
            num_layers=16,
            batch_size=max(1, 4_096 // seq_len),
            family="llama",
            name="llama-1b",
            **llama,
        ),
        "slice-4096": lambda: Shape(
            vocab_size=0,
            seq_len=seq_len,
            num_layers=1,
            batch_size=max(1, 16_384 // seq_len),
            family="slice",
            name="slice-4096",
            **slice_,
        ),
        "tiny": lambda: Shape(
            vocab_size=64, seq_len=seq_len, d_model=16, num_heads=2, num_layers=2, batch_size=2, name="tiny"
        ),
        "tiny-llama": lambda: Shape(
            vocab_size=64,
            seq_len=seq_len,
            num_layers=1,
            batch_size=2,
            family="llama",
            name="tiny-llama",
            **small,
        ),
        "tiny-slice": lambda: Shape(
            vocab_size=0,
            seq_len=seq_len,
            num_layers=1,
            batch_size=2,
            family="slice",
            name="tiny-slice",
            **small,
        ),
    }
    return shapes[name]()
