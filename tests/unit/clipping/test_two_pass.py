"""Two passes hold less, take exactly the same examples, and refuse a second pass that is not the first again.

That their norms and sums are exact for every kind of module is in ``test_accumulator``.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dp_flash_attention.clipping import ClippedGradientAccumulator, two_pass
from dp_flash_attention.clipping.contributions import LinearContribution
from dp_flash_attention.core.errors import InvalidInputError, MissingRuleError, RunStateError

C = 0.5


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.times = 1

    def forward(self, x):
        for _ in range(self.times):
            for layer in self.layers:
                x = F.dropout(layer(x).tanh(), 0.3, self.training)
        return x.square().sum((1, 2))


def inputs(size=3):
    return torch.randn(size, 5, 16)


def both(model):
    return (
        ClippedGradientAccumulator(model, l2_clip_norm=C, strategy="two_pass"),
        ClippedGradientAccumulator(model, l2_clip_norm=C),
    )


def assert_same_sums(first, second):
    for name, total in second.sums.items():
        torch.testing.assert_close(first.sums[name], total)


def test_several_microbatches_with_dropout_and_padding_give_the_sums_of_bookkeeping():
    model = Deep()
    ours, reference = both(model)
    for seed in range(3):
        x, weights = inputs(), torch.tensor([1.0, 1.0, 0.0])
        for accumulator in (ours, reference):
            torch.manual_seed(seed)
            accumulator.add(lambda x=x: model(x), batch_size=3, weights=weights)
    assert_same_sums(ours, reference)


def test_an_example_that_is_not_finite_is_dropped_exactly():
    model = Deep().eval()
    ours, reference = both(model)
    x = inputs()
    ours.add(lambda: model(x), batch_size=3)
    ours.reset()
    x[1, 0, 0] = float("nan")
    found = ours.add(lambda: model(x), batch_size=3)
    reference.add(lambda: model(x), batch_size=3)
    assert found.norms.isnan().tolist() == [False, True, False]
    assert all(total.isfinite().all() for total in ours.sums.values())
    assert_same_sums(ours, reference)


def test_no_record_outlives_its_layer(monkeypatch):
    """Book-keeping holds all layers' records at its peak, two passes one layer's."""
    alive, peak = 0, 0

    make = LinearContribution.__init__

    def counting(self, **fields):
        nonlocal alive, peak
        make(self, **fields)
        alive += 1
        peak = max(peak, alive)

    def gone(self):
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(LinearContribution, "__init__", counting)
    monkeypatch.setattr(LinearContribution, "__del__", gone, raising=False)
    peaks = {}
    model = Deep()
    for accumulator, name in zip(both(model), ("two_pass", "bookkeeping"), strict=True):
        accumulator.add(lambda: model(inputs()), batch_size=3)
        accumulator.reset()
        peak = alive
        accumulator.add(lambda: model(inputs()), batch_size=3)
        peaks[name] = peak
    assert peaks == {"two_pass": 1, "bookkeeping": 4}


def test_a_second_pass_with_other_losses_is_refused_and_adds_nothing():
    model, calls = Deep().eval(), []
    accumulator, _ = both(model)
    x = inputs()
    accumulator.add(lambda: model(x), batch_size=3)
    accumulator.reset()

    def moody():
        calls.append(1)
        return model(x) * len(calls)

    with pytest.raises(RunStateError, match="other losses"):
        accumulator.add(moody, batch_size=3)
    assert not any(total.any() for total in accumulator.sums.values())


def test_dropout_that_differs_between_the_passes_is_seen(monkeypatch):
    model = Deep()
    accumulator, _ = both(model)
    accumulator.add(lambda: model(inputs()), batch_size=3)
    monkeypatch.setattr("dp_flash_attention.clipping.random_state.RandomState.rewind", lambda self: None)
    with pytest.raises(RunStateError, match="other losses"):
        accumulator.add(lambda: model(inputs()), batch_size=3)


def test_a_parameter_that_is_used_again_later_is_refused():
    model = Deep()
    accumulator, _ = both(model)
    accumulator.add(lambda: model(inputs()), batch_size=3)
    model.times = 2
    with pytest.raises(MissingRuleError, match="used again"):
        accumulator.add(lambda: model(inputs()), batch_size=3)


def test_a_parameter_that_is_used_less_often_later_stays_exact():
    model = Deep().eval()
    model.times = 2
    ours, reference = both(model)
    x = inputs()
    ours.add(lambda: model(x), batch_size=3)
    ours.reset()
    model.times = 1
    ours.add(lambda: model(x), batch_size=3)
    reference.add(lambda: model(x), batch_size=3)
    assert_same_sums(ours, reference)


def test_breaking_off_in_the_second_backward_pass_asks_for_a_reset(monkeypatch):
    model = Deep().eval()
    accumulator, _ = both(model)
    x = inputs()
    accumulator.add(lambda: model(x), batch_size=3)
    record = two_pass.SumTape.record

    def breaking(self, parameter, contribution):
        if "0" in parameter:
            raise MemoryError
        record(self, parameter, contribution)

    monkeypatch.setattr(two_pass.SumTape, "record", breaking)
    with pytest.raises(MemoryError):
        accumulator.add(lambda: model(x), batch_size=3)
    with pytest.raises(RunStateError, match="reset"):
        _ = accumulator.sums


def test_autocast_releases_the_numbers_that_were_measured():
    model = Deep().eval()
    ours, reference = both(model)
    x = inputs()
    for accumulator in (ours, ours, reference):
        accumulator.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            norms = accumulator.add(lambda: model(x), batch_size=3).norms
    assert_same_sums(ours, reference)
    assert float(norms.min()) > C


def test_an_unknown_strategy_is_refused():
    with pytest.raises(InvalidInputError, match="two_pass"):
        ClippedGradientAccumulator(Deep(), l2_clip_norm=C, strategy="three_pass")
