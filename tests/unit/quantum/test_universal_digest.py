"""Digests tell vectors apart, depend on everything they should, and the tags obey GHASH's own arithmetic."""

import numpy as np
import pytest

from dp_flash_attention.quantum import universal_digest as module
from dp_flash_attention.quantum.universal_digest import MAX_PIECE, UniversalDigest

SECRET = bytes(range(32))


def digest(pieces, secret=SECRET, label=b"label", domain=b"test"):
    made = UniversalDigest(secret, label, domain=domain)
    for start, piece in pieces:
        made.absorb(start, piece)
    return made.digest(64)


def test_any_changed_number_any_place_and_any_key_change_it(rng):
    values = rng.integers(-(2**52), 2**52, 5000).astype(np.float64)
    cut = [(0, values[:3000]), (3000, values[3000:])]
    found = {digest(cut)}
    for place in (0, 1, 2999, 3000, 4999):
        changed = values.copy()
        changed[place] += 1
        found.add(digest([(0, changed[:3000]), (3000, changed[3000:])]))
    found.add(digest([(0, values[:3000]), (3001, values[3000:])]))
    found.add(digest([(0, values[:3000])]))
    found.add(digest(cut, secret=bytes(32)))
    found.add(digest(cut, label=b"other"))
    found.add(digest(cut, domain=b"other"))
    assert len(found) == 11
    assert digest(cut[::-1]) == digest(cut)


def _times(x, y):
    """Multiplication in GCM's field (NIST SP 800-38D, algorithm 1)."""
    z, v = 0, y
    for i in range(127, -1, -1):
        if x >> i & 1:
            z ^= v
        v = v >> 1 ^ (0xE1 << 120 if v & 1 else 0)
    return z


def test_the_difference_of_two_tags_is_the_polynomial_of_the_difference(rng):
    """The theorem's premise, by schoolbook arithmetic: the constant cancels, a polynomial in H = AES(0) is left."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes(range(32))
    h = int.from_bytes(Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(bytes(16)), "big")
    cipher = Cipher(algorithms.AES(key), modes.GCM(bytes(12)))
    one, other = (rng.integers(0, 2**60, 6).astype("<i8").tobytes() for _ in range(2))
    tags = [int.from_bytes(module._tag(cipher, memoryview(data)), "big") for data in (one, other)]
    difference = 0
    for block in range(0, 48, 16):
        blocks = [int.from_bytes(data[block : block + 16], "big") for data in (one, other)]
        difference = _times(difference ^ blocks[0] ^ blocks[1], h)
    # The block of lengths is the same on both sides and only multiplies what came before.
    assert tags[0] ^ tags[1] == _times(difference, h)


def test_a_digest_that_skips_a_number_is_noticed(monkeypatch, rng):
    values = rng.normal(size=100)
    changed = values.copy()
    changed[-1] += 1
    assert digest([(0, values)]) != digest([(0, changed)])
    tag = module._tag
    monkeypatch.setattr(module, "_tag", lambda cipher, data: tag(cipher, data[:-8]))
    assert digest([(0, values)]) == digest([(0, changed)])


def test_pieces_are_bounded_and_taken_once():
    made = UniversalDigest(SECRET, b"label", domain=b"test")
    made.absorb(0, np.zeros(MAX_PIECE))
    with pytest.raises(AssertionError, match="once"):
        made.absorb(0, np.zeros(1))
    with pytest.raises(AssertionError, match="bound"):
        made.absorb(MAX_PIECE, np.zeros(MAX_PIECE + 1))
