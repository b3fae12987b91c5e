"""SHAKE256's stream against another library by the documented layout, and a published answer."""

import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.hashes import SHAKE256, Hash
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.noise import SecretKey, TestKey, WideSecretKey
from dp_flash_attention.noise.keystream import MAX_STEP, MAX_STREAM, Domain, new_buffer
from dp_flash_attention.noise.shake import ShakeKeystream

WIDE = WideSecretKey(bytes(range(64)), entropy_bits=512)


def shake256(message, num_bytes):
    digest = Hash(SHAKE256(num_bytes))
    digest.update(message)
    return digest.finalize()


def reference(key, num_bytes, *, step, stream, domain, block):
    secret = key.derive("noise.keystream.shake256").export()
    prefix = b"dpfa.shake.v1" + bytes([len(secret)]) + secret + struct.pack("<Q", step)
    blocks = [
        shake256(prefix + struct.pack("<IIQ", domain, stream, block + i), 1024)
        for i in range(num_bytes // 1024)
    ]
    return b"".join(blocks)


def test_the_function_behind_it_is_the_standard_one():
    # NIST, FIPS 202 example values: SHAKE256 of the empty message.
    assert shake256(b"", 32).hex() == "46b9dd2b0ba88d13233b3feb743eeb243fcd52ea62b81b82b50c27646ed5762f"


@pytest.mark.parametrize("key", [TestKey("shake"), WIDE], ids=["256 bits", "512 bits"])
@given(
    step=st.integers(0, MAX_STEP),
    stream=st.integers(0, MAX_STREAM),
    domain=st.sampled_from(Domain),
    block=st.integers(0, 2**44),
    blocks=st.integers(1, 3),
)
def test_bytes_follow_the_layout(key, step, stream, domain, block, blocks):
    source = ShakeKeystream(key).at(step=step, stream=stream)
    size = 1024 * blocks
    found = bytes(source.read(size, domain=domain, block=block, buffer=new_buffer(size)))
    assert found == reference(key, size, step=step, stream=stream, domain=domain, block=block)


def test_single_words_are_those_of_the_stream():
    source = ShakeKeystream(WIDE).at(step=1, stream=2)
    whole = source.read(4096, domain=Domain.BITS, block=0, buffer=new_buffer(4096)).view("<u4")
    indices = np.array([0, 1, 255, 256, 1023])
    assert np.array_equal(source.words32_at(indices, domain=Domain.BITS), whole[indices])


def test_positions_and_keys_share_no_block():
    keys = (TestKey("a"), TestKey("b"), SecretKey(bytes(32)), WIDE)
    seen = {
        bytes(ShakeKeystream(key).at(step=step, stream=stream).read(
            1024, domain=domain, block=block, buffer=new_buffer(1024)))
        for key in keys
        for step in (0, MAX_STEP)
        for stream in (0, MAX_STREAM)
        for domain in Domain
        for block in (0, 1, 2**40)
    }  # fmt: skip
    assert len(seen) == len(keys) * 2 * 2 * len(Domain) * 3
