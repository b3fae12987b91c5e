from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise.targets import checked_stddev, checked_target, float32_two_variance


@pytest.mark.parametrize("stddev", [1e-12, 0.1, 1.0, 1 / 3, 1e9])
def test_rounding_the_scale_never_makes_the_noise_smaller(stddev: float) -> None:
    rounded = float32_two_variance(stddev)
    assert float(rounded) >= 2.0 * stddev**2
    assert float(rounded) <= 2.0 * stddev**2 * (1 + 2**-23)
    assert rounded.dtype == np.float32


@pytest.mark.parametrize("stddev", [2.0**-41, 2.0**61, 0.0, -1.0, float("nan"), None, True])
def test_a_scale_outside_float32_is_refused(stddev: Any) -> None:
    with pytest.raises(InvalidInputError, match="stddev"):
        checked_stddev(stddev, torch.float32)


def test_float64_reaches_further() -> None:
    assert checked_stddev(2.0**-41, torch.float64) == 2.0**-41
    assert checked_stddev(2.0**-40, torch.float32) == 2.0**-40


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(3),
        torch.zeros((), dtype=torch.float64),
        torch.zeros(0),
        torch.zeros(4, 6).T,
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(1, 5).expand(1, 5),
        torch.zeros(1, 1).expand(1, 1)[:, :1],
    ],
)
def test_memory_without_overlap_is_written_where_it_lies(out: Tensor) -> None:
    array = checked_target(out)
    array[...] = 7.0
    assert bool((out == 7.0).all())


@pytest.mark.parametrize(
    ("out", "named"),
    [
        (torch.zeros(1).expand(3), "stride"),
        (torch.zeros(5).as_strided((3, 3), (1, 1)), "stride"),
        (torch.zeros(3, dtype=torch.bfloat16), "dtype"),
        (torch.zeros(3, dtype=torch.int64), "dtype"),
        (torch.zeros(3, dtype=torch.complex64), "dtype"),
        (torch.zeros(3, requires_grad=True), "requires_grad"),
        (torch.zeros(3).to_sparse(), "plain dense"),
        ([0.0], "out"),
    ],
)
def test_memory_that_noise_cannot_be_written_to_is_refused(out: Any, named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        checked_target(out)


def test_another_device_is_refused() -> None:
    with pytest.raises(NoiseUnavailableError, match="meta"):
        checked_target(torch.zeros(3, device="meta"))
