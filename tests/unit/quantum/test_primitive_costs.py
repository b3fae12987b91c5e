import json
import math

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum.primitive_costs import (
    MAX_DEPTHS,
    aes_256,
    attacks,
    chacha20,
    cipher,
    estimates,
    lattice,
    sponge,
    x25519,
    xor_of_two_ciphers,
)


def figures(estimate):
    return estimate.classical.to_dict()["bits"], estimate.quantum.to_dict()["bits"]


@pytest.mark.parametrize(
    ("name", "classical", "quantum"),
    [
        ("AES-256", 256, 128),
        ("ChaCha20", 256, 128),
        ("shake256, uniform 512-bit seed", 256, 256),
        ("sha3-512-counter, uniform 512-bit seed", 512, 256),
        ("XOR of two ciphers with 256-bit keys", 256, 170),
        ("X25519", 125, 0),
        ("Ed25519", 125, 0),
        # The cheapest of the attacks, here the dual one; the primal one is what the submissions publish.
        ("ML-KEM-768", 181, 164),
        ("ML-KEM-1024", 253, 230),
        ("X25519 + ML-KEM-768", 181, 164),
        ("X25519 + ML-KEM-1024", 253, 230),
        ("ML-DSA-65", 176, 159),
        ("ML-DSA-87", 251, 228),
        ("Ed25519 + ML-DSA-65", 176, 159),
        ("Ed25519 + ML-DSA-87", 251, 228),
    ],
)
def test_the_table_says(name, classical, quantum):
    (found,) = [estimate for estimate in estimates() if estimate.primitive == name]
    assert figures(found) == (classical, quantum)


def test_every_figure_of_the_table_comes_with_all_that_belongs_to_it():
    table = json.loads(json.dumps([estimate.to_dict() for estimate in estimates()]))
    assert len({row["primitive"] for row in table}) == len(table) == 15
    for row in table:
        for figure in (row["classical"], row["quantum"], *row["quantum_within_depth"].values()):
            assert all(figure[name] for name in ("unit", "formula", "source", "assumptions"))


def test_claws_make_two_ciphers_weaker_than_their_keys_together():
    both = xor_of_two_ciphers().quantum
    assert aes_256().quantum < both
    assert both.reaches(170.6)
    assert not both.reaches(170.7)
    assert any("quantum memory" in text for text in both.assumptions)


def test_a_limit_on_depth_makes_search_dearer():
    for estimate in (aes_256(), chacha20()):
        assert tuple(depth for depth, _ in estimate.quantum_within_depth) == MAX_DEPTHS
        costs = [bits.to_dict()["bits"] for _, bits in estimate.quantum_within_depth]
        # log2(π²/16 · 2^256 / 2^D): 215.3, 191.3, 159.3; NIST's gate counts 245, 221, 189 are above.
        assert costs == [215, 191, 159]
        assert all(cost > 128 for cost in costs)


def test_a_depth_that_does_not_limit_costs_nothing():
    # A 64-bit key needs 2^32 evaluations in a row: every depth allows that.
    found = cipher("small", key_bits=64)
    assert all(bits.to_dict()["bits"] == 32 for _, bits in found.quantum_within_depth)


def test_the_sponges_capacity_limits_a_long_seed():
    assert figures(sponge("shake256", seed_bits=4096)) == (256, 256)
    assert figures(sponge("shake256", seed_bits=128)) == (128, 64)


def test_shors_resources_are_those_of_the_paper():
    # Roetteler et al. 2017, table 2: 2330 qubits and 1.26·10^11 Toffoli gates at n = 256; n is 255 here.
    formula = x25519().quantum.formula
    assert "2321 logical qubits" in formula
    exponent = float(formula.split("2^")[1].split(" ")[0])
    assert 1.2e11 < 2**exponent < 1.35e11
    assert math.isclose(9 * 256 + 2 * 8 + 10, 2330)


def test_the_lattices_figure_is_the_cheapest_attack():
    for name in ("ML-KEM-768", "ML-DSA-65"):
        found = attacks(name)
        assert found[0].name == "primal"
        classical, quantum = figures(lattice(name))
        assert classical == math.floor(min(attack.classical_bits for attack in found))
        assert quantum == math.floor(min(attack.quantum_bits for attack in found))


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: sponge("md5", seed_bits=512),
        lambda: sponge("shake256", seed_bits=0),
        lambda: lattice("ML-KEM-512"),
        lambda: attacks("RSA"),
        lambda: cipher("none", key_bits=0),
        lambda: xor_of_two_ciphers(key_bits=-1),
    ],
)
def test_unknown_primitives_are_refused(attempt):
    with pytest.raises(InvalidInputError):
        attempt()
