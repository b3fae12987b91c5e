import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import SecretKey, TestKey, WideSecretKey
from dp_flash_attention.quantum import security_estimate
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


@pytest.mark.parametrize(
    ("cipher", "bits"), [("aes-256-ctr", 256), ("chacha20", 256), ("shake256", 256), ("shake256", 512)]
)
def test_the_strength_is_that_of_the_security_estimate(cipher, bits):
    pool = security_estimate.operating_system_pool()
    other = security_estimate.EntropySource(name="other", bits=256, assumption="it is another source")
    sources = [pool] if bits == 256 else [pool, other]
    estimate = security_estimate.noise_security(cipher, seed_bits=bits, sources=sources)
    assert quantum_security_bits(bits, cipher) == estimate.quantum.to_dict()["bits"]
