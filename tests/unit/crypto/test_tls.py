"""The TLS probe: what it reads off the wire is what was agreed."""

import ssl
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

from dp_flash_attention.core.errors import DependencyMissingError
from dp_flash_attention.crypto import AuthenticationError, tls


def test_pyopenssl_agrees_a_hybrid_group_and_the_wire_shows_it():
    found = tls.handshake_of_pyopenssl()
    # The wheels of cryptography 48 and later hold OpenSSL 3.5 or newer, which prefers this group.
    assert found.group == "X25519MLKEM768"
    assert found.is_hybrid
    assert "OpenSSL" in found.library


def test_pythons_own_ssl_is_probed_too():
    found = tls.handshake_of_python()
    assert ssl.OPENSSL_VERSION in found.library
    # Which group it is depends on the OpenSSL that this Python was built with; before 3.5 there was no hybrid one.
    assert found.group in tls._GROUPS.values()
    assert ssl.OPENSSL_VERSION_INFO >= (3, 5) or not found.is_hybrid


def test_a_classical_group_is_seen_as_one(monkeypatch):
    # A server that knows one curve only answers with a retry request first, which must not be taken for the end.
    class Classical(SSL.Context):
        def __init__(self, method):
            super().__init__(method)
            self.set_tmp_ecdh(ec.SECP384R1())

    monkeypatch.setattr(SSL, "Context", Classical)
    found = tls.handshake_of_pyopenssl()
    assert (found.group, found.is_hybrid) == ("secp384r1", False)


def hello(extensions, random=bytes(32)):
    body = b"\x03\x03" + random + b"\x00" + b"\x13\x01" + b"\x00"
    listed = b"".join(k.to_bytes(2, "big") + len(v).to_bytes(2, "big") + v for k, v in extensions)
    body += len(listed).to_bytes(2, "big") + listed
    message = b"\x02" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x03" + len(message).to_bytes(2, "big") + message


def test_the_group_is_that_of_the_key_share():
    version = (43, b"\x03\x04")
    assert tls._group(hello([version, (51, b"\x11\xec\x00\x00")])) == "X25519MLKEM768"
    assert tls._group(hello([(51, b"\x00\x1d\x00\x00"), version])) == "x25519"
    assert tls._group(hello([(51, b"\x12\x34\x00\x00")])) == "0x1234"


def test_a_retry_request_is_passed_over():
    retry = hello([(51, b"\x11\xec")], random=tls._RETRY_RANDOM)
    assert tls._group(retry + hello([(51, b"\x00\x1d\x00\x00")])) == "x25519"


@pytest.mark.parametrize("wire", [b"", b"\x15\x03\x03\x00\x02\x02\x28", hello([(43, b"\x03\x04")])])
def test_a_wire_without_a_key_share_is_an_error(wire):
    with pytest.raises(AuthenticationError):
        tls._group(wire)


def test_pyopenssl_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "OpenSSL", None)
    with pytest.raises(DependencyMissingError, match="pip install pyopenssl"):
        tls.handshake_of_pyopenssl()
