import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum.grid import (
    OnGrid,
    checked_grid,
    default_grid,
    round_to_grid,
    rounded_steps,
    sensitivity_on_grid,
)


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    st.lists(st.floats(-1, 1), min_size=12, max_size=12),
    st.integers(-6, 2),
)
def test_rounded_neighbours_are_never_further_apart_than_accounted(value, move, power):
    first = np.array(value)
    second = first + np.array(move[: len(first)])
    grid, apart = 2.0**power, float(np.linalg.norm(first - second))
    moved = float(np.linalg.norm(round_to_grid(first, grid) - round_to_grid(second, grid)))
    assert moved <= sensitivity_on_grid(max(apart, 1e-9), grid, len(first), whole=False) + 1e-9


def test_the_bound_is_attained_so_leaving_rounding_out_would_be_noticed():
    # 16 coordinates just below and just above a half: rounding moves each by a whole step.
    below, above = np.full(16, 0.5 - 1e-9), np.full(16, 0.5 + 1e-9)
    moved = float(np.linalg.norm(round_to_grid(above, 1.0) - round_to_grid(below, 1.0)))
    assert moved == 4.0
    apart = float(np.linalg.norm(above - below))
    assert moved > apart / 1.0
    assert moved <= sensitivity_on_grid(apart, 1.0, 16, whole=False) + 1e-9


@given(st.floats(1e-6, 1e6), st.integers(1, 10**7))
def test_the_default_grid_adds_at_most_a_sixty_fourth(sensitivity, dimension):
    grid = default_grid(sensitivity, dimension, whole=False)
    assert math.frexp(grid)[0] == 0.5
    assert grid * math.sqrt(dimension) <= sensitivity / 64
    assert checked_grid(grid, sensitivity, dimension, whole=False) == grid
    assert sensitivity_on_grid(sensitivity, grid, dimension, whole=False) * grid <= sensitivity * (
        1 + 1 / 64 + 1e-9
    )


def test_whole_numbers_on_their_own_grid_pay_nothing_for_rounding():
    assert default_grid(1.0, 100, whole=True) == 1.0
    assert sensitivity_on_grid(1.0, 1.0, 100, whole=True) == pytest.approx(1.0, rel=1e-12)
    assert sensitivity_on_grid(1.0, 0.5, 100, whole=True) == pytest.approx(2.0, rel=1e-12)
    # √(⌊2.9²⌋) = √8: whole-numbered vectors have whole squared distances.
    assert sensitivity_on_grid(2.9, 1.0, 100, whole=True) == pytest.approx(math.sqrt(8), rel=1e-9)
    # On a wider grid they are rounded like any other number.
    assert sensitivity_on_grid(4.0, 2.0, 1, whole=True) == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize("grid", [0.3, 3.0, 0.0, -1.0, math.nan, math.inf, "1", True, 2.0**-600])
def test_what_is_no_power_of_two_is_refused(grid):
    with pytest.raises(InvalidInputError, match="grid"):
        checked_grid(grid, 1e9, 1, whole=False)


def test_a_grid_that_drowns_the_sensitivity_is_refused():
    assert checked_grid(0.125, 1.0, 64, whole=False) == 0.125
    with pytest.raises(InvalidInputError, match="rounding 64 coordinates adds as much as the sensitivity"):
        checked_grid(0.25, 1.0, 64, whole=False)


def _added(flat, noise, grid, **options):
    """All of the noise as one piece."""
    target = OnGrid(flat, grid, **options)
    target(0, noise)
    return target.out


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_adding_on_the_grid_is_rounding_adding_and_scaling(dtype, rng):
    num, grid = 70_001, 0.25
    flat = rng.normal(0, 100, num).astype(dtype)
    noise = rng.integers(-1000, 1000, num)
    expected = ((np.rint(flat.astype(float) / grid) + noise) * grid).astype(
        np.float32 if dtype is np.float32 else float
    )
    kept = flat.copy()
    assert np.array_equal(_added(flat, noise.copy(), grid), expected)
    assert np.array_equal(flat, kept)
    if dtype is np.int64:
        assert np.array_equal(_added(flat, noise.copy(), 1.0), flat + noise)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_beyond_the_grid_numbers_saturate_and_nan_counts_as_0(dtype):
    flat = np.array([1.0, 1e30, -np.inf, np.nan], dtype=dtype)
    assert round_to_grid(flat.astype(float), 2.0**-40).tolist() == [2**40, 2**52, -(2**52), 0]
    noise = np.array([1, -1, 2, 3])
    steps = np.array([2**40 + 1, 2**52 - 1, 2 - 2**52, 3])
    assert np.array_equal(_added(flat, noise, 2.0**-40), (steps * 2.0**-40).astype(dtype))


@pytest.mark.parametrize(("grid", "reach"), [(1.0, 2**52), (2.0, 2**52), (0.5, 2**51)])
def test_whole_numbers_saturate_before_doubles_lose_them(grid, reach):
    flat = np.array([2**62, -(2**63), 4])
    noise = np.array([0, 0, 0])
    assert _added(flat, noise, grid).tolist() == [reach, -reach, 4]


def test_two_huge_neighbours_are_no_further_apart_on_the_grid():
    first = np.array([2.0**52 - 1, 1e18, 3.0])
    second = first + np.array([2.0, 512.0, 1.0])
    moved = round_to_grid(first, 1.0) - round_to_grid(second, 1.0)
    assert (np.abs(moved) <= np.abs(first - second)).all()


def test_an_overflow_in_the_last_rounding_is_silent():
    """Under errors for warnings, a warning that depends on the value would be one more output."""
    found = _added(np.array([3e38], dtype=np.float32), np.array([2**52]), 2.0**100)
    assert found.tolist() == [math.inf]


@pytest.mark.parametrize("word", [np.int32, np.int64])
def test_pieces_in_any_order_make_the_same_as_one(word, rng):
    num = 100_000
    flat = rng.normal(0, 100, num).astype(np.float32)
    noise = rng.integers(-1000, 1000, num).astype(word)
    whole = _added(flat, noise.copy(), 0.25)
    target = OnGrid(flat, 0.25)
    for start in (70_000, 0, 50_000):
        stop = {0: 50_000, 50_000: 70_000, 70_000: num}[start]
        target(start, noise[start:stop].copy())
    assert np.array_equal(target.out, whole)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_steps_are_what_is_scaled_back(dtype, rng):
    flat = rng.normal(0, 100, 1000).astype(dtype)
    noise = rng.integers(-1000, 1000, 1000)
    for grid in (0.25, 1.0, 4.0):
        steps = _added(flat, noise.copy(), grid, steps=True)
        assert steps.dtype == np.int64
        assert np.array_equal(steps, round_to_grid(flat.astype(float), grid) + noise)


def test_sums_at_the_end_of_the_range_are_exact():
    flat, noise = np.array([2.0**52, -(2.0**52), 2.0**60]), np.array([2**52 - 1, 1 - 2**52, 2**52])
    assert _added(flat, noise, 1.0, steps=True).tolist() == [2**53 - 1, 1 - 2**53, 2**53]


def test_rounded_steps_are_handed_over_piece_by_piece_and_have_one_zero(rng):
    flat = np.concatenate([[-0.2, 0.2, np.nan, np.inf], rng.normal(0, 100, 100_000)])
    pieces = {}
    found = rounded_steps(flat, 1.0, lambda start, part: pieces.update({start: part.copy()}), piece=40_000)
    assert np.array_equal(found, round_to_grid(flat, 1.0))
    assert not np.signbit(found[found == 0]).any()
    assert sorted(pieces) == [0, 40_000, 80_000]
    assert np.array_equal(np.concatenate([pieces[start] for start in sorted(pieces)]), found)
