"""Exact per-example gradient clipping by book-keeping, for any ``torch.nn.Module``."""

from dp_flash_attention.clipping.accumulator import ClippedGradientAccumulator, MicrobatchNorms
from dp_flash_attention.clipping.independence import check_examples_independent

__all__ = ["ClippedGradientAccumulator", "MicrobatchNorms", "check_examples_independent"]
