"""The device functions against published vectors and against the CPU generators, bit for bit."""

import struct

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dp_flash_attention.noise import TestKey
from dp_flash_attention.noise.fast import PhiloxKeystream
from dp_flash_attention.noise.kernels.words import chacha20_block, philox4x64_block, unit_words
from dp_flash_attention.noise.keystream import MAX_STEP, MAX_STREAM, Domain, new_buffer
from dp_flash_attention.noise.secure import CipherKeystream

KEY = TestKey("kernel words")
KEYSTREAMS = {
    "chacha20": CipherKeystream(KEY, "chacha20"),
    "philox4x64": PhiloxKeystream(KEY),
}
UNITS = 4
# The last unit that 2^44 numbers of 8 bytes reach is 2^41; block counters pass 2^32 on the way.
FIRST_UNITS = [0, 5, 2**32 - 2, 2**41 - UNITS]


@triton.jit
def load_key(words):
    return (
        tl.load(words),
        tl.load(words + 1),
        tl.load(words + 2),
        tl.load(words + 3),
        tl.load(words + 4),
        tl.load(words + 5),
        tl.load(words + 6),
        tl.load(words + 7),
    )


@triton.jit
def chacha_kernel(out, words, c12, c13, c14, c15):
    counter = tl.zeros([1], tl.uint32) + c12.to(tl.uint32)
    block = chacha20_block(load_key(words), counter, c13.to(tl.uint32), c14.to(tl.uint32), c15.to(tl.uint32))
    for k in tl.static_range(16):
        tl.store(out + k + tl.arange(0, 1), block[k])


@triton.jit
def philox_kernel(out, words):
    c0 = tl.load(words + tl.arange(0, 1))
    block = philox4x64_block(
        c0, tl.load(words + 1), tl.load(words + 2), tl.load(words + 3), tl.load(words + 4), tl.load(words + 5)
    )
    for k in tl.static_range(4):
        tl.store(out + k + tl.arange(0, 1), block[k])


@triton.jit
def units_kernel(
    out, words, first, stream, step, DOMAIN: tl.constexpr, CIPHER: tl.constexpr, UNITS: tl.constexpr
):
    lane = tl.arange(0, UNITS)
    unit = lane.to(tl.uint64) + first.to(tl.uint64)
    got = unit_words(load_key(words), unit, stream.to(tl.uint32), step.to(tl.uint64), DOMAIN, CIPHER)
    tl.store(out + lane[:, None] * 16 + tl.arange(0, 16)[None, :], tl.reshape(got, [UNITS, 16]))


def uint32(words):
    return torch.from_numpy(np.array(words, dtype=np.uint32))


def from_kernel(cipher, first, *, step, stream, domain):
    key = KEYSTREAMS[cipher].kernel_key(step)
    out = torch.from_numpy(np.full(16 * UNITS, 0xDEADBEEF, dtype=np.uint32))
    units_kernel[(1,)](out, uint32(key.words), first, stream, key.step, int(domain), key.cipher, UNITS)
    return out.numpy()


def from_cpu(cipher, first, *, step, stream, domain):
    source = KEYSTREAMS[cipher].at(step=step, stream=stream)
    size = 64 * UNITS
    read = source.read(size, domain=domain, block=64 * first // source.block_bytes, buffer=new_buffer(size))
    return read.view("<u4")


def test_chacha20_block_is_that_of_rfc_8439_section_2_3_2():
    key = struct.unpack("<8I", bytes(range(32)))
    nonce = struct.unpack("<3I", bytes.fromhex("000000090000004a00000000"))
    out = uint32(np.zeros(16))
    chacha_kernel[(1,)](out, uint32(key), 1, *nonce)
    assert out.numpy().tobytes().hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        # Random123 1.14, tests/kat_vectors, philox4x64 with 10 rounds.
        ((0,) * 4, (0,) * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        (
            (2**64 - 1,) * 4,
            (2**64 - 1,) * 2,
            "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
        ),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_philox_block_is_the_published_one(counter, key, block):
    out = torch.from_numpy(np.zeros(4, dtype=np.uint64))
    philox_kernel[(1,)](out, torch.from_numpy(np.array([*counter, *key], dtype=np.uint64)))
    assert out.numpy().tolist() == [int(word, 16) for word in block.split()]


@pytest.mark.parametrize("cipher", KEYSTREAMS)
@pytest.mark.parametrize("first", FIRST_UNITS)
@pytest.mark.parametrize(("step", "stream"), [(0, 0), (7, 3), (MAX_STEP, MAX_STREAM)])
def test_the_words_are_those_of_the_cpu_generator(cipher, first, step, stream):
    for domain in (Domain.FLOAT32, Domain.FLOAT32_REFINEMENT):
        where = {"step": step, "stream": stream, "domain": domain}
        assert np.array_equal(from_kernel(cipher, first, **where), from_cpu(cipher, first, **where))


@pytest.mark.parametrize("cipher", KEYSTREAMS)
def test_the_comparison_sees_a_wrong_counter_domain_stream_step_and_key(cipher):
    where = {"step": 1, "stream": 2, "domain": Domain.FLOAT32}
    right = from_cpu(cipher, 2**32, **where)
    assert np.array_equal(from_kernel(cipher, 2**32, **where), right)
    for first, other in (
        (0, {}),  # the upper half of the counter forgotten
        (2**32, {"step": 2}),
        (2**32, {"stream": 1}),
        (2**32, {"domain": Domain.FLOAT64}),
    ):
        assert not np.array_equal(from_kernel(cipher, first, **{**where, **other}), right)


def test_a_cipher_without_a_device_function_does_not_run():
    key, out = uint32(range(8)), uint32(np.zeros(16 * UNITS))
    with pytest.raises(Exception, match=r"(?i)assert"):
        units_kernel[(1,)](out, key, 0, 0, 0, 1, "aes-256-ctr", UNITS)
