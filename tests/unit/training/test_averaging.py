from __future__ import annotations

import pytest
import torch
from torch import nn

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training import ParameterAverage


def parameter(value: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.full((2,), value, dtype=dtype))


def test_the_average_follows_its_recurrence() -> None:
    p = parameter(1.0)
    average = ParameterAverage({"p": p}, decay=0.5)
    expected = 1.0
    for step, value in enumerate((2.0, -3.0, 5.0, 0.5), start=1):
        p.data.fill_(value)
        average.update()
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * value
    average.copy_to_model()
    assert torch.allclose(p.detach(), torch.full((2,), expected, dtype=torch.float64))


def test_a_reloaded_average_goes_on_bit_by_bit() -> None:
    p = parameter(1.0)
    whole, first = ParameterAverage({"p": p}, decay=0.9), ParameterAverage({"p": p}, decay=0.9)
    for value in (2.0, 3.0):
        p.data.fill_(value)
        whole.update()
        first.update()
    second = ParameterAverage({"p": p}, decay=0.9)
    second.load_state_dict(first.state_dict())
    p.data.fill_(4.0)
    whole.update()
    second.update()
    assert torch.equal(whole.state_dict()["averages"]["p"], second.state_dict()["averages"]["p"])


def test_half_precision_is_averaged_in_float32() -> None:
    # Steps of 2⁻⁹ around 1 are lost in bfloat16, which has 8 bits.
    p = parameter(1.0, torch.bfloat16)
    average = ParameterAverage({"p": p}, decay=0.999)
    assert average.state_dict()["averages"]["p"].dtype == torch.float32
    p.data.fill_(1.0 + 2.0**-7)
    average.update()
    assert 1.0 < float(average.state_dict()["averages"]["p"][0]) < 1.0 + 2.0**-7


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_that_keeps_all_or_nothing_is_refused(decay: float) -> None:
    with pytest.raises(InvalidInputError, match="ema_decay"):
        ParameterAverage({}, decay=decay)
