"""Checks of the key-streams: published answers, our layouts by other means, and that no position repeats."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from dp_flash_attention.noise import NoiseKey, TestKey
from dp_flash_attention.noise.fast import PhiloxKeystream, philox4x64_block
from dp_flash_attention.noise.keystream import (
    MAX_STEP,
    MAX_STREAM,
    Domain,
    Keystream,
    new_buffer,
)
from dp_flash_attention.noise.secure import CipherKeystream
from dp_flash_attention.noise.shake import ShakeKeystream
from dp_flash_attention.quantum.evidence import Evidence, NamedCheck

# Shortest read that is a whole number of every stream's blocks.
_UNIT: Final = 1024
_ONES: Final = 2**64 - 1
# Random123 1.14, tests/kat_vectors, philox4x64 with 10 rounds.
_PHILOX: Final = (
    ((0,) * 4, (0,) * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ((_ONES,) * 4, (_ONES,) * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
)

MakeKeystream = Callable[[NoiseKey], Keystream]


def keystreams() -> dict[str, MakeKeystream]:
    """Returns every key-stream that noise is made of, by name."""
    return {
        "AES-256-CTR": lambda key: CipherKeystream(key, "aes-256-ctr"),
        "ChaCha20": lambda key: CipherKeystream(key, "chacha20"),
        "SHAKE256": ShakeKeystream,
        "Philox4x64-10": PhiloxKeystream,
    }


def ciphers_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Whether to look at more positions.
    """
    steps = [0, 1, 2, 2**32, MAX_STEP] + (list(range(3, 60)) if deep else [])
    positions = [
        (f"positions of {name}", partial(unique_positions, name, make, steps))
        for name, make in keystreams().items()
    ]
    return [("known answers", known_answers), ("ChaCha20 by its definition", chacha20_layout), *positions]


def known_answers() -> Iterator[Evidence]:
    """Yields whether each primitive gives the answer that its standard prints."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    aes = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(16)).hex()
    yield _answer("AES-256-CTR", "NIST SP 800-38A, F.5.5", aes, "0bdf7df1591716335e9a8b15c860c502")

    nonce = bytes.fromhex("01000000000000090000004a00000000")
    chacha = (
        Cipher(algorithms.ChaCha20(bytes(range(32)), nonce), mode=None).encryptor().update(bytes(64)).hex()
    )
    published = (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    yield _answer("ChaCha20", "RFC 8439, 2.3.2", chacha, published)

    empty = hashlib.shake_256(b"").hexdigest(32)
    published = "46b9dd2b0ba88d13233b3feb743eeb243fcd52ea62b81b82b50c27646ed5762f"
    yield _answer("SHAKE256", "NIST, FIPS 202 example values", empty, published)

    for philox_counter, philox_key, expected in _PHILOX:
        block = " ".join(f"{word:016x}" for word in philox4x64_block(philox_counter, philox_key))
        yield _answer("Philox4x64-10", "Random123, kat_vectors", block, expected)


def _answer(name: str, source: str, found: str, expected: str) -> Evidence:
    return Evidence(
        name=f"{name}, {source}",
        claim="The primitive gives the published answer.",
        measured=f"{found[:16]}…" if found == expected else found,
        bound=f"{expected[:16]}…, all of it",
        holds=found == expected,
        basis="computed",
    )


def chacha20_layout() -> Iterator[Evidence]:
    """Yields whether our ChaCha20 stream is RFC 8439's block function, written again here, at our layout's words."""
    key = TestKey("layout")
    subkey = key.derive("noise.keystream.chacha20").export()
    good = 0
    cases = [
        (step, stream, block) for step in (0, 7, MAX_STEP) for stream in (0, 5) for block in (0, 1, 2**32 + 3)
    ]
    for step, stream, block in cases:
        step_key = hashlib.blake2b(
            struct.pack("<Q", step), key=subkey, digest_size=32, person=b"dpfa.step.v1"
        ).digest()
        state = (block % 2**32, int(Domain.FLOAT32), stream, block >> 32)
        source = CipherKeystream(key, "chacha20").at(step=step, stream=stream)
        found = source.read(64, domain=Domain.FLOAT32, block=block, buffer=new_buffer(64))
        good += bytes(found) == chacha20_block(step_key, state)
    yield Evidence(
        name="ChaCha20 stream at 18 positions",
        claim="The stream is the block function of RFC 8439 at the documented counter words.",
        measured=f"{good} of {len(cases)} blocks equal",
        bound="all",
        holds=good == len(cases),
        basis="computed",
    )


def chacha20_block(key: bytes, words: tuple[int, int, int, int]) -> bytes:
    """Returns one block by RFC 8439, section 2.3, in plain integers; ``words`` are the state's last four."""
    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), *words]
    state = list(start)
    columns = [(i, i + 4, i + 8, i + 12) for i in range(4)]
    diagonals = [(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12) for i in range(4)]
    for _ in range(10):
        for a, b, c, d in columns + diagonals:
            for first, second, third, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                state[first] = (state[first] + state[second]) % 2**32
                mixed = state[third] ^ state[first]
                state[third] = (mixed << turn | mixed >> (32 - turn)) % 2**32
    return struct.pack("<16I", *((x + y) % 2**32 for x, y in zip(state, start, strict=True)))


def unique_positions(name: str, make: MakeKeystream, steps: Sequence[int]) -> Iterator[Evidence]:
    """Yields whether blocks at different positions differ, and the same position gives the same block."""
    seen: set[bytes] = set()
    blocks = repeated = 0
    for key in (TestKey("positions, a"), TestKey("positions, b")):
        for step in steps:
            for stream in (0, 1, 2**16, MAX_STREAM):
                source = make(key).at(step=step, stream=stream)
                for domain in Domain:
                    # Neighbours, and blocks whose number wraps round in 32 bits.
                    for unit in (0, 1, 2**32, 2**40):
                        first = unit * _UNIT // source.block_bytes
                        read = source.read(
                            _UNIT, domain=domain, block=first, buffer=new_buffer(_UNIT)
                        ).tobytes()
                        again = source.read(_UNIT, domain=domain, block=first, buffer=new_buffer(_UNIT))
                        repeated += read == again.tobytes()
                        seen.update(read[i : i + 16] for i in range(0, _UNIT, 16))
                        blocks += 1
    pieces = blocks * _UNIT // 16
    yield Evidence(
        name=f"{name}: no position repeats",
        claim="Different (key, step, stream, domain, block) never share 16 bytes.",
        measured=f"{len(seen):,} different pieces among {pieces:,}",
        bound="all different (false alarm below 2^-90)",
        holds=len(seen) == pieces,
    )
    yield Evidence(
        name=f"{name}: a position answers the same",
        claim="Asked again, a position gives the same bytes.",
        measured=f"{repeated:,} of {blocks:,} reads repeated",
        bound="all",
        holds=repeated == blocks,
        basis="computed",
    )
