"""The handshake of a channel: three messages, hybrid keys for one use, both ends signed for.

    1. initiator -> responder   header, nonce, encapsulation key for one use
    2. responder -> initiator   header, nonce, ciphertext, {identity, signature}
    3. initiator -> responder   header, {identity, signature}

Braces are AES-256-GCM under keys derived from the shared secret and the transcript. Each signature covers the role,
the transcript so far and the signer's own identity. A listener sees neither identity; whoever may start a handshake
learns the responder's, and only a trusted responder the initiator's. This is SIGMA-I (Krawczyk 2003) with the
Diffie–Hellman exchange replaced by a key encapsulation for one use, as hybrid TLS 1.3 does it
(draft-ietf-tls-hybrid-design). There is nothing to negotiate: both ends are configured with the same algorithm, or the
handshake fails.
"""

from __future__ import annotations

from collections.abc import Iterable

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.channel import ChannelLimits, SecureChannel
from dp_flash_attention.crypto.errors import AuthenticationError, ChannelError
from dp_flash_attention.crypto.keys import KEMS, SIGNATURES, DecapsulationKey, SigningKey, VerifyingKey
from dp_flash_attention.crypto.library import (
    NONCE_BYTES,
    aead_decrypt,
    aead_encrypt,
    derive,
    framed,
    fresh_secret,
    sha3_512,
)

_LABEL = b"dpfa.handshake.v1"
_MAGIC = b"DPFH\x01"
_FRESHNESS_BYTES = 32
_ALTERED = "the handshake was altered or is not meant for this end. Start it again."
_INITIATOR, _RESPONDER = b"initiator", b"responder"
_ZERO_NONCE = bytes(NONCE_BYTES)  # each handshake key encrypts one message


class _End:
    """What both ends know: who they are, whom they trust, what the channel is for."""

    def __init__(
        self,
        identity: SigningKey,
        trusted: Iterable[VerifyingKey],
        *,
        context: bytes = b"",
        algorithm: str = "x25519_ml_kem_768",
        limits: ChannelLimits | None = None,
    ) -> None:
        if algorithm not in KEMS:
            raise InvalidInputError(
                "algorithm", algorithm, bound=f"one of {', '.join(KEMS)}", remedy="Choose one of them."
            )
        self._identity, self._algorithm, self._limits = identity, algorithm, limits
        self._trusted = {key.key_id: key for key in trusted}
        if not self._trusted:
            raise InvalidInputError(
                "trusted", [], bound="at least one key", remedy="Pass the other end's verifying key."
            )
        self._transcript = sha3_512(_LABEL, algorithm.encode("ascii"), context)
        self._secret = b""
        self._state = "new"

    def _step(self, expected: str, following: str) -> None:
        if self._state != expected:
            raise ChannelError(
                f"this end of the handshake is {self._state}, but the call needs it {expected}. Start a new one."
            )
        # Set before the work: a step that fails leaves an end that can do nothing more.
        self._state = "broken"
        self._following = following

    def _done(self) -> None:
        self._state = self._following

    def _absorb(self, *parts: bytes) -> None:
        self._transcript = sha3_512(_LABEL, self._transcript, *parts)

    def _split(self, message: bytes, number: int, lengths: tuple[int, ...]) -> list[bytes]:
        header = _MAGIC + bytes([number])
        fixed = len(header) + sum(lengths)
        if message[: len(header)] != header or len(message) < fixed:
            raise AuthenticationError(f"message {number} is not one of this protocol: {_ALTERED}")
        parts, start = [], len(header)
        for length in lengths:
            parts.append(message[start : start + length])
            start += length
        return [*parts, message[start:]]

    def _prove(self, role: bytes) -> bytes:
        public = self._identity.public
        signature = self._identity.sign(self._claim(role, public), context=_LABEL)
        inner = framed(public.algorithm.encode("ascii"), public.public, signature)
        key = derive(self._secret, salt=self._transcript, info=framed(_LABEL, b"proof", role))
        return aead_encrypt(key, _ZERO_NONCE, inner, role)

    def _check(self, role: bytes, sealed: bytes) -> VerifyingKey:
        key = derive(self._secret, salt=self._transcript, info=framed(_LABEL, b"proof", role))
        inner = aead_decrypt(key, _ZERO_NONCE, sealed, role, otherwise=_ALTERED)
        peer, signature = _identity_and_signature(inner)
        trusted = self._trusted.get(peer.key_id)
        if trusted != peer:
            raise AuthenticationError(
                f"the other end is {peer.key_id}, which is not among the {len(self._trusted)} trusted keys. Add its "
                "key if it should be."
            )
        peer.verify(self._claim(role, peer), signature, context=_LABEL)
        return peer

    def _claim(self, role: bytes, key: VerifyingKey) -> bytes:
        return framed(role, self._transcript, key.algorithm.encode("ascii"), key.public)

    def _channel(self, *, sending: bytes, receiving: bytes, peer: VerifyingKey) -> SecureChannel:
        def secret(purpose: bytes, num_bytes: int) -> bytes:
            return derive(
                self._secret, salt=self._transcript, info=framed(_LABEL, purpose), num_bytes=num_bytes
            )

        channel = SecureChannel(
            send_secret=secret(b"from " + sending, 64),
            receive_secret=secret(b"from " + receiving, 64),
            peer_key_id=peer.key_id,
            binding=secret(b"binding", 32),
            limits=self._limits,
        )
        self._secret = b""
        return channel


class Initiator(_End):
    """The end that speaks first. Call ``start``, then ``finish``, once each.

    Args:
        identity: Key that this end signs with.
        trusted: Keys of which the other end must hold one.
        context: What the channel is for; both ends must say the same.
        algorithm: A name in ``KEMS``; both ends must say the same.
        limits: When to take new keys.

    Raises:
        InvalidInputError: If nobody is trusted or the algorithm is unknown.

    Guarantees:
        Not a privacy mechanism. Public: message lengths and times. Theorem: a finished handshake gives both ends
        fresh keys that only the holders of the two proven identities know; keys of finished sessions stay secret
        if identity keys leak later. Secrecy holds if X25519 or ML-KEM does, authenticity if Ed25519 or ML-DSA
        does. Source: SIGMA-I, Krawczyk 2003, section 5; Canetti & Krawczyk 2002 for its proof with
        Diffie–Hellman. The change to a KEM is that of hybrid TLS 1.3; this code has no proof of its own.
    """

    def start(self) -> bytes:
        """Returns message 1.

        Raises:
            ChannelError: If it was called before.
        """
        self._step("new", "waiting for message 2")
        self._ephemeral = DecapsulationKey.generate(self._algorithm)
        message = _MAGIC + b"\x01" + fresh_secret(_FRESHNESS_BYTES) + self._ephemeral.public.public
        self._absorb(message)
        self._done()
        return message

    def finish(self, message: bytes) -> tuple[bytes, SecureChannel]:
        """Takes message 2 and returns message 3 with the channel.

        Raises:
            AuthenticationError: If message 2 was altered or its sender is not trusted.
            ChannelError: If it is not this end's turn.
        """
        self._step("waiting for message 2", "finished")
        kem = KEMS[self._algorithm]
        freshness, ciphertext, proof = self._split(message, 2, (_FRESHNESS_BYTES, kem.ciphertext_bytes))
        self._absorb(freshness, ciphertext)
        try:
            self._secret = self._ephemeral.decapsulate(ciphertext, context=_LABEL)
        except InvalidInputError as error:
            raise AuthenticationError(f"message 2 holds no ciphertext ({error.name}): {_ALTERED}") from error
        del self._ephemeral
        peer = self._check(_RESPONDER, proof)
        self._absorb(proof)
        answer_proof = self._prove(_INITIATOR)
        self._absorb(answer_proof)
        channel = self._channel(sending=_INITIATOR, receiving=_RESPONDER, peer=peer)
        self._done()
        return _MAGIC + b"\x03" + answer_proof, channel


class Responder(_End):
    """The end that answers. Call ``respond``, then ``finish``, once each. Arguments and guarantees as ``Initiator``.

    Raises:
        InvalidInputError: If nobody is trusted or the algorithm is unknown.
    """

    def respond(self, message: bytes) -> bytes:
        """Takes message 1 and returns message 2.

        Raises:
            AuthenticationError: If message 1 is not one of this protocol and algorithm.
            ChannelError: If it is not this end's turn.
        """
        self._step("new", "waiting for message 3")
        kem = KEMS[self._algorithm]
        _, public, rest = self._split(message, 1, (_FRESHNESS_BYTES, kem.public_key_bytes))
        if rest:
            raise AuthenticationError(f"message 1 is longer than one of {self._algorithm}: {_ALTERED}")
        self._absorb(message)
        try:
            shared, ciphertext = kem.encapsulate(public, context=_LABEL)
        except InvalidInputError as error:
            raise AuthenticationError(f"message 1 holds no key ({error.name}): {_ALTERED}") from error
        self._secret = shared
        freshness = fresh_secret(_FRESHNESS_BYTES)
        self._absorb(freshness, ciphertext)
        proof = self._prove(_RESPONDER)
        self._absorb(proof)
        self._done()
        return _MAGIC + b"\x02" + freshness + ciphertext + proof

    def finish(self, message: bytes) -> SecureChannel:
        """Takes message 3 and returns the channel.

        Raises:
            AuthenticationError: If message 3 was altered or its sender is not trusted.
            ChannelError: If it is not this end's turn.
        """
        self._step("waiting for message 3", "finished")
        (proof,) = self._split(message, 3, ())
        peer = self._check(_INITIATOR, proof)
        self._absorb(proof)
        channel = self._channel(sending=_RESPONDER, receiving=_INITIATOR, peer=peer)
        self._done()
        return channel


def _identity_and_signature(inner: bytes) -> tuple[VerifyingKey, bytes]:
    parts, rest = [], inner
    for _ in range(3):
        length = int.from_bytes(rest[:8], "big")
        parts.append(rest[8 : 8 + length])
        rest = rest[8 + length :]
    if framed(*parts) != inner:
        raise AuthenticationError(_ALTERED)
    algorithm = parts[0].decode("ascii", errors="replace")
    if algorithm not in SIGNATURES:
        raise AuthenticationError(
            f"the other end signs with {algorithm[:40]!r}, which is unknown here. {_ALTERED}"
        )
    try:
        return VerifyingKey(algorithm=algorithm, public=parts[1]), parts[2]
    except InvalidInputError as error:
        raise AuthenticationError(f"the other end's key is damaged ({error.name}): {_ALTERED}") from error
