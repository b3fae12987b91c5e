import math
import os

import pytest

from dp_flash_attention.accounting import concentrated_delta
from dp_flash_attention.core.errors import BudgetExhaustedError, InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.quantum.charges import ConcentratedBudget

TOTAL = PrivacyBudget(epsilon=1.0, delta=1e-6)


def test_the_limit_keeps_to_the_total_and_is_not_wasteful():
    limit = ConcentratedBudget(TOTAL).limit_rho
    assert concentrated_delta(epsilon=1.0, rho=limit) <= 1e-6
    assert concentrated_delta(epsilon=1.0, rho=limit * 1.01) > 0.99e-6


def test_prices_are_rounded_up_and_the_last_millionth_counts():
    book = ConcentratedBudget(TOTAL)
    book.charge(rho=1e-9, distance=0.0)
    assert book.spent_rho == 1e-6
    with pytest.raises(BudgetExhaustedError, match="nothing was computed or spent"):
        book.charge(rho=book.limit_rho, distance=0.0)
    assert book.spent_rho == 1e-6
    book.charge(rho=book.limit_rho - 2e-6, distance=0.0)
    with pytest.raises(BudgetExhaustedError):
        book.charge(rho=2e-6, distance=0.0)


def test_distances_of_finite_precision_are_a_budget_of_their_own():
    book = ConcentratedBudget(TOTAL)
    with pytest.raises(BudgetExhaustedError):
        book.charge(rho=1e-6, distance=1e-8)
    limit = 0.01 * 1e-6 / (1 + math.e)
    book.charge(rho=1e-6, distance=0.9 * limit)
    with pytest.raises(BudgetExhaustedError):
        book.charge(rho=1e-6, distance=0.2 * limit)


@pytest.mark.parametrize(
    ("rho", "distance"),
    [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (math.inf, 0.0), (0.1, -1.0), (0.1, math.nan)],
)
def test_what_is_no_price_is_refused(rho, distance):
    with pytest.raises(InvalidInputError, match="charge"):
        ConcentratedBudget(TOTAL).charge(rho=rho, distance=distance)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_no_budget_of_its_own():
    book = ConcentratedBudget(PrivacyBudget(epsilon=1.0, delta=1e-6))
    child = os.fork()
    if child == 0:
        try:
            book.charge(rho=1e-4, distance=0.0)
        except BudgetExhaustedError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    book.charge(rho=1e-4, distance=0.0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_repeats_answers_and_gives_no_first_one():
    """Its first answer and its parent's could differ, and one charge would have paid for both."""
    book = ConcentratedBudget(PrivacyBudget(epsilon=1.0, delta=1e-6))
    for query in (b"answered", b"charged"):
        book.charge(rho=1e-4, distance=0.0, query=query)
    assert book.bind(query=b"answered", answer=b"a")
    child = os.fork()
    if child == 0:
        try:
            book.charge(rho=1e-4, distance=0.0, query=b"answered")
            assert book.bind(query=b"answered", answer=b"a")
            assert not book.bind(query=b"answered", answer=b"b")
            book.charge(rho=1e-4, distance=0.0, query=b"charged")
            book.bind(query=b"charged", answer=b"c")
        except BudgetExhaustedError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
