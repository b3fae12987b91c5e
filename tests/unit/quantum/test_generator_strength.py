import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import SecretKey, TestKey, WideSecretKey
from dp_flash_attention.quantum import primitive_costs
from dp_flash_attention.quantum.generator_strength import (
    generator_advantage,
    key_bits,
    quantum_security_bits,
    searched_bits,
    secret_bits,
    strength_assumptions,
    suitable_cipher,
)


def test_the_figure_is_half_of_the_weakest_part():
    assert quantum_security_bits(256, "aes-256-ctr") == 128
    assert quantum_security_bits(512, "aes-256-ctr") == 128  # the cipher's key is the weakest part
    assert quantum_security_bits(512, "shake256") == 256
    assert quantum_security_bits(2048, "shake256") == 256  # and here the capacity
    assert quantum_security_bits(256, "shake256") == 128


def test_a_test_key_is_worth_nothing_and_says_so():
    assert secret_bits(TestKey("x")) == 0
    assert key_bits(TestKey("x")) == 256
    assert secret_bits(SecretKey.from_os()) == 256
    assert "NOTHING" in strength_assumptions(0, "aes-256-ctr")[0]
    assert quantum_security_bits(0, "shake256") == 0


def test_bits_that_are_the_callers_word_are_listed_as_assumed():
    lines = strength_assumptions(512, "shake256", vouched=("256 bits, from source 'token'", "more"))
    assert lines[:-2] == strength_assumptions(512, "shake256")
    assert lines[-2:] == (
        "assumed, on the caller's word: 256 bits, from source 'token'.",
        "assumed, on the caller's word: more.",
    )


def test_a_wide_key_is_worth_what_its_sources_gave_and_never_its_length():
    for entropy in (256, 400, 512):
        key = WideSecretKey.from_bytes(bytes(range(64)), entropy_bits=entropy)
        assert secret_bits(key) == searched_bits(key) == entropy
        assert quantum_security_bits(secret_bits(key), suitable_cipher(key, None)) == entropy // 2
    assert suitable_cipher(SecretKey.from_os(), None) == "aes-256-ctr"
    for cipher in ("aes-256-ctr", "chacha20"):  # it would use half of the key
        with pytest.raises(InvalidInputError, match="shake256"):
            suitable_cipher(key, cipher)


def test_the_advantage_is_key_search_and_for_aes_the_missing_repeats():
    key_search = 4 * 2.0**-128
    assert generator_advantage(1, 256, "chacha20") == key_search
    assert generator_advantage(1, 512, "shake256") == 4 * 2.0**-384
    blocks = (10**7 // 8192 + 1) * 50 * 9408
    assert generator_advantage(10**7, 256, "aes-256-ctr") == pytest.approx(key_search + blocks**2 * 2.0**-129)


def test_there_is_one_computation_of_the_strength(monkeypatch):
    """What the releases report and what δ takes follow the estimate, whatever it says."""
    monkeypatch.setitem(primitive_costs._CAPACITIES, "shake256", 192)
    assert quantum_security_bits(512, "shake256") == 96
    assert "2^96 calls" in strength_assumptions(512, "shake256")[0]
    assert generator_advantage(1, 512, "shake256") == 4 * 2.0 ** (128 - 192)
    monkeypatch.setattr(primitive_costs, "aes_256", lambda: primitive_costs.cipher("AES-256", key_bits=140))
    assert quantum_security_bits(256, "aes-256-ctr") == 70
    assert generator_advantage(1, 256, "aes-256-ctr") == pytest.approx(4 * 2.0 ** (128 - 140))


@pytest.mark.parametrize("bits", [256, 301, 512, 700])
def test_an_odd_number_of_bits_is_rounded_down_in_the_figure_and_not_in_the_advantage(bits):
    assert quantum_security_bits(bits, "shake256") == min(bits, 512) // 2
    assert generator_advantage(1, bits, "shake256") == pytest.approx(4 * 2.0 ** (128 - min(bits, 512)))


def test_a_key_without_entropy_gives_everything_away():
    assert generator_advantage(1, 0, "shake256") == 1.0
    assert quantum_security_bits(0, "aes-256-ctr") == 0
