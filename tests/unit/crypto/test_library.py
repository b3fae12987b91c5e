import os
import subprocess
import sys

import pytest

from dp_flash_attention.core.errors import DependencyMissingError, InvalidInputError
from dp_flash_attention.crypto import AuthenticationError
from dp_flash_attention.crypto.library import (
    aead_decrypt,
    aead_encrypt,
    derive,
    exactly,
    framed,
    fresh_secret,
)


def test_the_derivation_is_hkdf_sha_512():
    # RFC 5869's first input with SHA-512; the answer is that of its definition, with hmac alone.
    import hashlib
    import hmac

    secret, salt, info = b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA))
    extracted = hmac.new(salt, secret, hashlib.sha512).digest()
    expanded = hmac.new(extracted, info + b"\x01", hashlib.sha512).digest()
    assert derive(secret, salt=salt, info=info, num_bytes=42) == expanded[:42]
    assert expanded[:8].hex() == "832390086cda71fb"


def test_aead_is_aes_256_gcm():
    # GCM specification (McGrew & Viega), test case 14: zero key, nonce and block.
    sealed = aead_encrypt(bytes(32), bytes(12), bytes(16), b"")
    assert sealed.hex() == "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    assert aead_decrypt(bytes(32), bytes(12), sealed, b"", otherwise="") == bytes(16)
    for altered, associated in ((sealed[:-1], b""), (sealed, b"x"), (b"", b"")):
        with pytest.raises(AuthenticationError, match="as said"):
            aead_decrypt(bytes(32), bytes(12), altered, associated, otherwise="as said")


@pytest.mark.parametrize(
    ("first", "second"), [((b"ab", b"c"), (b"a", b"bc")), ((b"",), ()), ((b"a", b""), (b"a",))]
)
def test_different_lists_are_framed_differently(first, second):
    assert framed(*first) != framed(*second)


def test_lengths_are_exact_and_nothing_is_shown():
    assert exactly("key", bytearray(3), 3) == bytes(3)
    for value in (b"secret", "secret", None, 3):
        with pytest.raises(InvalidInputError) as caught:
            exactly("key", value, 3)
        assert "secret'" not in str(caught.value)


def test_a_broken_source_of_entropy_is_an_error(monkeypatch):
    assert len(fresh_secret(32)) == 32
    for broken in (lambda n: bytes(n), lambda n: b"ab"):
        monkeypatch.setattr(os, "urandom", broken)
        with pytest.raises(DependencyMissingError, match="short or constant"):
            fresh_secret(32)

    def fail(n):
        raise NotImplementedError("none here")

    monkeypatch.setattr(os, "urandom", fail)
    with pytest.raises(DependencyMissingError, match="none here"):
        fresh_secret(32)


def test_importing_the_room_loads_neither_torch_nor_numpy_nor_cryptography():
    code = (
        "import sys, dp_flash_attention.crypto, dp_flash_attention.crypto.tls\n"
        "print(sorted({'torch', 'numpy', 'flwr', 'cryptography', 'OpenSSL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
