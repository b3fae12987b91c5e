"""ML-KEM against an independent implementation, in both directions."""

import hashlib
import sys

import pytest
from kyber_py.ml_kem import ML_KEM_768, ML_KEM_1024

from dp_flash_attention.core.errors import DependencyMissingError, InvalidInputError
from dp_flash_attention.crypto import ml_kem_768, ml_kem_1024

PAIRS = [(ml_kem_768, ML_KEM_768), (ml_kem_1024, ML_KEM_1024)]
both = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[ours.name for ours, _ in PAIRS])


@both
def test_keys_from_a_seed_are_the_same(ours, theirs):
    seed = bytes(range(64))
    public, _ = theirs.key_derive(seed)
    assert ours.public_key(seed) == public
    assert len(public) == ours.public_key_bytes


@both
def test_what_we_encapsulate_they_decapsulate(ours, theirs):
    seed = ours.generate()
    public, secret = theirs.key_derive(seed)
    shared, ciphertext = ours.encapsulate(public)
    assert len(shared) == 32
    assert len(ciphertext) == ours.ciphertext_bytes
    assert theirs.decaps(secret, ciphertext) == shared


@both
def test_what_they_encapsulate_we_decapsulate(ours, theirs):
    seed = ours.generate()
    shared, ciphertext = theirs.encaps(ours.public_key(seed))
    assert ours.decapsulate(seed, ciphertext) == shared


@both
@pytest.mark.parametrize("position", [0, 700, -1])
def test_an_altered_ciphertext_gives_the_secret_of_implicit_rejection(ours, theirs, position):
    seed = ours.generate()
    shared, ciphertext = ours.encapsulate(ours.public_key(seed))
    altered = bytearray(ciphertext)
    altered[position] ^= 0x10
    # FIPS 203, algorithm 18, line 7: J(z ‖ c), SHAKE256 of the seed's second half and the ciphertext.
    expected = hashlib.shake_256(seed[32:] + bytes(altered)).digest(32)
    assert ours.decapsulate(seed, bytes(altered)) == expected != shared
    assert theirs.decaps(theirs.key_derive(seed)[1], bytes(altered)) == expected


@both
def test_a_fresh_encapsulation_is_another_one(ours, theirs):
    public = ours.public_key(ours.generate())
    assert len({ours.encapsulate(public).shared_secret for _ in range(5)}) == 5


@both
def test_wrong_lengths_are_refused_without_showing_the_bytes(ours, theirs):
    seed = ours.generate()
    for attempt in (
        lambda: ours.public_key(seed[:-1]),
        lambda: ours.encapsulate(bytes(ours.public_key_bytes + 1)),
        lambda: ours.decapsulate(seed, b""),
        lambda: ours.decapsulate("text", bytes(ours.ciphertext_bytes)),
    ):
        with pytest.raises(InvalidInputError, match="must be"):
            attempt()
    with pytest.raises(InvalidInputError) as caught:
        ours.public_key(b"secretsecret")
    assert "secretsecret" not in str(caught.value)


@both
def test_a_public_key_that_fails_the_modulus_check_is_refused(ours, theirs):
    public = bytearray(ours.public_key(ours.generate()))
    public[:3] = b"\xff\xff\xff"  # two coefficients of 4095, above q - 1 = 3328
    with pytest.raises(InvalidInputError, match="modulo 3329"):
        ours.encapsulate(bytes(public))


def test_a_cryptography_without_ml_kem_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.mlkem", None)
    with pytest.raises(DependencyMissingError, match=r"cryptography>=48"):
        ml_kem_768.public_key(bytes(64))


def test_an_openssl_without_ml_kem_is_named(monkeypatch):
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import mlkem

    class Lacking:
        @staticmethod
        def from_seed_bytes(seed):
            raise UnsupportedAlgorithm("ML-KEM-768 is not supported")

        from_public_bytes = from_seed_bytes

    monkeypatch.setattr(mlkem, "MLKEM768PrivateKey", Lacking)
    monkeypatch.setattr(mlkem, "MLKEM768PublicKey", Lacking)
    with pytest.raises(DependencyMissingError, match=r"OpenSSL 3\.5"):
        ml_kem_768.public_key(bytes(64))
    with pytest.raises(DependencyMissingError, match=r"OpenSSL 3\.5"):
        ml_kem_768.encapsulate(bytes(ml_kem_768.public_key_bytes))


@pytest.mark.parametrize(("ours", "rank"), [(ml_kem_768, 3), (ml_kem_1024, 4)])
def test_it_is_the_final_standard_and_not_its_draft(ours, rank):
    # FIPS 203, algorithm 13, line 1: (ρ, σ) = G(d ‖ k). The draft of 2023 and Kyber hash d alone.
    seed = bytes(range(64))
    rho = ours.public_key(seed)[-32:]
    assert rho == hashlib.sha3_512(seed[:32] + bytes([rank])).digest()[:32]
    assert rho != hashlib.sha3_512(seed[:32]).digest()[:32]
