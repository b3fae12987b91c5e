"""The start-up check against models and losses that couple examples, each in its own way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_flash_attention.clipping import ClippedGradientAccumulator, check_examples_independent
from dp_flash_attention.core.errors import ExampleCouplingError, InvalidInputError, MissingRuleError

WIDTH = 6


class Model(nn.Module):
    """Two linear maps with an optional fault between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def check(model: nn.Module, loss_fn: Callable[[Tensor], Tensor], inputs: Tensor) -> None:
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    check_examples_independent(accumulator, model, loss_fn, inputs)
    assert not any(total.any() for total in accumulator.sums.values())


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(0))


def test_an_honest_model_passes(inputs: Tensor) -> None:
    model = nn.Sequential(Model(), nn.Dropout(0.3))
    check(model, lambda x: model(x).pow(2).mean((1, 2)), inputs)
    assert model.training


def test_one_example_is_enough(inputs: Tensor) -> None:
    model = Model()
    check(model, lambda x: model(x).pow(2).mean((1, 2)), inputs[:1])


def test_a_batch_normaliser_in_the_loss_is_seen(inputs: Tensor) -> None:
    model = Model()
    with pytest.raises(ExampleCouplingError, match="own number of tokens"):
        check(model, lambda x: model(x).pow(2).sum((1, 2)) / (x.shape[0] * x.shape[1]), inputs)


def test_hand_written_batch_statistics_are_seen(inputs: Tensor) -> None:
    model = Model(lambda h: h - h.mean(0, keepdim=True))
    with pytest.raises(ExampleCouplingError):
        check(model, lambda x: model(x).pow(2).mean((1, 2)), inputs)


def test_statistics_used_in_training_mode_only_are_seen(inputs: Tensor) -> None:
    model = Model()
    model.between = lambda h: h - h.mean(0, keepdim=True) if model.training else h
    with pytest.raises(ExampleCouplingError, match="training mode"):
        check(model, lambda x: model(x).pow(2).mean((1, 2)), inputs)


def test_a_gradient_that_leaks_without_changing_the_loss_is_seen(inputs: Tensor) -> None:
    model = Model(lambda h: h + h.flip(0) - h.flip(0).detach())
    with pytest.raises(ExampleCouplingError, match="gradient norm"):
        check(model, lambda x: model(x).pow(2).mean((1, 2)), inputs)


def test_sequence_first_is_seen_even_when_the_length_equals_a_probe(inputs: Tensor) -> None:
    for length in (2, 3, 7):
        model = Model()
        with pytest.raises(ExampleCouplingError):
            check(model, lambda x, m=model: m(x.transpose(0, 1)).pow(2).mean((0, 2)), inputs[:, :length])


def test_a_buffer_that_carries_data_is_seen(inputs: Tensor) -> None:
    model = Model()
    model.register_buffer("seen", torch.zeros(()))

    def loss(x: Tensor) -> Tensor:
        model.seen += x.sum().detach()
        return model(x).pow(2).mean((1, 2))

    with pytest.raises(ExampleCouplingError, match="buffer 'seen'"):
        check(model, loss, inputs)
    assert float(model.seen) == 0.0


class OneDimensionalIndices(nn.Module):
    """One index an example (a class) and positions shared by all, both of shape [n]."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.places, self.head = (
            nn.Embedding(4, WIDTH),
            nn.Embedding(9, WIDTH),
            nn.Linear(WIDTH, 4),
        )

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        rows = x + self.classes(label)[:, None] + self.places(torch.arange(x.shape[1]))
        return F.cross_entropy(self.head(rows.tanh()).mean(1), label, reduction="none")


@pytest.mark.parametrize("length", [2, 3, 5])
def test_the_check_tells_indices_of_equal_shape_apart(inputs: Tensor, length: int) -> None:
    model = OneDimensionalIndices()
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    batch = {"x": inputs[:, :length], "label": torch.arange(5) % 4}
    with pytest.raises(ExampleCouplingError, match="one an example or positions"):
        ClippedGradientAccumulator(model, l2_clip_norm=1.0).add(
            lambda: model(inputs[:length, :length], torch.arange(length) % 4), batch_size=length
        )
    check_examples_independent(accumulator, model, lambda b: model(b["x"], b["label"]), batch)
    # The ambiguous microbatch, length == batch size, is now credited correctly.
    x, label = inputs[:length, :length], torch.arange(length) % 4
    norms = accumulator.add(lambda: model(x, label), batch_size=length).norms
    for i in range(length):
        loss = model(x[i : i + 1], label[i : i + 1]).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert float(norms[i]) == pytest.approx(
            float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-4
        )


def test_inputs_without_rows_are_refused() -> None:
    model = Model()
    with pytest.raises(InvalidInputError, match="at least one row"):
        check(model, lambda x: model(x).sum((1, 2)), torch.zeros(0, 7, WIDTH))


class ZeroGate(nn.Module):
    """As in adapters and new heads: at the start no gradient passes ``gate``."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.gate, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), between
        self.head = nn.Linear(WIDTH, 4)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.gate(self.between(self.inner(x))))


def test_a_coupling_behind_a_gate_of_zeros_is_seen(inputs: Tensor) -> None:
    model = ZeroGate(lambda h: h + h.roll(1, 0) - h.roll(1, 0).detach())
    with pytest.raises(ExampleCouplingError, match=r"inner\.weight"):
        check(model, lambda x: model(x).pow(2).mean((1, 2)), inputs)


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_moved_for_the_check_are_put_back(inputs: Tensor, fails: bool) -> None:
    model = ZeroGate(torch.tanh)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(x: Tensor) -> Tensor:
        if fails and model.gate.weight.any():
            raise KeyError("broken loss")
        return model(x).pow(2).mean((1, 2))

    if fails:
        with pytest.raises(KeyError):
            check(model, loss, inputs)
    else:
        check(model, loss, inputs)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_coupling_in_a_parameter_of_small_share_is_seen(inputs: Tensor) -> None:
    model = Model(lambda h: 0.01 * (h + (len(h) > 1) * (h.flip(0) - h.flip(0).detach())))
    with pytest.raises(ExampleCouplingError, match=r"'first\.(weight|bias)'"):
        check(model, lambda x: model(x).pow(2).mean((1, 2)), inputs)


def test_a_head_outside_the_model_is_seen(inputs: Tensor) -> None:
    model, head = Model(), nn.Linear(4, 1)
    with pytest.raises(MissingRuleError, match=r"shape \(1, 4\) outside the model"):
        check(model, lambda x: head(model(x)).pow(2).mean((1, 2)), inputs)


def test_a_parameter_unfrozen_later_is_seen(inputs: Tensor) -> None:
    model = Model()
    model.first.requires_grad_(False)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    model.first.requires_grad_(True)
    with pytest.raises(MissingRuleError, match=r"'first\.(weight|bias)', which was not trainable"):
        check_examples_independent(accumulator, model, lambda x: model(x).pow(2).mean((1, 2)), inputs)


def test_an_input_that_wants_a_gradient_is_no_parameter(inputs: Tensor) -> None:
    model = Model()
    check(model, lambda x: model(x.requires_grad_(True)).pow(2).mean((1, 2)), inputs)
