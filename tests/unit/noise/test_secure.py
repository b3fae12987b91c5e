"""The cipher streams against the ciphers themselves, called directly by the documented layout."""

import hashlib
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise import SecretKey, SecureNormalGenerator, TestKey, secure
from dp_flash_attention.noise.keystream import MAX_STEP, MAX_STREAM, Domain, new_buffer
from dp_flash_attention.noise.secure import CipherKeystream

KEY = TestKey("streams")
CIPHERS = ("aes-256-ctr", "chacha20")


def step_key(cipher, step):
    generator_key = KEY.derive(f"noise.keystream.{cipher}").export()
    return hashlib.blake2b(
        struct.pack("<Q", step), key=generator_key, digest_size=32, person=b"dpfa.step.v1"
    ).digest()


def reference(cipher, num_bytes, *, step, stream, domain, block):
    """The bytes by the layout in the module's docstring, one cipher call."""
    key = step_key(cipher, step)
    if cipher == "aes-256-ctr":
        context = Cipher(algorithms.AES(key), modes.CTR(struct.pack(">IIQ", domain, stream, block)))
    else:
        nonce = struct.pack("<IIII", block % 2**32, domain, stream, block // 2**32)
        context = Cipher(algorithms.ChaCha20(key, nonce), mode=None)
    return context.encryptor().update(bytes(num_bytes))


def read(cipher, num_bytes, *, step, stream, domain, block):
    source = CipherKeystream(KEY, cipher).at(step=step, stream=stream)
    return bytes(source.read(num_bytes, domain=domain, block=block, buffer=new_buffer(num_bytes)))


def test_the_cipher_behind_it_is_the_standard_one():
    # NIST SP 800-38A, F.5.5: CTR-AES256.Encrypt, first block of key stream.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    stream = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(16))
    assert stream.hex() == "0bdf7df1591716335e9a8b15c860c502"


@pytest.mark.parametrize("cipher", CIPHERS)
@given(
    step=st.integers(0, MAX_STEP),
    stream=st.integers(0, MAX_STREAM),
    domain=st.sampled_from(Domain),
    block=st.integers(0, 2**44),
    blocks=st.integers(1, 9),
)
def test_bytes_follow_the_layout(cipher, step, stream, domain, block, blocks):
    where = {"step": step, "stream": stream, "domain": domain, "block": block}
    size = 64 * blocks
    if cipher == "chacha20" and block % 2**32 + blocks > 2**32:
        return  # crosses the end of a nonce's stream; the next test looks at that
    assert read(cipher, size, **where) == reference(cipher, size, **where)


def test_chacha_goes_on_with_the_next_nonce_after_2_to_the_32_blocks():
    where = {"step": 3, "stream": 5, "domain": Domain.FLOAT32}
    before = reference("chacha20", 128, block=2**32 - 2, **where)
    after = reference("chacha20", 64, block=2**32, **where)
    assert read("chacha20", 192, block=2**32 - 2, **where) == before + after


@pytest.mark.parametrize("cipher", CIPHERS)
def test_single_words_are_those_of_the_stream(cipher):
    source = CipherKeystream(KEY, cipher).at(step=1, stream=2)
    whole = source.read(4096, domain=Domain.FLOAT32_REFINEMENT, block=0, buffer=new_buffer(4096)).view("<u4")
    indices = np.array([0, 1, 3, 4, 15, 16, 17, 500, 1023])
    assert np.array_equal(source.words32_at(indices, domain=Domain.FLOAT32_REFINEMENT), whole[indices])


@pytest.mark.parametrize("cipher", CIPHERS)
def test_neighbouring_positions_share_no_block(cipher):
    size = CipherKeystream(KEY, cipher).at(step=0, stream=0).block_bytes
    seen = set()
    positions = 0
    for step in (0, 1, 2**32, MAX_STEP):
        for stream in (0, 1, 2**16, MAX_STREAM):
            for domain in Domain:
                for block in (0, 1, 2**32 - 1, 2**32, 2**40):
                    seen.add(
                        read(cipher, max(size, 16), step=step, stream=stream, domain=domain, block=block)[:16]
                    )
                    positions += 1
    assert len(seen) == positions


def test_keys_and_ciphers_give_streams_of_their_own():
    streams = {
        bytes(CipherKeystream(key, cipher).at(step=0, stream=0).read(
            64, domain=Domain.BITS, block=0, buffer=new_buffer(64)))
        for key in (TestKey("a"), TestKey("b"), SecretKey(bytes(32)))
        for cipher in CIPHERS
    }  # fmt: skip
    assert len(streams) == 6


def test_an_unknown_cipher_and_a_missing_package_are_errors(monkeypatch):
    with pytest.raises(InvalidInputError, match="aes-256-ctr"):
        SecureNormalGenerator(KEY, cipher="rot13")
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(NoiseUnavailableError, match="pip install"):
        SecureNormalGenerator(KEY)


def test_a_cipher_that_the_library_forbids_fails_when_the_generator_is_built(monkeypatch):
    def forbidden(*args):
        raise ValueError("disabled in FIPS mode")

    context, algorithms_, modes_ = secure._import_ciphers()
    monkeypatch.setattr(secure, "_import_ciphers", lambda: (forbidden, algorithms_, modes_))
    with pytest.raises(NoiseUnavailableError, match="disabled in FIPS mode"):
        SecureNormalGenerator(KEY)
    assert context is not forbidden


def test_a_destroyed_key_builds_no_generator():
    key = SecretKey.from_os()
    key.destroy()
    with pytest.raises(NoiseUnavailableError):
        SecureNormalGenerator(key)
