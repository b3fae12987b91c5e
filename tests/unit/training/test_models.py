"""The built-in transformers: shapes, independence of records, sharing and initial values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dp_flash_attention.clipping.accumulator import ClippedGradientAccumulator
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training.losses import classification_loss, language_model_loss
from dp_flash_attention.training.models import (
    TabularTransformer,
    TabularTransformerConfig,
    TextTransformer,
    TextTransformerConfig,
)

_ALLOWED = (nn.Linear, nn.Embedding, nn.LayerNorm)


def _tabular(seed: int = 0) -> TabularTransformer:
    config = TabularTransformerConfig(
        vocab_size=20, num_fields=3, num_classes=2, d_model=8, num_heads=2, num_layers=2
    )
    model = TabularTransformer(config, generator=torch.Generator().manual_seed(seed))
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    return model


def _records(num: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 20, (num, 3, 2), generator=generator)
    upper = torch.rand(num, 3, 1, generator=generator)
    return ids, torch.cat([1 - upper, upper], dim=-1)


def _text(**changes: object) -> TextTransformer:
    sizes: dict[str, object] = {"vocab_size": 11, "seq_len": 9, "d_model": 8, "num_heads": 2, "num_layers": 2}
    config = TextTransformerConfig(**(sizes | changes))  # type: ignore[arg-type]  # a test's free mix of sizes
    return TextTransformer(config, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "model", [_tabular(), _text(), _text(num_classes=3)], ids=["tabular", "lm", "classifier"]
)
def test_every_parameter_belongs_to_a_module_with_a_rule(model: nn.Module) -> None:
    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    assert owners
    assert all(type(owner) in _ALLOWED for owner in owners)


def test_tabular_record_does_not_depend_on_its_batch() -> None:
    model = _tabular().eval()
    ids, mix = _records()
    together = model(ids, mix)
    assert together.shape == (5, 2)
    torch.testing.assert_close(model(ids[1:2], mix[1:2]), together[1:2], rtol=1e-5, atol=1e-6)


def test_tabular_mixes_the_two_knots() -> None:
    model = _tabular()
    ids, _ = _records(1)
    only_first = torch.tensor([1.0, 0.0]).expand(1, 3, 2)
    same_twice = ids.clone()
    same_twice[..., 1] = ids[..., 0]
    half = torch.full((1, 3, 2), 0.5)
    torch.testing.assert_close(model(ids, only_first), model(same_twice, half))
    assert not torch.allclose(model(ids, only_first), model(ids, half))


def test_last_block_shortcut_equals_computing_every_position() -> None:
    block = _tabular().blocks[-1]
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(block(x, num_queries=1), block(x)[:, :1], rtol=1e-5, atol=1e-6)


def test_forward_leaves_the_callers_weights_alone() -> None:
    ids, mix = _records()
    before = mix.clone()
    _tabular()(ids, mix)
    assert torch.equal(mix, before)


def test_initial_classifier_predicts_equal_odds() -> None:
    config = TabularTransformerConfig(
        vocab_size=20, num_fields=3, num_classes=2, d_model=8, num_heads=2, num_layers=1
    )
    assert bool((TabularTransformer(config)(*_records()) == 0).all())


def test_same_generator_seed_gives_the_same_weights_and_another_does_not() -> None:
    first, again, other = _tabular(), _tabular(), _tabular(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_language_model_is_causal_and_tied() -> None:
    model = _text()
    assert model.head.weight is model.embedding.weight
    ids = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(2))
    logits = model(ids)
    assert logits.shape == (2, 9, 11)
    changed = ids.clone()
    changed[:, 6:] = (ids[:, 6:] + 1) % 11
    torch.testing.assert_close(model(changed)[:, :6], logits[:, :6])
    assert not torch.allclose(model(changed)[:, 6:], logits[:, 6:])


def test_untied_head_is_its_own_parameter() -> None:
    model = _text(tie_head=False)
    assert model.head.weight is not model.embedding.weight


def test_classifier_ignores_pads() -> None:
    model = _text(num_classes=3)
    nn.init.normal_(model.head.weight)
    ids = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 9)
    mask[:, 5:] = 0
    changed = ids.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(model(ids, mask), model(changed, mask))
    torch.testing.assert_close(model(ids[:, :5]), model(ids, mask), rtol=1e-5, atol=1e-6)


def test_too_long_text_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at most seq_len = 9"):
        _text()(torch.zeros(1, 10, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "value"), [("d_model", 9), ("num_layers", 0), ("vocab_size", -1), ("num_classes", 1)]
)
def test_impossible_sizes_are_refused(name: str, value: int) -> None:
    with pytest.raises(InvalidInputError, match=name):
        _text(**{name: value})


@pytest.mark.parametrize("kind", ["tabular", "lm", "classifier"])
def test_clipped_sums_equal_per_example_autograd(kind: str) -> None:
    model: nn.Module
    if kind == "tabular":
        model = _tabular().double()
        inputs: tuple[torch.Tensor, ...] = _records(4)
        labels = torch.tensor([0, 1, 1, 0])
    else:
        model = _text(num_classes=None if kind == "lm" else 3).double()
        nn.init.normal_(model.head.weight, std=0.5)
        ids = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(2))
        mask = torch.ones(4, 9)
        mask[0, 4:] = 0
        inputs = (ids, mask)
        labels = ids.masked_fill(mask == 0, -100) if kind == "lm" else torch.tensor([0, 1, 2, 0])
    loss = language_model_loss if kind == "lm" else classification_loss

    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(4):
        one = loss(model(*(x[i : i + 1] for x in inputs)), labels[i : i + 1]).sum()
        gradients = torch.autograd.grad(one, list(model.parameters()))
        norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
        for total, gradient in zip(expected.values(), gradients, strict=True):
            total += gradient * min(1.0, 0.3 / norm)

    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=0.3)
    accumulator.add(lambda: loss(model(*inputs), labels), batch_size=4)
    for name, total in accumulator.sums.items():
        torch.testing.assert_close(total, expected[name], rtol=1e-9, atol=1e-12, msg=name)
