"""Core-SVP against the figures that the submissions publish and that their own scripts print."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.quantum.core_svp import (
    LweInstance,
    SisInstance,
    dual_attack,
    primal_attack,
    root_hermite,
    sis_attack,
)

Q_DSA = 8380417


def kyber(rank, eta):
    return LweInstance(
        dimension=256 * rank, max_samples=256 * (rank + 1), modulus=3329, stddev=math.sqrt(eta / 2)
    )


def dilithium(k, rank, eta):
    stddev = math.sqrt(sum(i * i for i in range(-eta, eta + 1)) / (2 * eta + 1))
    return LweInstance(dimension=256 * rank, max_samples=256 * k, modulus=Q_DSA, stddev=stddev)


def forgery(k, rank, bound):
    return SisInstance(dimension=256 * (k + rank + 1), equations=256 * k, modulus=Q_DSA, bound=bound)


def bits(attack):
    return math.floor(attack.classical_bits), math.floor(attack.quantum_bits)


@pytest.mark.parametrize(
    ("instance", "block", "classical", "quantum"),
    [
        # Kyber specification 3.02, table 4: core-SVP, primal attack only.
        (kyber(2, 3), 403, 118, 107),
        (kyber(3, 2), 625, 182, 165),
        (kyber(4, 2), 877, 256, 232),
        # Dilithium specification 3.1, table 1, and the output of the authors' script: key recovery.
        (dilithium(4, 4, 2), 423, 123, 112),
        (dilithium(6, 5, 4), 624, 182, 165),
        (dilithium(8, 7, 2), 863, 252, 229),
    ],
    ids=["Kyber512", "Kyber768", "Kyber1024", "Dilithium2", "Dilithium3", "Dilithium5"],
)
def test_the_primal_attack_costs_what_is_published(instance, block, classical, quantum):
    # The submissions simulate the basis's shape, this library uses the formula: 3 blocks and 1 bit apart at most.
    found = primal_attack(instance)
    assert abs(found.block_size - block) <= 3
    assert abs(bits(found)[0] - classical) <= 1
    assert abs(bits(found)[1] - quantum) <= 1


@pytest.mark.parametrize(
    ("instance", "block"),
    # The output of the authors' script (pq-crystals/security-estimates).
    [(dilithium(4, 4, 2), 422), (dilithium(6, 5, 4), 622), (dilithium(8, 7, 2), 860)],
)
def test_the_dual_attack_has_the_block_size_of_the_authors_script(instance, block):
    assert dual_attack(instance).block_size == block


@pytest.mark.parametrize(
    ("instance", "block", "classical", "quantum"),
    [
        # Dilithium specification 3.1, table 1: unforgeability, and in parentheses there strong unforgeability.
        (forgery(4, 4, 2 * 95232 + 1 + 4096 * 39), 423, 123, 112),
        (forgery(4, 4, 4 * 95232 + 1), 417, 121, 110),
        (forgery(6, 5, 2 * 261888 + 1 + 4096 * 49), 638, 186, 169),
        (forgery(6, 5, 4 * 261888 + 1), 602, 176, 159),
        (forgery(8, 7, 2 * 261888 + 1 + 4096 * 60), 909, 265, 241),
        (forgery(8, 7, 4 * 261888 + 1), 868, 253, 230),
    ],
    ids=["2", "2 strong", "3", "3 strong", "5", "5 strong"],
)
def test_forging_costs_what_is_published(instance, block, classical, quantum):
    found = sis_attack(instance)
    assert found.block_size == block
    assert bits(found) == (classical, quantum)


def test_the_root_hermite_factor_is_chens():
    # By hand at b = 100: (ln(100π)/100 + ln(100/2πe)) / 198 = (0.057499 + 1.767292) / 198 = 0.00921612.
    assert math.log(root_hermite(100)) == pytest.approx(0.00921612, abs=1e-8)
    assert all(root_hermite(b) > root_hermite(b + 1) > 1.0 for b in range(50, 1000, 25))


@given(st.integers(2, 4), st.integers(2, 6))
def test_more_noise_or_more_unknowns_are_no_easier(rank, eta):
    base = primal_attack(kyber(rank, eta))
    assert primal_attack(kyber(rank, eta + 1)).block_size >= base.block_size
    assert primal_attack(kyber(rank + 1, eta)).block_size > base.block_size
    assert base.quantum_bits < base.classical_bits


def test_a_larger_bound_is_no_harder_to_meet():
    costs = [sis_attack(forgery(6, 5, bound)).classical_bits for bound in (2**18, 2**19, 2**20)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]
