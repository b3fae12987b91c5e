"""The formulas: against brute force over masses, limits, and what they refuse."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.attention.sensitivity import (
    MAX_SCORE_BOUND,
    add_or_remove_sensitivity,
    replace_one_curve,
    replace_one_sensitivity,
    score_bound,
)
from dp_flash_attention.core.errors import InvalidInputError

scores = st.sampled_from([0.05, 0.2, 0.35, 0.5, 1.0, 2.0, 4.0])
masses = st.sampled_from([0.01, 0.1, 1.0, 3.0, 10.0, 1000.0])


@given(s=scores, mass=masses, own=st.integers(1, 5), room=st.sampled_from([None, 0, 1, 2, 3]))
def test_removal_is_the_maximum_over_every_mass_that_rows_can_have(s, mass, own, room):
    found = add_or_remove_sensitivity(
        value_norm=1.0, score_bound=s, null_rows=mass, record_rows=own, max_rest=room
    )
    x = own * math.exp(s)
    rest = [0.0]
    for count in range(1, (30 if room is None else room) + 1):
        rest += np.linspace(count * math.exp(-s), count * math.exp(s), 400).tolist()
    a = np.array(rest)
    best = float((x * (2 * a + mass) / ((x + a + mass) * (a + mass))).max())
    assert best <= found <= best * 1.001


@given(s=scores, mass=masses)
def test_the_free_maximum_has_the_closed_form(s, mass):
    x = math.exp(s)
    q = math.sqrt(mass * mass + 2 * mass * x)
    if (q - mass) / 2 >= math.exp(-s):
        found = add_or_remove_sensitivity(value_norm=3.0, score_bound=s, null_rows=mass)
        assert found == pytest.approx(6.0 * (q - mass) / (q + mass), rel=1e-9)


def test_the_change_of_an_empty_context_would_be_too_small():
    s, mass = 1.0, 0.5
    naive = math.exp(s) / (math.exp(s) + mass)
    assert add_or_remove_sensitivity(value_norm=1.0, score_bound=s, null_rows=mass) > 1.2 * naive


def test_limits():
    def replaced(**changes):
        return replace_one_sensitivity(**{"value_norm": 1.0, "score_bound": 1.0, "rest": 99, **changes})

    assert replaced() == pytest.approx(2.0 / (1.0 + 99.0 * math.exp(-2.0)))
    assert replaced(rest=0) == pytest.approx(2.0)
    assert replaced(value_norm=7.0) == pytest.approx(7.0 * replaced())
    assert 3.0 * replaced() > replaced(record_rows=3, rest=97) > 2.6 * replaced()
    assert replaced(null_rows=5.0) < replaced()
    assert replaced(record_rows=0) == 0.0
    assert add_or_remove_sensitivity(value_norm=1.0, score_bound=1.0, null_rows=1.0, record_rows=0) == 0.0
    assert add_or_remove_sensitivity(value_norm=1.0, score_bound=1.0, null_rows=1e-9) == pytest.approx(
        2.0 / (1.0 + math.exp(-2.0))
    )


@given(s=scores, rest=st.integers(0, 10**6), own=st.integers(1, 9))
def test_the_curve_is_the_scalar_and_both_fall_with_rows(s, rest, own):
    curve = replace_one_curve(2.0, s, np.array([rest, rest + 1]), np.array([own, own]), 0.0)
    assert curve[0] == replace_one_sensitivity(value_norm=2.0, score_bound=s, rest=rest, record_rows=own)
    assert curve[1] <= curve[0]


def test_scores_are_bounded_and_the_bound_is_bounded():
    assert score_bound(query_norm=2.0, key_norm=3.0, scale=0.5) == pytest.approx(3.0)
    for bad in (0.0, -1.0, math.nan, math.inf, MAX_SCORE_BOUND + 1):
        with pytest.raises(InvalidInputError):
            score_bound(query_norm=bad, key_norm=1.0, scale=1.0)
    with pytest.raises(InvalidInputError, match="null_rows"):
        add_or_remove_sensitivity(value_norm=1.0, score_bound=1.0, null_rows=0.0)
    with pytest.raises(InvalidInputError, match="rest"):
        replace_one_sensitivity(value_norm=1.0, score_bound=1.0, rest=-1)
