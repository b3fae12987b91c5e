"""Hybrid signatures: both halves count, and neither can be used alone or elsewhere."""

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from dilithium_py.ml_dsa import ML_DSA_65, ML_DSA_87
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto import AuthenticationError, ed25519_ml_dsa_65, ed25519_ml_dsa_87
from dp_flash_attention.crypto.library import framed, sha3_512

SCHEMES = [(ed25519_ml_dsa_65, ML_DSA_65), (ed25519_ml_dsa_87, ML_DSA_87)]
both = pytest.mark.parametrize(("ours", "theirs"), SCHEMES, ids=[ours.name for ours, _ in SCHEMES])
MESSAGE, CONTEXT = b"a statement", b"test"


def representative(ours, public):
    return framed(b"dpfa.hybrid-signature.v1", ours.name.encode(), sha3_512(public), CONTEXT, MESSAGE)


def lattice_context(ours):
    return b"dpfa.hybrid-signature.v1." + ours.name.encode()


@both
def test_a_signature_verifies(ours, theirs):
    seed = ours.generate()
    signature = ours.sign(seed, MESSAGE, context=CONTEXT)
    assert len(signature) == ours.signature_bytes
    ours.verify(ours.public_key(seed), MESSAGE, signature, context=CONTEXT)


@both
def test_each_half_is_a_signature_of_the_stated_representative(ours, theirs):
    seed = ours.generate()
    public, signature = ours.public_key(seed), ours.sign(seed, MESSAGE, context=CONTEXT)
    signed = representative(ours, public)
    Ed25519PublicKey.from_public_bytes(public[:32]).verify(signature[:64], signed)
    assert theirs.verify(public[32:], signed, signature[64:], ctx=lattice_context(ours))


@both
def test_what_independent_halves_sign_verifies(ours, theirs):
    seed = ours.generate()
    public, secret = theirs.key_derive(seed[32:])
    key = Ed25519PrivateKey.from_private_bytes(seed[:32])
    whole = key.public_key().public_bytes_raw() + public
    signed = representative(ours, whole)
    signature = key.sign(signed) + theirs.sign(secret, signed, ctx=lattice_context(ours))
    ours.verify(whole, MESSAGE, signature, context=CONTEXT)


@both
def test_a_half_alone_signs_nothing_that_its_own_verifier_would_be_shown(ours, theirs):
    seed = ours.generate()
    public, signature = ours.public_key(seed), ours.sign(seed, MESSAGE, context=CONTEXT)
    with pytest.raises(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(public[:32]).verify(signature[:64], MESSAGE)
    assert not theirs.verify(public[32:], MESSAGE, signature[64:])


@both
@pytest.mark.parametrize("forged", ["curve", "lattice"])
def test_a_forger_of_one_half_does_not_get_through(ours, theirs, forged):
    # Whoever breaks one algorithm holds that half's secret; the other half is theirs to make up.
    seed, own = ours.generate(), ours.generate()
    mixed = seed[:32] + own[32:] if forged == "curve" else own[:32] + seed[32:]
    public = ours.public_key(seed)
    signed = representative(ours, public)
    signature = Ed25519PrivateKey.from_private_bytes(mixed[:32]).sign(signed) + ours.ml_dsa.sign(
        mixed[32:], signed, context=lattice_context(ours)
    )
    with pytest.raises(AuthenticationError, match=r"ml_dsa" if forged == "curve" else r"Ed25519"):
        ours.verify(public, MESSAGE, signature, context=CONTEXT)


@both
def test_halves_of_two_keys_do_not_make_a_third(ours, theirs):
    first, second = ours.generate(), ours.generate()
    mixed = first[:32] + second[32:]
    signature = (
        ours.sign(first, MESSAGE, context=CONTEXT)[:64] + ours.sign(second, MESSAGE, context=CONTEXT)[64:]
    )
    with pytest.raises(AuthenticationError):
        ours.verify(ours.public_key(mixed), MESSAGE, signature, context=CONTEXT)


@settings(max_examples=80)
@given(data=st.data())
def test_any_altered_byte_is_noticed(data):
    scheme = data.draw(st.sampled_from([ed25519_ml_dsa_65, ed25519_ml_dsa_87]))
    seed = bytes(64)
    signature = bytearray(scheme.sign(seed, MESSAGE, context=CONTEXT))
    position = data.draw(st.integers(0, len(signature) - 1))
    signature[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(AuthenticationError):
        scheme.verify(scheme.public_key(seed), MESSAGE, bytes(signature), context=CONTEXT)


@both
def test_another_message_context_key_or_length_is_refused(ours, theirs):
    seed = ours.generate()
    public, signature = ours.public_key(seed), ours.sign(seed, MESSAGE, context=CONTEXT)
    for key, message, context, given_signature in (
        (public, b"another", CONTEXT, signature),
        (public, MESSAGE, b"other", signature),
        # The boundary between context and message is bound.
        (public, b"t" + MESSAGE, b"tes", signature),
        (ours.public_key(ours.generate()), MESSAGE, CONTEXT, signature),
        (public, MESSAGE, CONTEXT, signature[:64]),
        (public, MESSAGE, CONTEXT, signature + b"\0"),
    ):
        with pytest.raises(AuthenticationError):
            ours.verify(key, message, given_signature, context=context)
    with pytest.raises(InvalidInputError):
        ours.verify(public[:-1], MESSAGE, signature, context=CONTEXT)
    with pytest.raises(InvalidInputError):
        ours.sign(seed[:-1], MESSAGE, context=CONTEXT)
