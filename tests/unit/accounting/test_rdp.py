import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from mpmath import mp, mpf

from dp_flash_attention.accounting.rdp import _ORDERS, _cumulant, _sampled_divergence


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 1.1), (0.3, 0.6), (1e-6, 2.0), (0.9, 50.0), (1e-8, 1e4)])
@pytest.mark.parametrize("order", [2, 3, 17])
def test_the_cumulant_equals_the_binomial_sum_in_60_digits(q, sigma, order):
    with mp.workdps(60):
        total = sum(
            mp.binomial(order, k)
            * (1 - mpf(q)) ** (order - k)
            * mpf(q) ** k
            * mp.exp(mpf(k * (k - 1)) / (2 * mpf(sigma) ** 2))
            for k in range(order + 1)
        )
        exact = float(mp.log(total))
    assert _cumulant(order, q, sigma) == pytest.approx(exact, rel=1e-9)


def test_order_two_is_the_chi_square_closed_form():
    assert _cumulant(2, 0.02, 1.5) == pytest.approx(math.log1p(0.02**2 * math.expm1(1 / 1.5**2)))


def test_rare_sampling_keeps_a_positive_divergence():
    # dp_accounting 0.6 rounds these to negative numbers, and a negative divergence to ε = 0.
    assert all(value > 0.0 for value in _sampled_divergence(1e-8, 1e4))


def test_fractional_orders_are_bounded_from_above():
    values = np.array(_sampled_divergence(0.05, 1.0))
    fractional = [i for i, order in enumerate(_ORDERS) if 1.1 < order < 8 and order != int(order)]
    for i in fractional[::10]:
        accountant = RdpAccountant(orders=[float(_ORDERS[i])])
        accountant.compose(PoissonSampledDpEvent(0.05, GaussianDpEvent(1.0)))
        exact = float(accountant._rdp[0])
        assert exact * (1 - 1e-9) <= values[i] <= 2.1 * exact


def test_the_divergence_grows_with_the_order():
    values = np.array(_sampled_divergence(0.01, 1.1))
    assert np.all(np.diff(values) >= -1e-15)
