"""A keyed hash of several fields: SHAKE256 with its key in a block of its own.

    SHAKE256( padded(len ‖ domain ‖ len ‖ key) ‖ len ‖ field₁ ‖ len ‖ field₂ ‖ … ‖ number of fields ‖ output bits )

padded() fills a whole number of the sponge's 136-byte blocks, as KMAC256 does (NIST SP 800-185, section 4), so
the key is absorbed before any input. Lengths are 8 bytes big-endian, so different fields never share an input.
It is no KMAC256 (``hashlib`` has no cSHAKE, whose domain bits differ), and has the same proof: a sponge keyed by a
prefix is a pseudo-random function up to its capacity of 512 bits (Bertoni, Daemen, Peeters & Van Assche 2011).
"""

from __future__ import annotations

import hashlib

_BLOCK_BYTES = 136


def keyed_shake256(key: bytes, *fields: bytes, domain: bytes, num_bytes: int) -> bytes:
    """Returns ``num_bytes`` pseudo-random bytes of the fields.

    Args:
        key: Secret; its length is part of the input.
        fields: What is hashed, each with its length.
        domain: What the bytes are for; different domains are independent functions.
        num_bytes: Part of the input as well, so a shorter result is no prefix of a longer one.
    """
    prefix = _framed(domain) + _framed(key)
    state = hashlib.shake_256(prefix + bytes(-len(prefix) % _BLOCK_BYTES))
    for field in fields:
        state.update(_framed(field))
    state.update(len(fields).to_bytes(8, "big") + (8 * num_bytes).to_bytes(8, "big"))
    return state.digest(num_bytes)


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "big") + part
