"""Secret coins: exact probability, one coin an index, whatever the others are."""

import hashlib
import struct
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import SecureBits, TestKey

KEY = TestKey("bits")
BITS_DOMAIN = 4


def test_words_are_the_cipher_stream():
    key = hashlib.blake2b(
        struct.pack("<Q", 9),
        key=KEY.derive("noise.keystream.aes-256-ctr").export(),
        digest_size=32,
        person=b"dpfa.step.v1",
    ).digest()
    counter = struct.pack(">IIQ", BITS_DOMAIN, 3, 0)
    stream = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(8 * 100_000))
    expected = np.frombuffer(stream, dtype="<u8")
    assert np.array_equal(SecureBits(KEY).uint64(100_000, step=9, stream=3), expected)
    assert np.array_equal(SecureBits(KEY).uint64(77, step=9, stream=3), expected[:77])


def test_a_coin_depends_on_its_index_and_step_alone():
    bits = SecureBits(KEY)
    many = bits.bernoulli_indices(200_000, 0.3, step=4)
    few = bits.bernoulli_indices(70_001, 0.3, step=4)
    assert np.array_equal(few, many[many < 70_001])
    assert not np.array_equal(bits.bernoulli_indices(70_001, 0.3, step=5), few)
    assert not np.array_equal(bits.bernoulli_indices(70_001, 0.3, step=4, stream=1), few)
    # A larger probability keeps everyone that a smaller one took.
    assert set(few) < set(bits.bernoulli_indices(70_001, 0.5, step=4))


def test_everyone_takes_part_with_probability_one():
    assert len(SecureBits(KEY).bernoulli_indices(1000, 1.0, step=0)) == 1000
    assert len(SecureBits(KEY).bernoulli_indices(0, 0.5, step=0)) == 0


@pytest.mark.parametrize("prob", [0.02781, 0.5, 0.9])
def test_the_share_is_right_and_another_would_be_seen(prob):
    n = 400_000
    count = len(SecureBits(KEY).bernoulli_indices(n, prob, step=1))
    deviation = (n * prob * (1 - prob)) ** 0.5
    assert abs(count - n * prob) < 5 * deviation  # false alarm below 1e-6; the key is fixed
    assert abs(count - n * prob * 1.1) > 5 * deviation


def test_the_threshold_is_rounded_down():
    from dp_flash_attention.noise import bits

    words = np.array([0, 2**62 - 1, 2**62, 2**64 - 1], dtype=np.uint64)

    class Fixed(SecureBits):
        def __init__(self):
            pass

        def _chunks(self, *_):
            yield 0, words

    assert Fixed().bernoulli_indices(4, 0.25, step=0).tolist() == [0, 1]
    assert Fraction(bits.math.floor(Fraction(0.1) * 2**64), 2**64) <= Fraction(0.1)


@pytest.mark.parametrize("prob", [0.0, -0.1, 1.1, float("nan"), None, "a"])
def test_what_is_no_probability_is_refused(prob):
    with pytest.raises(InvalidInputError, match="prob"):
        SecureBits(KEY).bernoulli_indices(10, prob, step=0)


@pytest.mark.parametrize(("n", "step"), [(-1, 0), (1.5, 0), (10, -1), (10, 2**63), (2**60, 0)])
def test_numbers_out_of_range_are_refused(n, step):
    with pytest.raises(InvalidInputError):
        SecureBits(KEY).uint64(n, step=step)
