"""Exact per-example gradient clipping by book-keeping, for any ``torch.nn.Module``."""

from dp_flash_attention.clipping.accumulator import ClippedGradientAccumulator, MicrobatchNorms
from dp_flash_attention.clipping.independence import check_examples_independent
from dp_flash_attention.clipping.linear_cross_entropy import LinearCrossEntropy

__all__ = [
    "ClippedGradientAccumulator",
    "LinearCrossEntropy",
    "MicrobatchNorms",
    "check_examples_independent",
]
