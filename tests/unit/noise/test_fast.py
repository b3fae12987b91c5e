"""Philox against Random123's published vectors and NumPy's generator."""

import struct

import numpy as np
import pytest

from dp_flash_attention.noise import TestKey
from dp_flash_attention.noise.fast import PhiloxKeystream, philox4x64_block
from dp_flash_attention.noise.keystream import MAX_STEP, MAX_STREAM, Domain, new_buffer

ONES = 2**64 - 1


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        # Random123 1.14, tests/kat_vectors, philox4x64 with 10 rounds.
        ((0,) * 4, (0,) * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ((ONES,) * 4, (ONES,) * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_published_vectors(counter, key, block):
    assert philox4x64_block(counter, key) == tuple(int(word, 16) for word in block.split())


def test_the_stream_is_the_documented_counter():
    key = TestKey("philox")
    words = struct.unpack("<QQ", key.derive("noise.keystream.philox4x64").export()[:16])
    for step, stream, block in ((0, 0, 0), (7, 3, 5), (MAX_STEP, MAX_STREAM, 2**40)):
        source = PhiloxKeystream(key).at(step=step, stream=stream)
        read = source.read(64, domain=Domain.FLOAT32, block=block, buffer=new_buffer(64)).view("<u8")
        expected = [
            word
            for b in (block, block + 1)
            for word in philox4x64_block((b + 1, (int(Domain.FLOAT32) << 32) | stream, step, 0), words)
        ]
        assert read.tolist() == expected
        singles = source.words32_at(np.arange(8 * block, 8 * block + 16), domain=Domain.FLOAT32)
        assert np.array_equal(singles, read.view("<u4"))
