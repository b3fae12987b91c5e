from fractions import Fraction

import numpy as np
import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum.values import unpack


@pytest.mark.parametrize(
    "value",
    [
        3,
        -2.5,
        np.float64(1.5),
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.linspace(0, 1, 5, dtype=np.float32),
        np.array(2.0),
        torch.arange(4).reshape(2, 2),
        torch.linspace(-1, 1, 7, dtype=torch.float64),
        torch.ones(3, 5).T,
        torch.ones(2, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_a_value_comes_back_as_what_it_was(value):
    unpacked = unpack(value)
    back = unpacked.restore(unpacked.vector + 0.0)
    if isinstance(value, torch.Tensor):
        assert back.dtype == value.dtype
        assert back.shape == value.shape
        assert torch.equal(back, value)
    elif isinstance(value, np.ndarray):
        assert back.dtype == value.dtype
        assert back.shape == value.shape
        assert np.array_equal(back, value)
    else:
        assert back == value
        assert isinstance(back, int) is isinstance(value, int)


@pytest.mark.parametrize(
    ("value", "whole"), [(1, True), (1.0, False), (np.array([1]), True), (torch.ones(1), False)]
)
def test_whether_numbers_are_whole_is_read_off_the_type_and_never_off_the_value(value, whole):
    assert unpack(value).whole is whole


@pytest.mark.parametrize(
    "bad",
    [
        float("nan"),
        np.array([1.0, np.inf]),
        torch.tensor([float("nan")]),
        True,
        "1",
        None,
        [1.0],
        1j,
        np.array([True]),
        np.array([1 + 1j]),
        np.array(["a"]),
        np.empty(0),
        torch.empty(0),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, requires_grad=True),
        2**53,
        np.array([2**60]),
        torch.tensor([-(2**60)]),
        1e200,
    ],
    ids=str,
)
def test_what_is_no_finite_number_is_refused_without_showing_it(bad):
    with pytest.raises(InvalidInputError) as error:
        unpack(bad)
    assert "1152921504606846976" not in str(error.value)


@pytest.mark.parametrize(
    "value", [Fraction(2**53 + 1, 2), np.longdouble(1.5)], ids=["fraction", "long double"]
)
def test_what_a_double_cannot_hold_is_refused(value):
    """Rounding to a double would come before rounding to the grid, and is not in the sensitivity."""
    with pytest.raises(InvalidInputError, match="Convert it first"):
        unpack(value)
