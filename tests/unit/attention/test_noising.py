"""The noise of a call: a function of key and position alone, and never the same at two positions."""

import pytest
import torch

from dp_flash_attention.attention import AttentionBounds, CallNoise, dp_flash_attention, reference_attention
from dp_flash_attention.noise import TestKey

NUM_ROWS = 33


def bounds(**changes):
    given = {"query_norm": 2.0, "key_norm": 2.0, "value_norm": 1.5, "num_rows": NUM_ROWS, **changes}
    return AttentionBounds(**given)


def rows():
    return tuple(torch.randn(2, 4, count, 8) for count in (6, NUM_ROWS, NUM_ROWS))


def noise(label="call", **changes):
    return CallNoise(TestKey(label), **changes)


@pytest.fixture
def noise_in(call_of):
    """Returns what is left of an output when the exact answer is taken away, one column for each head and entry."""

    def take(output, tensors, plan):
        exact = reference_attention(call_of(tensors, plan))
        return (output.double() - exact).flatten(0, 1).flatten(1)

    return take


def test_the_same_key_and_number_give_the_same_bytes_and_others_other_noise(noise_in):
    tensors = rows()

    def run(source, **settings):
        return dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=0.5, **settings)

    again, source = run(noise())[0], noise()
    (first, release), (second, _) = run(source), run(source)
    assert torch.equal(first, again)
    assert torch.equal(run(noise(), call_id=1)[0], second)
    outputs = (first, second, run(noise(rank=1))[0], run(noise("other"))[0])
    columns = torch.cat([noise_in(output, tensors, release.plan) for output in outputs])
    correlation = torch.corrcoef(columns) - torch.eye(len(columns))
    # 48 numbers a column, 32 columns: 0.75 is beyond five standard deviations of each of 496 pairs.
    assert float(correlation.abs().max()) < 0.75
    assert len(torch.unique(columns)) == columns.numel()


class Forgetful:
    """A generator that leaves out one part of the position."""

    def __init__(self, inner, **fixed):
        self.inner, self.fixed = inner, fixed

    def add_row_normal_(self, out, **position):
        return self.inner.add_row_normal_(out, **{**position, **self.fixed})


@pytest.mark.parametrize(
    "fixed", [{"step": 0}, {"stream": 0}], ids=["across calls", "across heads and entries"]
)
def test_noise_that_is_used_twice_is_noticed(fixed, noise_in):
    tensors, source = rows(), noise()
    source._generator = Forgetful(source._generator, **fixed)
    outputs = [dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=0.5) for _ in range(2)]
    columns = torch.cat([noise_in(output, tensors, release.plan) for output, release in outputs])
    correlation = torch.corrcoef(columns) - torch.eye(len(columns))
    # What test_the_same_key_and_number… requires to stay below 0.75.
    assert float(correlation.abs().max()) > 0.99
