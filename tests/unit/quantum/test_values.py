from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum.values import LARGEST_FLOAT, unpack, write_bounded


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
    assert np.array_equal(unpacked.vector, unpacked.flat)
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


def test_narrow_whole_numbers_saturate_and_half_floats_round():
    found = np.array([-5.0, 300.2, 7.0])
    assert unpack(np.zeros(3, dtype=np.uint8)).restore(found).tolist() == [0, 255, 7]
    assert unpack(torch.zeros(3, dtype=torch.int8)).restore(found).tolist() == [-5, 127, 7]
    assert unpack(torch.zeros(3, dtype=torch.float16)).restore(found + 1e-5).dtype is torch.float16


def test_read_only_strided_and_foreign_memory_is_read_and_never_written():
    value = np.arange(12.0)[::2]
    frozen = np.arange(6.0)
    frozen.flags.writeable = False
    foreign = np.arange(6.0).astype(">f8")
    for array in (value, frozen, foreign, np.arange(6, dtype=">i4")):
        unpacked = unpack(array)
        assert np.array_equal(unpacked.vector, array)
        assert unpacked.restore(unpacked.vector).dtype == array.dtype


@pytest.mark.parametrize(
    "bad",
    [
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
        torch.zeros(2, dtype=torch.uint64),
    ],
    ids=str,
)
def test_what_is_no_vector_of_numbers_is_refused(bad):
    with pytest.raises(InvalidInputError):
        unpack(bad)


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (float("nan"), 0.0),
        (float("-inf"), -LARGEST_FLOAT),
        (1e200, LARGEST_FLOAT),
        (np.array([1.0, np.inf, np.nan], dtype=np.float16), [1.0, LARGEST_FLOAT, 0.0]),
        (np.array([1.0, -np.inf, np.nan], dtype=np.float32), [1.0, -LARGEST_FLOAT, 0.0]),
        (torch.tensor([float("nan"), -2.0]), [0.0, -2.0]),
        (torch.tensor([float("inf")], dtype=torch.bfloat16), LARGEST_FLOAT),
        (2**53, 2.0**52),
        (-(10**400), -(2.0**52)),
        (np.array([2**60, -(2**63), 3]), [2.0**52, -(2.0**52), 3.0]),
        (np.array([2**64 - 1, 7], dtype=np.uint64), [2.0**52, 7.0]),
        (np.array([255], dtype=np.uint8), 255.0),
        (torch.tensor([-(2**63)]), -(2.0**52)),
    ],
    ids=str,
)
def test_no_content_raises_nan_counts_as_0_and_the_rest_saturates(value, held):
    """An error that depends on the value is an output that no noise protects."""
    unpacked = unpack(value)
    assert np.array_equal(unpacked.vector, np.atleast_1d(held))
    assert unpacked.restore(unpacked.vector) is not None


@given(hnp.arrays(np.float64, 6, elements=st.floats()), st.integers(-40, 40))
def test_bounding_is_fixed_for_each_coordinate_and_never_moves_two_values_apart(numbers, power):
    limit = 2.0**power
    whole, alone = np.empty(6), np.empty(1)
    write_bounded(numbers, whole, limit=limit)
    for number, found in zip(numbers, whole, strict=True):
        write_bounded(np.array([number]), alone, limit=limit)
        assert alone[0] == found
    finite = np.where(np.isfinite(numbers), numbers, 0.0)
    write_bounded(finite, whole, limit=limit)
    apart = np.abs(finite[:, None] / 2.0 - finite / 2.0)  # halves, for differences that would overflow
    assert (np.abs(whole[:, None] / 2.0 - whole / 2.0) <= apart).all()


def test_results_beyond_a_narrow_type_saturate_in_silence():
    huge = np.array([1e300, -1e300])
    assert unpack(np.zeros(2, dtype=np.int64)).restore(huge).tolist() == [2**63 - 2**10, -(2**63) + 2**10]
    assert unpack(torch.zeros(2, dtype=torch.int32)).restore(huge).tolist() == [2**31 - 1, -(2**31)]
    assert unpack(np.zeros(2, dtype=np.float16)).restore(huge).tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize(
    "value", [Fraction(2**53 + 1, 2), np.longdouble(1.5)], ids=["fraction", "long double"]
)
def test_what_a_double_cannot_hold_is_refused(value):
    """Rounding to a double would come before rounding to the grid, and is not in the sensitivity."""
    with pytest.raises(InvalidInputError, match="Convert it first"):
        unpack(value)
