"""The closed formulas against the allocator's own count, to a tenth, at shapes where each of their terms is the peak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dp_flash_attention.clipping import ClippedGradientAccumulator, LinearCrossEntropy
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training.live_memory import peak_live_bytes
from dp_flash_attention.training.losses import language_model_loss, language_model_loss_from_hidden
from dp_flash_attention.training.memory_model import StepMemory
from dp_flash_attention.training.models import TextTransformer, TextTransformerConfig

TOLERANCE = 0.10
# What the profiler's own start allocates, and vectors of B numbers, are not in the formulas.
SMALL = 2**14


def memory(*sizes: int, **changes: Any) -> StepMemory:
    vocab_size, num_tokens, d_model, num_layers, batch_size = sizes
    config = TextTransformerConfig(
        vocab_size=vocab_size,
        seq_len=num_tokens,
        d_model=d_model,
        num_heads=2,
        num_layers=num_layers,
        tie_head=False,
    )
    return StepMemory(config=config, batch_size=batch_size, num_tokens=num_tokens, **changes)


def measured(step: StepMemory, strategy: str) -> int:
    """Peak of one step; the first one is not counted, it makes what is made once."""
    model = TextTransformer(step.config)
    ids = torch.randint(0, step.config.vocab_size, (step.batch_size, step.num_tokens))
    head = model.head
    if step.fused_head:
        model.head = LinearCrossEntropy.sharing(head, scratch_bytes=step.head_scratch_bytes)

    def losses() -> torch.Tensor:
        if not step.fused_head:
            return language_model_loss(model(ids), ids)
        fused, model.head = model.head, torch.nn.Identity()
        try:
            hidden = model(ids)
        finally:
            model.head = fused
        return language_model_loss_from_hidden(hidden, fused, ids)

    if strategy == "non_private":

        def run() -> None:
            model.zero_grad(set_to_none=True)
            losses().sum().backward()

        clear = model.zero_grad
    else:
        accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0, strategy=strategy)  # type: ignore[arg-type]
        clear = accumulator.reset

        def run() -> None:
            accumulator.reset()
            accumulator.add(losses, batch_size=step.batch_size)

    run()
    clear()
    return peak_live_bytes(run, device=torch.device("cpu"))


SHAPES = [
    (64, 64, 64, 6, 4),  # activations
    (2048, 64, 64, 2, 4),  # logits
    (64, 256, 64, 4, 4),  # gradients of examples are the smaller records
    (64, 32, 128, 4, 8),  # inputs and output gradients are
    (512, 8, 128, 3, 2),  # gradients of the parameters
]


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("strategy", ["non_private", "bookkeeping", "two_pass"])
def test_the_formula_is_what_the_allocator_counts(sizes: tuple[int, ...], strategy: Any) -> None:
    step = memory(*sizes)
    assert step.peak_bytes(strategy) == pytest.approx(measured(step, strategy), rel=TOLERANCE, abs=SMALL)


def test_a_fused_head_holds_a_piece_of_the_logits() -> None:
    step = memory(4096, 64, 64, 2, 4, fused_head=True, head_scratch_bytes=2**19)
    got = measured(step, "bookkeeping")
    assert step.peak_bytes("bookkeeping") == pytest.approx(got, rel=TOLERANCE, abs=SMALL)
    # The formula of the plain head would be far off, so the agreement says something.
    assert replace(step, fused_head=False).peak_bytes("bookkeeping") > 2 * got


def test_parameters_are_counted() -> None:
    for tied in (False, True):
        config = replace(memory(50, 7, 8, 2, 1).config, tie_head=tied)
        expected = sum(p.numel() for p in TextTransformer(config).parameters())
        assert StepMemory(config=config, batch_size=1, num_tokens=7).num_parameters == expected


def test_beyond_the_non_private_step_memory_grows_with_the_batch_and_not_with_the_length_squared() -> None:
    extra = []
    for num_tokens in (512, 2048, 8192, 16384):
        step = memory(4096, num_tokens, 256, 4, 1)
        extra.append(step.peak_bytes("bookkeeping") - step.peak_bytes("non_private"))
    assert max(extra) <= 2**20 < memory(4096, 512, 256, 4, 1).peak_bytes("non_private") // 10


def test_what_has_no_formula_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="strategy"):
        memory(64, 8, 8, 1, 1).peak_bytes("one_example")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="num_classes"):
        StepMemory(config=replace(memory(64, 8, 8, 1, 1).config, num_classes=2), batch_size=1, num_tokens=8)
