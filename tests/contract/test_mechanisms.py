"""One suite for everything that releases: types, shapes, refusals, and a statement that leaves nothing out."""

import json
import math

import numpy as np
import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import Guarantee, NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import SecretKey
from dp_flash_attention.quantum.amplitude_estimation_resistant import AmplitudeEstimationResistant
from dp_flash_attention.quantum.charges import ConcentratedBudget
from dp_flash_attention.quantum.lattice_gaussian import LatticeGaussian
from dp_flash_attention.quantum.layered_noise import LayeredNoise
from dp_flash_attention.quantum.post_quantum_gaussian import PostQuantumGaussian

RELATION = NeighboringRelation.ADD_OR_REMOVE_ONE
TEN = Sensitivity(l2=10.0, neighboring_relation=RELATION)
BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)


def memoised():
    charges = ConcentratedBudget(PrivacyBudget(epsilon=20.0, delta=1e-5))
    return AmplitudeEstimationResistant(key=SecretKey.from_os(), charges=charges, data_version="v1")


# Each takes a matrix of two rows and two columns.
MECHANISMS = {
    "PostQuantumGaussian": PostQuantumGaussian,
    "AmplitudeEstimationResistant": memoised,
    "LatticeGaussian, integers": LatticeGaussian,
    "LatticeGaussian, basis": lambda: LatticeGaussian([[1.0, 0.5], [0.0, 1.0]]),
    "LayeredNoise, Skellam": lambda: LayeredNoise(num_parties=2, num_honest=1, law="skellam"),
    "LayeredNoise, Gaussian": lambda: LayeredNoise(num_parties=2, num_honest=2, law="discrete_gaussian"),
}


@pytest.fixture(params=MECHANISMS)
def mechanism(request):
    return MECHANISMS[request.param]()


def test_a_release_says_all_that_it_claims(mechanism):
    found = mechanism.release(np.zeros((2, 2)), TEN, BUDGET)
    assert found.mechanism == mechanism.name
    assert found.value.dtype == np.float64
    assert np.isfinite(found.value).all()
    assert found.epsilon == BUDGET.epsilon
    assert 0 < found.delta.ideal < found.delta.total <= BUDGET.delta
    assert found.delta.generator > 0
    assert found.noise_stddev > 3 * TEN.l2  # no mechanism at (1, 1e-6) gets along with less
    assert isinstance(found.guarantee, Guarantee)
    assert found.guarantee.neighboring_relation is RELATION
    assert all(
        (found.guarantee.sensitivity, found.guarantee.public, found.guarantee.theorem, found.guarantee.source)
    )
    assert found.certified
    assert found.assumed
    assert found.estimated == ()
    assert found.quantum_security_bits == 128
    stated = json.loads(json.dumps(found.statement()))
    assert "value" not in stated
    assert stated["delta"]["total"] == found.delta.total


def test_two_mechanisms_of_one_kind_never_share_noise(mechanism, request):
    other = MECHANISMS[request.node.callspec.params["mechanism"]]()
    one = mechanism.release(np.zeros((2, 2)), TEN, BUDGET).value
    assert not np.array_equal(one, other.release(np.zeros((2, 2)), TEN, BUDGET).value)


def test_more_budget_means_less_noise(mechanism):
    little = mechanism.release(np.zeros((2, 2)), TEN, PrivacyBudget(epsilon=0.3, delta=1e-7)).noise_stddev
    assert mechanism.release(np.zeros((2, 2)), TEN, BUDGET).noise_stddev < little


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 2), dtype=complex),
        np.zeros((2, 2), dtype=bool),
        np.zeros((0, 2)),
        None,
    ],
    ids=["complex", "bool", "empty", "None"],
)
def test_values_of_another_kind_are_refused(mechanism, bad):
    with pytest.raises(InvalidInputError):
        mechanism.release(bad, TEN, BUDGET)


@pytest.mark.parametrize(
    "content",
    [math.nan, math.inf, -math.inf, 1e200, 1.7e308, 5e-324, 2**62],
    ids=["NaN", "infinity", "-infinity", "huge", "largest", "smallest", "whole"],
)
def test_no_content_of_a_value_raises(mechanism, content):
    """The value is private, so an error that depends on it would be an output without noise."""
    found = mechanism.release(np.full((2, 2), content), TEN, BUDGET)
    assert np.isfinite(found.value).all()
    assert any("saturate" in fact and "NaN" in fact for fact in found.guarantee.public)


@pytest.mark.parametrize("bad", [1.0, None, BUDGET], ids=str)
def test_a_sensitivity_without_its_relation_is_refused(mechanism, bad):
    with pytest.raises(InvalidInputError, match="sensitivity"):
        mechanism.release(np.zeros((2, 2)), bad, BUDGET)


@pytest.mark.parametrize("bad", [(1.0, 1e-6), None, TEN], ids=str)
def test_a_budget_that_is_none_is_refused(mechanism, bad):
    with pytest.raises(InvalidInputError, match="budget"):
        mechanism.release(np.zeros((2, 2)), TEN, bad)


@pytest.mark.parametrize("l2", [0.0, math.inf, -1.0, math.nan])
def test_a_sensitivity_of_nothing_or_everything_cannot_be_stated(l2):
    with pytest.raises(InvalidInputError, match="sensitivity"):
        Sensitivity(l2=l2, neighboring_relation=RELATION)


@pytest.mark.parametrize(
    "budget", [PrivacyBudget(epsilon=1.0, delta=1e-40), PrivacyBudget(epsilon=501.0, delta=1e-6)]
)
def test_a_budget_that_no_noise_can_meet_is_refused(mechanism, budget):
    with pytest.raises(InvalidInputError, match=r"delta|epsilon"):
        mechanism.release(np.zeros((2, 2)), TEN, budget)


def keyed(key):
    """The same mechanisms with a key of the caller's, and how each of them releases."""
    charges = ConcentratedBudget(PrivacyBudget(epsilon=20.0, delta=1e-5))
    parties = LayeredNoise(num_parties=2, num_honest=1)
    return {
        "PostQuantumGaussian": PostQuantumGaussian(key=key).release,
        "AmplitudeEstimationResistant": AmplitudeEstimationResistant(
            key=key, charges=charges, data_version="v1"
        ).release,
        "LatticeGaussian, integers": LatticeGaussian(key=key).release,
        "LatticeGaussian, basis": LatticeGaussian([[1.0, 0.5], [0.0, 1.0]], key=key).release,
        "LayeredNoise": lambda *request: parties.release(*request, keys=[key, SecretKey.from_os()]),
    }


class OwnKey:
    """A key of the caller's own type, which says nothing about its entropy."""

    is_test_key = False

    def __init__(self):
        self._key = SecretKey.from_os()
        self.derive, self.export = self._key.derive, self._key.export


@pytest.mark.parametrize(
    ("make", "assumed"),
    [
        (SecretKey.from_os, False),
        (lambda: SecretKey.from_bytes(bytes(range(32))), True),
        (lambda: SecretKey.from_bytes(bytes(range(32))).derive("child"), True),
        (OwnKey, True),
    ],
    ids=["drawn", "passed in", "subkey", "own type"],
)
@pytest.mark.parametrize("name", list(keyed(SecretKey.from_os())))
def test_a_strength_that_is_the_callers_word_is_said_to_be_assumed(name, make, assumed):
    stated = keyed(make())[name](np.zeros((2, 2)), TEN, BUDGET).statement()
    assert any(line.startswith("assumed, on the caller's word:") for line in stated["assumed"]) is assumed
    assert any("given the key's bits, which are assumed" in line for line in stated["certified"]) is assumed
