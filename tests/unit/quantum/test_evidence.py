"""A check that breaks, or that looks at nothing, does not pass."""

import numpy as np
import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum.evidence import Evidence, run_checks


def row(holds=True):
    return Evidence(name="x", claim="x is 1", measured="1", bound="1", holds=holds, basis="computed")


def broken():
    raise ZeroDivisionError("nothing\nworks")


def test_results_come_in_order_with_their_rows_and_times():
    started = []
    results = list(
        run_checks(
            [("a", lambda: [row()]), ("b", lambda: iter([row(), row(False)]))], on_start=started.append
        )
    )
    assert started == ["a", "b"]
    assert [(result.name, result.holds, len(result.rows)) for result in results] == [
        ("a", True, 1),
        ("b", False, 2),
    ]
    assert all(result.seconds >= 0 for result in results)


@pytest.mark.parametrize(
    ("check", "said"), [(broken, "ZeroDivisionError: nothing works"), (lambda: [], "no evidence")]
)
def test_a_check_that_shows_nothing_fails_and_the_next_one_still_runs(check, said):
    first, second = run_checks([("bad", check), ("good", lambda: [row()])])
    assert not first.holds
    assert said in first.rows[0].measured
    assert second.holds


def test_numpys_truth_becomes_pythons():
    assert row(np.float64(1.0) < 2.0).holds is True
    assert row(np.float64(3.0) < 2.0).holds is False


@pytest.mark.parametrize("checks", [[], [("a", broken), ("a", broken)]])
def test_a_list_of_checks_that_says_nothing_or_repeats_a_name_is_refused(checks):
    with pytest.raises(InvalidInputError, match="checks"):
        list(run_checks(checks))
