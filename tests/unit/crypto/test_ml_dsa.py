"""ML-DSA against an independent implementation, in both directions."""

import hashlib
import sys

import pytest
from dilithium_py.ml_dsa import ML_DSA_65, ML_DSA_87

from dp_flash_attention.core.errors import DependencyMissingError, InvalidInputError
from dp_flash_attention.crypto import AuthenticationError, ml_dsa_65, ml_dsa_87

PAIRS = [(ml_dsa_65, ML_DSA_65), (ml_dsa_87, ML_DSA_87)]
both = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[ours.name for ours, _ in PAIRS])
MESSAGE, CONTEXT = b"the covered files together", b"a context"


@both
def test_keys_from_a_seed_are_the_same(ours, theirs):
    seed = bytes(range(32))
    public, _ = theirs.key_derive(seed)
    assert ours.public_key(seed) == public
    assert len(public) == ours.public_key_bytes


@both
@pytest.mark.parametrize("context", [b"", CONTEXT, bytes(255)], ids=["none", "some", "longest"])
def test_what_we_sign_they_verify(ours, theirs, context):
    seed = ours.generate()
    public, _ = theirs.key_derive(seed)
    signature = ours.sign(seed, MESSAGE, context=context)
    assert len(signature) == ours.signature_bytes
    assert theirs.verify(public, MESSAGE, signature, ctx=context)
    assert not theirs.verify(public, MESSAGE + b"!", signature, ctx=context)


@both
@pytest.mark.parametrize("deterministic", [True, False])
def test_what_they_sign_we_verify(ours, theirs, deterministic):
    seed = ours.generate()
    public, secret = theirs.key_derive(seed)
    signature = theirs.sign(secret, MESSAGE, ctx=CONTEXT, deterministic=deterministic)
    ours.verify(public, MESSAGE, signature, context=CONTEXT)
    for message, context in ((MESSAGE + b"!", CONTEXT), (MESSAGE, b""), (b"", CONTEXT)):
        with pytest.raises(AuthenticationError):
            ours.verify(public, message, signature, context=context)


@both
def test_signing_is_hedged(ours, theirs):
    seed = ours.generate()
    assert ours.sign(seed, MESSAGE) != ours.sign(seed, MESSAGE)


@both
def test_a_signature_of_another_length_is_refused(ours, theirs):
    seed = ours.generate()
    public, signature = ours.public_key(seed), ours.sign(seed, MESSAGE)
    for altered in (b"", signature[:-1], signature + b"\0"):
        with pytest.raises(AuthenticationError):
            ours.verify(public, MESSAGE, altered)


@both
def test_wrong_lengths_are_refused(ours, theirs):
    seed = ours.generate()
    for attempt in (
        lambda: ours.public_key(seed + b"\0"),
        lambda: ours.sign(seed[:-1], MESSAGE),
        lambda: ours.sign(seed, MESSAGE, context=bytes(256)),
        lambda: ours.verify(b"", MESSAGE, b""),
    ):
        with pytest.raises(InvalidInputError, match="must be"):
            attempt()


def test_a_cryptography_without_ml_dsa_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.mldsa", None)
    with pytest.raises(DependencyMissingError, match=r"cryptography>=48"):
        ml_dsa_65.public_key(bytes(32))


@pytest.mark.parametrize(("ours", "k", "rank"), [(ml_dsa_65, 6, 5), (ml_dsa_87, 8, 7)])
def test_it_is_the_final_standard_and_not_its_draft(ours, k, rank):
    # FIPS 204, algorithm 6, line 1: (ρ, ρ′, K) = H(ξ ‖ k ‖ l, 128). The draft of 2023 and Dilithium hash ξ alone.
    seed = bytes(range(32))
    rho = ours.public_key(seed)[:32]
    assert rho == hashlib.shake_256(seed + bytes([k, rank])).digest(32)
    assert rho != hashlib.shake_256(seed).digest(32)
