"""Convolution: the certified bound against the distance itself, and the combinations that must be refused."""

import math
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import Layers, certify_layers, convolution_distance, plan_layers
from dp_flash_attention.noise.discrete_gaussian_layers import MAX_VARIANCE, log2_text


def true_distance(lower, k, upper):
    """Total variation between x + k·y and N_ℤ(0, lower + k²·upper), term by term in mpmath: no theorem."""
    with mpmath.workprec(400):
        lower, upper = mpmath.mpf(lower), mpmath.mpf(upper)
        whole = lower + k * k * upper

        def weights(variance):
            return mpmath.jtheta(3, 0, mpmath.exp(-1 / (2 * variance)))

        norm, norm_ideal = weights(lower) * weights(upper), weights(whole)
        narrow = int(18 * mpmath.sqrt(upper))
        ys = {y: mpmath.exp(-(mpmath.mpf(y) ** 2) / (2 * upper)) for y in range(-narrow, narrow + 1)}
        wide = int(18 * mpmath.sqrt(whole))
        xs = {}
        total = mpmath.mpf(0)
        for z in range(wide + 1):
            found = mpmath.mpf(0)
            for y, weight in ys.items():
                x = abs(z - k * y)
                if x > 18 * mpmath.sqrt(lower):
                    continue
                if x not in xs:
                    xs[x] = mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * lower))
                found += weight * xs[x]
            ideal = mpmath.exp(-(mpmath.mpf(z) ** 2) / (2 * whole)) / norm_ideal
            total += (1 if z == 0 else 2) * abs(found / norm - ideal)
        return total / 2


@pytest.mark.parametrize(("k", "published"), [(8, -16), (4, -61), (2, -206)])
def test_the_bound_is_the_published_distance_within_a_factor_of_two(k, published):
    """DESIGN 1.4: careless convolution at σ₀ = 6."""
    true = float(mpmath.log(true_distance(36, k, 36), 2))
    bound = math.log2(convolution_distance(36, k, 36))
    assert round(true) == published
    assert true <= bound <= true + 1


@pytest.mark.parametrize(
    ("lower", "k", "upper"), [(9, 3, 16), (Fraction(5, 2), 2, Fraction(7, 3)), (4, 2, 100)]
)
def test_the_bound_is_a_bound_for_unequal_layers(lower, k, upper):
    true = true_distance(float(lower), k, float(upper))
    assert true <= float(convolution_distance(lower, k, upper)) <= 2 * true


def test_a_combination_that_says_nothing_has_distance_one():
    assert convolution_distance(Fraction(1, 64), 8, 1) == 1


@pytest.mark.parametrize(("k", "accepted"), [(8, False), (4, True), (2, True)])
def test_a_combination_above_the_asked_distance_is_refused(k, accepted):
    layers = Layers(variances=(Fraction(36), Fraction(36)), multiplier=k)
    if accepted:
        certificate, tables = certify_layers(layers, max_distance=Fraction(1, 2**60))
        assert certificate.total_variation <= Fraction(1, 2**60)
        assert certificate.variance == 36 + k * k * 36
        assert certificate.largest == sum(k**i * (len(t.masses) - 1) for i, t in enumerate(tables))
        return
    with pytest.raises(InvalidInputError, match=r"k = 8.*2\^-15\.\d"):
        certify_layers(layers, max_distance=Fraction(1, 2**60))


@given(st.fractions(min_value=Fraction(1, 64), max_value=MAX_VARIANCE, max_denominator=10**6))
def test_a_plan_has_exactly_the_variance_that_was_asked_for(variance):
    layers = plan_layers(variance)
    assert layers.variance == variance
    for i in range(len(layers.variances)):
        assert Fraction(1, 64) <= layers.variances[i] <= 24**2


@given(
    st.integers(-6, 95).map(lambda n: Fraction(2) ** n),
    st.fractions(min_value=1, max_value=2, max_denominator=1000),
    st.sampled_from([40, 64, 100, 110]),
)
def test_what_is_planned_is_certified_within_the_asked_distance(scale, factor, bits):
    bound = Fraction(1, 2**bits)
    certificate, tables = certify_layers(plan_layers(scale * factor, max_distance=bound), max_distance=bound)
    assert certificate.total_variation <= bound
    assert len(tables) == len(certificate.layers.variances)
    assert certificate.largest < 2**55


@pytest.mark.parametrize("max_distance", [0, 1, 2, -1, 0.5, "1", True, None])
def test_what_is_no_distance_is_refused(max_distance):
    for function in (plan_layers, lambda v, **kw: certify_layers(plan_layers(v), **kw)):
        with pytest.raises(InvalidInputError, match="max_distance"):
            function(Fraction(16), max_distance=max_distance)


def test_a_distance_that_no_table_has_is_refused():
    with pytest.raises(InvalidInputError, match=r"2\^-200"):
        certify_layers(plan_layers(16, max_distance=Fraction(1, 2**200)), max_distance=Fraction(1, 2**200))
    with pytest.raises(InvalidInputError, match="max_distance"):
        plan_layers(10**6, max_distance=Fraction(1, 2**5000))


@pytest.mark.parametrize(
    "layers",
    [
        Layers(variances=(), multiplier=2),
        Layers(variances=(Fraction(4), Fraction(4)), multiplier=0),
        Layers(variances=(Fraction(0),), multiplier=1),
    ],
)
def test_layers_that_are_none_are_refused(layers):
    with pytest.raises(InvalidInputError):
        certify_layers(layers)


def test_powers_of_two_are_shown_rounded_up():
    assert log2_text(Fraction(1, 2**125)) == "2^-125.0"
    assert log2_text(Fraction(3, 2**126)) == "2^-124.4"
    assert log2_text(Fraction(0)) == "0"
    assert log2_text(Fraction(3)) == "2^1.6"
