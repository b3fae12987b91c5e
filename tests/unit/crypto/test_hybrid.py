"""The hybrid KEM: its combiner from the definition, with the other half from an independent implementation."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kyber_py.ml_kem import ML_KEM_768, ML_KEM_1024

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto import x25519_ml_kem_768, x25519_ml_kem_1024

SCHEMES = [(x25519_ml_kem_768, ML_KEM_768), (x25519_ml_kem_1024, ML_KEM_1024)]
both = pytest.mark.parametrize(("ours", "theirs"), SCHEMES, ids=[ours.name for ours, _ in SCHEMES])
P = 2**255 - 19


def x25519(scalar: bytes, point: bytes) -> bytes:
    """RFC 7748, section 5, in plain Python: the Montgomery ladder without any of our code."""
    k = bytearray(scalar)
    k[0] &= 248
    k[31] = (k[31] & 127) | 64
    n, u = int.from_bytes(k, "little"), int.from_bytes(point, "little") & ((1 << 255) - 1)
    x2, z2, x3, z3, swap = 1, 0, u, 1, 0
    for t in reversed(range(255)):
        bit = (n >> t) & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb, aa, bb = d * a, c * b, a * a, b * b
        x3, z3 = pow(da + cb, 2, P), u * pow(da - cb, 2, P) % P
        e = (aa - bb) % P
        x2, z2 = aa * bb % P, e * (aa + 121665 * e) % P
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P - 2, P) % P).to_bytes(32, "little")


def combined(name, lattice, curve, ciphertext, public, context):
    text = (
        b"\0\0\0\1"
        + lattice
        + curve
        + ciphertext
        + public
        + f"dpfa.hybrid-kem.v1.{name}".encode()
        + len(context).to_bytes(8, "big")
        + context
    )
    return hashlib.sha3_512(text).digest()[:32]


@both
def test_both_ends_agree(ours, theirs):
    seed = ours.generate()
    shared, ciphertext = ours.encapsulate(ours.public_key(seed), context=b"c")
    assert ours.decapsulate(seed, ciphertext, context=b"c") == shared
    assert (len(seed), len(ours.public_key(seed)), len(ciphertext)) == (
        ours.seed_bytes,
        ours.public_key_bytes,
        ours.ciphertext_bytes,
    )


@both
def test_independent_halves_open_what_we_send(ours, theirs):
    lattice_seed, curve_secret = bytes(range(64)), bytes(range(100, 132))
    public_lattice, secret_lattice = theirs.key_derive(lattice_seed)
    public = public_lattice + x25519(curve_secret, (9).to_bytes(32, "little"))
    assert ours.public_key(lattice_seed + curve_secret) == public
    shared, ciphertext = ours.encapsulate(public, context=b"context")
    lattice = theirs.decaps(secret_lattice, ciphertext[:-32])
    curve = x25519(curve_secret, ciphertext[-32:])
    assert shared == combined(ours.name, lattice, curve, ciphertext, public, b"context")


@both
def test_we_open_what_independent_halves_send(ours, theirs):
    seed = ours.generate()
    public = ours.public_key(seed)
    lattice, lattice_ciphertext = theirs.encaps(public[:-32])
    ephemeral = bytes(range(32))
    ciphertext = lattice_ciphertext + x25519(ephemeral, (9).to_bytes(32, "little"))
    curve = x25519(ephemeral, public[-32:])
    expected = combined(ours.name, lattice, curve, ciphertext, public, b"")
    assert ours.decapsulate(seed, ciphertext) == expected


@settings(max_examples=60)
@given(data=st.data())
def test_any_altered_byte_gives_another_secret(data):
    scheme = data.draw(st.sampled_from([x25519_ml_kem_768, x25519_ml_kem_1024]))
    seed = scheme.generate()
    shared, ciphertext = scheme.encapsulate(scheme.public_key(seed))
    position = data.draw(st.integers(0, len(ciphertext) - 1))
    altered = bytearray(ciphertext)
    altered[position] ^= data.draw(st.integers(1, 255))
    assert scheme.decapsulate(seed, bytes(altered)) != shared


@both
def test_the_secret_depends_on_each_half_and_on_what_it_is_for(ours, theirs):
    seed = ours.generate()
    shared, ciphertext = ours.encapsulate(ours.public_key(seed), context=b"a")
    other = ours.generate()
    secrets = {
        shared,
        ours.decapsulate(seed, ciphertext, context=b"b"),
        ours.decapsulate(seed, ciphertext, context=b""),
        ours.decapsulate(other[:64] + seed[64:], ciphertext, context=b"a"),
        ours.decapsulate(seed[:64] + other[64:], ciphertext, context=b"a"),
    }
    assert len(secrets) == 5


def test_the_unused_bit_of_a_curve_point_is_bound_too():
    # X25519 ignores the top bit of a point, so only the combiner notices it.
    seed = x25519_ml_kem_768.generate()
    shared, ciphertext = x25519_ml_kem_768.encapsulate(x25519_ml_kem_768.public_key(seed))
    altered = ciphertext[:-1] + bytes([ciphertext[-1] ^ 0x80])
    assert x25519_ml_kem_768.decapsulate(seed, altered) != shared


@both
@pytest.mark.parametrize("point", [bytes(32), (1).to_bytes(32, "little"), P.to_bytes(32, "little")])
def test_points_of_low_order_are_refused(ours, theirs, point):
    seed = ours.generate()
    public = ours.public_key(seed)
    _, ciphertext = ours.encapsulate(public)
    with pytest.raises(InvalidInputError, match="low order"):
        ours.encapsulate(public[:-32] + point)
    with pytest.raises(InvalidInputError, match="low order"):
        ours.decapsulate(seed, ciphertext[:-32] + point)


@both
def test_wrong_lengths_are_refused(ours, theirs):
    seed = ours.generate()
    for attempt in (
        lambda: ours.public_key(b""),
        lambda: ours.encapsulate(ours.public_key(seed)[:-1]),
        lambda: ours.decapsulate(seed, b"x"),
        lambda: ours.decapsulate(seed + b"x", bytes(ours.ciphertext_bytes)),
    ):
        with pytest.raises(InvalidInputError, match="must be"):
            attempt()
