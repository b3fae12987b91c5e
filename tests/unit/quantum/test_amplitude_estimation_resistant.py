"""A repeat is a repeat, and nothing else is. Fixed keys; statistical false-alarm rates are 1e-4 over keys."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dp_flash_attention.core.errors import BudgetExhaustedError, InvalidInputError, NoiseReuseError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import SecretKey, WideSecretKey
from dp_flash_attention.quantum import amplitude_estimation_resistant as module
from dp_flash_attention.quantum.amplitude_estimation_resistant import AmplitudeEstimationResistant
from dp_flash_attention.quantum.charges import ConcentratedBudget
from dp_flash_attention.quantum.memo_key import create_memo_key, load_memo_key

ONE = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
PRICE = PrivacyBudget(epsilon=0.5, delta=1e-7)
KEY = bytes(range(32))


def fresh(version="v1", epoch=0, total=20.0, key=KEY, **changes):
    return AmplitudeEstimationResistant(
        key=SecretKey.from_bytes(key),
        charges=ConcentratedBudget(PrivacyBudget(epsilon=total, delta=1e-6)),
        data_version=version,
        epoch=epoch,
        **changes,
    )


def ask(mechanism, query="mean age", value=40.0, **changes):
    return mechanism.answer(query, lambda: value, **{"sensitivity": ONE, "budget": PRICE, **changes}).value


def test_a_repeat_is_the_same_bytes_and_costs_nothing():
    mechanism = fresh()
    first = ask(mechanism)
    spent = mechanism._charges.spent_rho
    assert {ask(mechanism) for _ in range(50)} == {first}
    assert mechanism._charges.spent_rho == spent > 0


def test_a_restart_with_the_same_key_file_gives_the_same_answers(tmp_path):
    path = tmp_path / "memo.key"
    create_memo_key(path)

    def answers():
        mechanism = fresh(key=load_memo_key(path).export())
        return [ask(mechanism, query) for query in ("a", ["b", 2], {"c": None})]

    assert answers() == answers()


def test_whatever_should_change_the_noise_changes_it():
    base = ask(fresh())
    others = [
        ask(fresh(version="v2")),
        ask(fresh(epoch=1)),
        ask(fresh(key=bytes(32))),
        ask(fresh(), query="mean  age"),
        ask(fresh(), budget=PrivacyBudget(epsilon=0.51, delta=1e-7)),
        ask(fresh(), sensitivity=Sensitivity(l2=1.001, neighboring_relation=ONE.neighboring_relation)),
        ask(fresh(grid=2.0**-20)),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_one_noise_at_two_scales_would_solve_for_the_value_and_does_not_happen():
    # If both answers used one normal number z, (a·s₂ − b·s₁)/(s₂ − s₁) would be the value itself.
    mechanism, value = fresh(), 40.0
    one = mechanism.answer("q", lambda: value, sensitivity=ONE, budget=PRICE)
    other = mechanism.answer(
        "q", lambda: value, sensitivity=ONE, budget=PrivacyBudget(epsilon=2.0, delta=1e-7)
    )
    solved = (one.value * other.noise_stddev - other.value * one.noise_stddev) / (
        other.noise_stddev - one.noise_stddev
    )
    assert abs(solved - value) > 0.05


def versions_that_leak(num=100):
    """In how many of ``num`` pairs of data versions the difference of the answers is that of the values."""
    leaks = 0
    for i in range(num):
        first, second = ask(fresh("v1"), query=i, value=10.0), ask(fresh("v2"), query=i, value=13.0)
        leaks += second - first == 3.0
    return leaks


def test_data_versions_do_not_share_noise():
    # Equal to the grid's step by chance with probability below 1e-3 each: 5 of 100 never happen by accident.
    assert versions_that_leak() < 5


@pytest.mark.parametrize("same_value", [True, False])
def test_a_memo_that_ignores_the_data_version_is_noticed(monkeypatch, same_value):
    original = module.keyed_shake256

    def without_version(key, *fields, domain, num_bytes):
        if domain == b"dpfa.memo.label.v1":
            fields = (fields[0], *fields[2:])
        elif domain == b"dpfa.memo.noise.v1" and not same_value:
            fields = fields[:1]  # the value left out as well: the plain textbook memo
        return original(key, *fields, domain=domain, num_bytes=num_bytes)

    monkeypatch.setattr(module, "keyed_shake256", without_version)
    if same_value:  # equal answers tell that two versions agree
        assert ask(fresh("v1")) == ask(fresh("v2"))
    else:
        assert versions_that_leak(20) == 20


def test_a_memo_that_ignores_the_epoch_is_noticed(monkeypatch):
    original = module.keyed_shake256

    def without_epoch(key, *fields, domain, num_bytes):
        if domain == b"dpfa.memo.label.v1":
            fields = fields[1:]
        return original(key, *fields, domain=domain, num_bytes=num_bytes)

    assert ask(fresh(epoch=0)) != ask(fresh(epoch=1))
    monkeypatch.setattr(module, "keyed_shake256", without_epoch)
    assert ask(fresh(epoch=0)) == ask(fresh(epoch=1))


def test_changed_data_under_one_version_are_refused_and_after_a_restart_share_no_noise():
    mechanism = fresh()
    ask(mechanism, value=40.0)
    with pytest.raises(NoiseReuseError, match="data_version"):
        ask(mechanism, value=43.0)
    same = sum(
        ask(fresh(), query=i, value=43.0) - ask(fresh(), query=i, value=40.0) == 3.0 for i in range(40)
    )
    assert same < 4


def test_noise_that_ignores_the_value_would_show_the_difference(monkeypatch):
    """After a restart with a charge book that forgets, one noise under two values is their exact difference."""
    value = np.zeros(1000)
    noise_key = AmplitudeEstimationResistant._noise_key
    careful = ask_many(value) - ask_many(value + 3.0)
    assert np.count_nonzero(careful == -3.0) < 100
    monkeypatch.setattr(
        AmplitudeEstimationResistant,
        "_noise_key",
        lambda self, label, commitment: noise_key(self, label, b""),
    )
    assert np.count_nonzero(ask_many(value) - ask_many(value + 3.0) == -3.0) == 1000


def ask_many(value):
    return (
        fresh(grid=0.5)
        .answer(
            "q",
            lambda: value,
            sensitivity=Sensitivity(l2=30.0, neighboring_relation=ONE.neighboring_relation),
            budget=PRICE,
            dimension=len(value),
        )
        .value
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int32])
def test_an_answer_is_the_rounded_value_and_noise_whatever_the_number_of_threads(dtype, rng):
    """Longer than a piece, so that pieces of both digests and of the noise meet in the middle."""
    value = (1000 * rng.normal(size=140_001)).astype(dtype)
    moved = Sensitivity(l2=1000.0, neighboring_relation=ONE.neighboring_relation)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(fresh().release(value, moved, PRICE, query="long"))
    torch.set_num_threads(before)
    assert np.array_equal(found[0].value, found[1].value)
    assert found[0].value.dtype == dtype
    steps = found[0].value.astype(float) / found[0].grid
    noise = found[0].value.astype(float) - value
    bound = stats.norm.isf(1e-4 / 2)
    assert abs(np.mean((noise / found[0].noise_stddev) ** 2) - 1) / math.sqrt(2 / len(value)) < bound
    assert np.array_equal(steps, np.rint(steps)) or dtype is np.float32


def test_nothing_is_computed_once_the_budget_is_gone():
    mechanism, computed = fresh(total=1.0), []

    def count():
        computed.append(1)
        return 1.0

    def ask_many():
        for i in range(100):
            mechanism.answer(i, count, sensitivity=ONE, budget=PRICE)

    with pytest.raises(BudgetExhaustedError):
        ask_many()
    assert 0 < len(computed) < 20
    answered = len(computed)
    assert mechanism.answer(0, count, sensitivity=ONE, budget=PRICE)  # a repeat is still answered
    assert len(computed) == answered + 1


def test_a_computation_that_fails_has_been_paid_for_once():
    mechanism = fresh()

    def fail():
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError):
        mechanism.answer("q", fail, sensitivity=ONE, budget=PRICE)
    spent = mechanism._charges.spent_rho
    assert spent > 0
    ask(mechanism, "q")
    assert mechanism._charges.spent_rho == spent


def test_an_answer_of_another_kind_or_length_than_declared_is_refused():
    with pytest.raises(InvalidInputError, match="as declared"):
        ask(fresh(), value=np.zeros(2))
    with pytest.raises(InvalidInputError, match="as declared"):
        ask(fresh(), value=3)


def test_the_noise_over_many_queries_has_the_stated_law_and_half_of_it_is_rejected():
    mechanism, num = fresh(), 300
    found = [mechanism.answer(i, lambda: 0.0, sensitivity=ONE, budget=PRICE) for i in range(num)]
    scaled = np.array([release.value / release.noise_stddev for release in found])
    bound = stats.norm.isf(1e-4 / 2)
    assert abs((np.mean(scaled**2) - 1) / math.sqrt(2 / num)) < bound
    assert abs((np.mean((scaled / 2) ** 2) - 1) / math.sqrt(2 / num)) > bound


def test_release_takes_a_value_that_is_there_already():
    mechanism = fresh()
    value = np.arange(6.0).reshape(2, 3)
    one = mechanism.release(value, ONE, PRICE, query="table")
    assert one.value.shape == (2, 3)
    assert np.array_equal(mechanism.release(value, ONE, PRICE, query="table").value, one.value)
    assert one.rho == pytest.approx(mechanism._charges.spent_rho, abs=1e-6)


def test_a_wide_key_carries_its_bits():
    wide = WideSecretKey.from_bytes(bytes(range(64)), entropy_bits=512)
    charges = ConcentratedBudget(PrivacyBudget(epsilon=5.0, delta=1e-6))
    mechanism = AmplitudeEstimationResistant(key=wide, charges=charges, data_version="v1")
    one, other = (mechanism.answer("q", lambda: 1.5, sensitivity=ONE, budget=PRICE) for _ in range(2))
    assert one.value == other.value
    assert one.quantum_security_bits == 256


@pytest.mark.parametrize("change", [{"version": ""}, {"version": 3}, {"epoch": -1}, {"epoch": 1.5}], ids=str)
def test_versions_and_epochs_out_of_range_are_refused(change):
    with pytest.raises(InvalidInputError):
        fresh(**change)


def test_prices_under_two_relations_are_not_added_up():
    mechanism = fresh()
    ask(mechanism, "a")
    spent = mechanism._charges.spent_rho
    replaced = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.REPLACE_ONE)
    with pytest.raises(InvalidInputError, match="one relation"):
        ask(mechanism, "b", sensitivity=replaced)
    assert mechanism._charges.spent_rho == spent
