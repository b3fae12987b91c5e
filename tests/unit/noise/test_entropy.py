"""Keys: derived, destroyed, never shown, and no way round a broken source."""

import copy
import hashlib
import pickle

import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise import SecretKey, TestKey
from dp_flash_attention.noise.entropy import os_entropy

SECRET = bytes(range(32))


def test_subkeys_are_keyed_blake2b_of_their_purpose():
    expected = hashlib.blake2b(b"noise", key=SECRET, digest_size=32, person=b"dpfa.derive.v1").digest()
    assert SecretKey.from_bytes(SECRET).derive("noise").export() == expected
    assert SecretKey(SECRET).derive("noise") != SecretKey(SECRET).derive("sampling")


def test_two_keys_of_the_system_differ():
    assert SecretKey.from_os() != SecretKey.from_os()


def test_a_key_shows_pickles_and_copies_nothing():
    key = SecretKey(SECRET)
    assert repr(key) == "SecretKey(<32 secret bytes>)"
    assert SECRET.hex() not in str(vars(key))[:40]
    for spread in (pickle.dumps, copy.deepcopy, lambda k: torch.save(k, "/dev/null")):
        with pytest.raises(TypeError, match="cannot be pickled"):
            spread(key)
    with pytest.raises(TypeError):
        hash(key)


def test_a_destroyed_key_is_overwritten_and_refuses():
    key = SecretKey(SECRET)
    memory = key._secret
    key.destroy()
    key.destroy()
    assert bytes(memory) == bytes(32)
    for use in (key.export, lambda: key.derive("noise")):
        with pytest.raises(NoiseUnavailableError, match="destroyed"):
            use()


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33), "a" * 32, 7, None])
def test_what_is_no_key_is_refused_without_being_shown(secret):
    with pytest.raises(InvalidInputError, match="32 bytes") as caught:
        SecretKey(secret)
    assert repr(secret) not in str(caught.value) or secret in (b"", 7, None)


@pytest.mark.parametrize("purpose", ["", None, 3, b"noise"])
def test_a_subkey_needs_a_purpose(purpose):
    with pytest.raises(InvalidInputError, match="purpose"):
        SecretKey(SECRET).derive(purpose)


def broken(_):
    raise OSError("no entropy")


@pytest.mark.parametrize(
    "source", [broken, lambda n: bytes(n), lambda n: b"\xff" * n, lambda n: SECRET[: n - 1]]
)
def test_a_broken_source_of_entropy_raises_and_nothing_takes_its_place(monkeypatch, source):
    monkeypatch.setattr("os.urandom", source)
    with pytest.raises(NoiseUnavailableError, match="random source"):
        SecretKey.from_os()
    with pytest.raises(NoiseUnavailableError):
        os_entropy(32)


def test_a_test_key_says_so_and_is_the_same_every_time():
    assert TestKey("a").export() == TestKey("a").export()
    assert TestKey(1).export() != TestKey("1").export()
    assert TestKey("a").derive("x").export() != TestKey("a/x").export()
    assert TestKey("a").derive("x").is_test_key
    assert not SecretKey(SECRET).is_test_key
    for label in (True, None, 1.5, b"a"):
        with pytest.raises(InvalidInputError, match="test key label"):
            TestKey(label)
