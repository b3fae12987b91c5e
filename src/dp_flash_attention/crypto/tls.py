"""What key agreement a TLS 1.3 handshake on this machine really ends with.

Two ends in this process talk through memory, with the defaults of the library, and the group is read off the wire:
from the ``key_share`` of the ServerHello, which TLS 1.3 sends in the clear (RFC 8446, section 4.2.8). Nothing is
concluded from version numbers.
"""

from __future__ import annotations

import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dp_flash_attention.core.errors import DependencyMissingError
from dp_flash_attention.crypto.errors import AuthenticationError

# Code points of the TLS Supported Groups registry.
_GROUPS = {
    0x0017: "secp256r1",
    0x0018: "secp384r1",
    0x001D: "x25519",
    0x001E: "x448",
    0x0201: "MLKEM768",
    0x0202: "MLKEM1024",
    0x11EB: "SecP256r1MLKEM768",
    0x11EC: "X25519MLKEM768",
    0x11ED: "SecP384r1MLKEM1024",
}
HYBRID_GROUPS = frozenset({"SecP256r1MLKEM768", "X25519MLKEM768", "SecP384r1MLKEM1024"})
_HANDSHAKE, _SERVER_HELLO, _KEY_SHARE = 22, 2, 51
_MAX_FLIGHTS = 10
_RETRY_RANDOM = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")


@dataclass(frozen=True, kw_only=True)
class TlsHandshake:
    """A handshake that was carried out.

    Attributes:
        library: Which library did it, with its version.
        group: Name of the key agreement's group, or its code point in hexadecimal.
    """

    library: str
    group: str

    @property
    def is_hybrid(self) -> bool:
        """Whether a quantum computer alone does not break the key agreement."""
        return self.group in HYBRID_GROUPS


def handshake_of_python() -> TlsHandshake:
    """Carries out a handshake with Python's own ``ssl``.

    Raises:
        AuthenticationError: If it does not end, or not in TLS 1.3.
    """
    with tempfile.TemporaryDirectory() as folder:
        key, certificate = _identity()
        path = Path(folder) / "identity.pem"  # ssl takes files only; the key lives for this handshake
        path.write_bytes(_as_pem(key, certificate))
        server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server_context.load_cert_chain(path)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_mode = ssl.CERT_NONE  # the group is asked for, not the identity
    for context in (server_context, client_context):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    wire = b""
    for _ in range(_MAX_FLIGHTS):
        client_done, server_done = _python_step(client), _python_step(server)
        flight = to_client.read()  # the client has taken what came before
        wire += flight
        to_client.write(flight)
        if client_done and server_done:
            return TlsHandshake(library=f"Python's ssl ({ssl.OPENSSL_VERSION})", group=_group(wire))
    raise AuthenticationError("a TLS handshake in memory did not end. Repair this Python's ssl module.")


def handshake_of_pyopenssl() -> TlsHandshake:
    """Carries out a handshake with pyOpenSSL, whose OpenSSL is the one inside ``cryptography``.

    Raises:
        AuthenticationError: If it does not end, or not in TLS 1.3.
        DependencyMissingError: If pyOpenSSL is not installed.
    """
    try:
        from OpenSSL import SSL
    except ImportError as error:
        raise DependencyMissingError(
            f"a TLS handshake with the OpenSSL of cryptography needs pyOpenSSL ({error}). Install it: "
            "pip install pyopenssl"
        ) from error
    key, certificate = _identity()
    ends = []
    for is_server in (False, True):
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        if is_server:
            context.use_privatekey(key)
            context.use_certificate(certificate)
        end = SSL.Connection(context, None)
        (end.set_accept_state if is_server else end.set_connect_state)()
        ends.append(end)
    client, server = ends
    wire = b""
    for _ in range(_MAX_FLIGHTS):
        done = []
        for sender, receiver in ((client, server), (server, client)):
            done.append(_pyopenssl_step(sender, SSL.WantReadError))
            flight = _pyopenssl_flight(sender, SSL.WantReadError)
            wire += flight if sender is server else b""
            if flight:
                receiver.bio_write(flight)
        if all(done):
            version = SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode("ascii")
            return TlsHandshake(library=f"pyOpenSSL ({version})", group=_group(wire))
    raise AuthenticationError("a TLS handshake in memory did not end. Repair this pyOpenSSL.")


def _python_step(end: ssl.SSLObject) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _pyopenssl_step(end: Any, wants_more: type[Exception]) -> bool:
    try:
        end.do_handshake()
    except wants_more:
        return False
    return True


def _pyopenssl_flight(end: Any, nothing: type[Exception]) -> bytes:
    flight = b""
    while True:
        try:
            flight += end.bio_read(1 << 16)
        except nothing:
            return flight


def _identity() -> tuple[Any, Any]:
    """Returns a fresh key and a certificate that it signs for itself, for one handshake."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509.oid import NameOID

    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    moment = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - timedelta(hours=1))
        .not_valid_after(moment + timedelta(hours=1))
        .sign(key, None)
    )
    return key, certificate


def _as_pem(key: Any, certificate: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    secret: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public: bytes = certificate.public_bytes(Encoding.PEM)
    return secret + public


def _group(wire: bytes) -> str:
    """Reads the group off the server's bytes: the key share of the last ServerHello that is no retry request."""
    position = 0
    while position + 5 <= len(wire):
        kind, length = wire[position], int.from_bytes(wire[position + 3 : position + 5], "big")
        body = wire[position + 5 : position + 5 + length]
        position += 5 + length
        if kind == _HANDSHAKE and body[:1] == bytes([_SERVER_HELLO]) and body[6:38] != _RETRY_RANDOM:
            code = _key_share(body)
            return _GROUPS.get(code, f"{code:#06x}")
    raise AuthenticationError("the server sent no ServerHello of TLS 1.3. Repair this machine's OpenSSL.")


def _key_share(hello: bytes) -> int:
    # type 1, length 3, version 2, random 32, session id 1 + n, cipher suite 2, compression 1, extensions 2 + n
    position = 39 + hello[38] + 3 + 2
    while position + 4 <= len(hello):
        kind, length = (
            int.from_bytes(hello[position : position + 2], "big"),
            int.from_bytes(hello[position + 2 : position + 4], "big"),
        )
        if kind == _KEY_SHARE:
            return int.from_bytes(hello[position + 4 : position + 6], "big")
        position += 4 + length
    raise AuthenticationError("the ServerHello holds no key share. Repair this machine's OpenSSL.")
