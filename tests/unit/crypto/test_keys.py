import copy
import pickle

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto import DecapsulationKey, EncapsulationKey, SigningKey, VerifyingKey
from dp_flash_attention.crypto.keys import KEMS, SIGNATURES

KINDS = [(SigningKey, VerifyingKey, name) for name in SIGNATURES] + [
    (DecapsulationKey, EncapsulationKey, name) for name in KEMS
]
every_kind = pytest.mark.parametrize(("secret", "public", "algorithm"), KINDS, ids=[k[2] for k in KINDS])


@every_kind
def test_an_exported_seed_is_the_same_key(secret, public, algorithm):
    key = secret.generate(algorithm)
    again = secret(algorithm, key.export())
    assert again.public == key.public == public(algorithm=algorithm, public=key.public.public)
    assert again.key_id == key.key_id == key.public.key_id


@every_kind
def test_key_ids_differ_and_have_128_bits(secret, public, algorithm):
    ids = {secret.generate(algorithm).key_id for _ in range(5)}
    assert len(ids) == 5
    assert all(len(bytes.fromhex(key_id)) == 16 for key_id in ids)


@every_kind
def test_a_secret_key_shows_nothing_and_cannot_be_copied(secret, public, algorithm):
    key = secret.generate(algorithm)
    assert key.export().hex() not in repr(key)
    assert repr(key) == f"{secret.__name__}({algorithm}, <secret>)"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            attempt(key)


@every_kind
def test_wrong_bytes_and_names_are_refused(secret, public, algorithm):
    key = secret.generate(algorithm)
    for attempt in (
        lambda: secret(algorithm, key.export()[:-1]),
        lambda: secret("rsa", key.export()),
        lambda: secret.generate("rsa"),
        lambda: public(algorithm=algorithm, public=key.public.public[:-1]),
        lambda: public(algorithm="rsa", public=key.public.public),
    ):
        with pytest.raises(InvalidInputError):
            attempt()


def test_a_key_of_one_purpose_is_none_of_the_other():
    with pytest.raises(InvalidInputError, match="ed25519"):
        SigningKey.generate("x25519_ml_kem_768")
    with pytest.raises(InvalidInputError, match="x25519"):
        DecapsulationKey.generate("ed25519_ml_dsa_65")


def test_the_id_binds_the_algorithm():
    assert VerifyingKey(algorithm="ed25519_ml_dsa_65", public=bytes(1984)).key_id != (
        VerifyingKey(algorithm="ed25519_ml_dsa_87", public=bytes(2624)).key_id
    )
