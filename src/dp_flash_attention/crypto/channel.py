"""An authenticated, encrypted channel over any transport that carries whole messages in order.

It takes and gives bytes and touches no socket. A ``SecureChannel`` comes out of ``handshake`` with one key for each
direction. A record is

    flags (1) ‖ sequence number (8) ‖ AES-256-GCM ciphertext with tag

where flags, sequence number, key epoch and the caller's associated data are authenticated. The nonce is the
direction's fixed value XOR the sequence number (RFC 8446, section 5.3); the channel counts, nobody else can set it.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import NoReturn

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.crypto.errors import AuthenticationError, ChannelError
from dp_flash_attention.crypto.library import (
    AEAD_TAG_BYTES,
    NONCE_BYTES,
    aead_decrypt,
    aead_encrypt,
    derive,
    framed,
)

MAX_PLAINTEXT_BYTES = (
    1 << 30
)  # SP 800-38D allows 2^36 - 32 bytes; a smaller record is checked before it is used
_MAX_SEQUENCE = (1 << 64) - 1
_DATA, _CLOSE, _REKEY_AFTER = 0x00, 0x01, 0x80
_SEQUENCE_BYTES = 8
_HEADER_BYTES = 1 + _SEQUENCE_BYTES
_BROKEN = "Open a new channel with a new handshake."


@dataclass(frozen=True, kw_only=True)
class ChannelLimits:
    """When a direction takes its next key. Both ends need not agree: the record says so.

    Attributes:
        max_records: Records under one key.
        max_bytes: Plaintext bytes under one key. The default is 2^32 blocks of AES-GCM, so that distinguishing
            it by the birthday bound succeeds with probability below 2^-64 (Luykx & Paterson 2017).
    """

    max_records: int = 1 << 20
    max_bytes: int = 1 << 36

    def __post_init__(self) -> None:
        positive_int("max_records", self.max_records, remedy="The default is 2^20.")
        positive_int("max_bytes", self.max_bytes, remedy="The default is 2^36.")


class _Direction:
    """Key, fixed nonce part, epoch and counters of one direction."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.sequence = 0
        self._start(0)

    def _start(self, epoch: int) -> None:
        self.epoch = epoch
        self.records = self.bytes = 0
        salt = epoch.to_bytes(8, "big")
        self._key = derive(self._secret, salt=salt, info=b"dpfa.channel.v1.key")
        self._nonce = derive(self._secret, salt=salt, info=b"dpfa.channel.v1.nonce", num_bytes=NONCE_BYTES)

    def take(self) -> tuple[bytes, bytes, int]:
        """Returns key, nonce and sequence number, and moves on: no call can return the same nonce again."""
        if self.sequence > _MAX_SEQUENCE:
            raise ChannelError(f"all 2^64 sequence numbers of the channel are used. {_BROKEN}")
        sequence = self.sequence
        self.sequence += 1
        padded = bytes(NONCE_BYTES - _SEQUENCE_BYTES) + sequence.to_bytes(_SEQUENCE_BYTES, "big")
        nonce = bytes(a ^ b for a, b in zip(self._nonce, padded, strict=True))
        return self._key, nonce, sequence

    def ratchet(self) -> None:
        """Takes the next key and forgets this one: what was sent before stays secret if the next key leaks."""
        self._secret = derive(
            self._secret, salt=self.epoch.to_bytes(8, "big"), info=b"dpfa.channel.v1.next", num_bytes=64
        )
        self._start(self.epoch + 1)


class SecureChannel:
    """One end of a channel; made by ``handshake``, used by one process.

    Guarantees:
        Not a privacy mechanism. Public: lengths, number, order and time of records. Theorem: given the handshake's
        keys, records are confidential and their sequence authentic: a record that was altered, replayed, moved,
        dropped or cut off is noticed by the receiver. Source: AES-GCM as a nonce-respecting AEAD (McGrew & Viega
        2004; Iwata, Ohashi & Minematsu 2012), used with counters as in RFC 8446, section 5.

    Attributes:
        peer_key_id: The id of the key that the other end proved to hold.
        binding: 32 bytes that both ends share and nobody else knows, to bind other protocols to this channel.
    """

    def __init__(
        self,
        *,
        send_secret: bytes,
        receive_secret: bytes,
        peer_key_id: str,
        binding: bytes,
        limits: ChannelLimits | None = None,
    ) -> None:
        self._send, self._receive = _Direction(send_secret), _Direction(receive_secret)
        self.peer_key_id, self.binding = peer_key_id, binding
        self._limits = ChannelLimits() if limits is None else limits
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._rekey_wanted = self._sent_close = self._got_close = False
        self._broken: str | None = None

    def seal(self, plaintext: bytes, *, associated: bytes = b"") -> bytes:
        """Returns the next record.

        Args:
            plaintext: At most ``MAX_PLAINTEXT_BYTES``.
            associated: Bytes that travel elsewhere and are authenticated with the record.

        Raises:
            InvalidInputError: If the plaintext is too long.
            ChannelError: If the channel is closed, broken, used up, or was carried into another process.
        """
        if len(plaintext) > MAX_PLAINTEXT_BYTES:
            raise InvalidInputError(
                "plaintext",
                f"{len(plaintext)} bytes",
                bound=f"at most {MAX_PLAINTEXT_BYTES} bytes",
                remedy="Send it in pieces.",
            )
        return self._record(_DATA, plaintext, associated)

    def close(self) -> bytes:
        """Returns the last record of this direction; without it the other end reports a truncation.

        Raises:
            ChannelError: As ``seal``.
        """
        return self._record(_CLOSE, b"", b"")

    def rekey(self) -> None:
        """Takes a new key after the next record that is sent."""
        self._rekey_wanted = True

    def open(self, record: bytes, *, associated: bytes = b"") -> bytes | None:
        """Returns the plaintext of the next record, or None if the other end closed its direction with it.

        Raises:
            AuthenticationError: If the record was altered, replayed, moved or is not from the other end. The
                channel is broken from then on.
            ChannelError: If the channel is closed, broken, or was carried into another process.
        """
        with self._lock:
            self._check_usable()
            if self._got_close:
                raise ChannelError(f"the other end has closed its direction. {_BROKEN}")
            try:
                return self._open(record, associated)
            except AuthenticationError as error:
                self._broken = str(error)
                raise

    def require_complete(self) -> None:
        """Returns if the other end closed its direction; call it when the transport ends.

        Raises:
            AuthenticationError: If it did not: records may be missing at the end.
        """
        if not self._got_close:
            raise AuthenticationError(
                "the stream ended without its closing record, so its end may have been cut off. Discard what it "
                f"was part of. {_BROKEN}"
            )

    def _record(self, flags: int, plaintext: bytes, associated: bytes) -> bytes:
        with self._lock:
            self._check_usable()
            if self._sent_close:
                raise ChannelError(f"this direction is closed, but a record is to be sent. {_BROKEN}")
            send = self._send
            key, nonce, sequence = send.take()
            send.records += 1
            send.bytes += len(plaintext)
            full = send.records >= self._limits.max_records or send.bytes >= self._limits.max_bytes
            if full or self._rekey_wanted:
                flags |= _REKEY_AFTER
            header = bytes([flags]) + sequence.to_bytes(_SEQUENCE_BYTES, "big")
            sealed = aead_encrypt(key, nonce, plaintext, _bound(header, send.epoch, associated))
            if flags & _REKEY_AFTER:
                send.ratchet()
                self._rekey_wanted = False
            self._sent_close = bool(flags & _CLOSE)
            return header + sealed

    def _open(self, record: bytes, associated: bytes) -> bytes | None:
        receive = self._receive
        if (
            not _HEADER_BYTES + AEAD_TAG_BYTES
            <= len(record)
            <= (_HEADER_BYTES + AEAD_TAG_BYTES + MAX_PLAINTEXT_BYTES)
        ):
            raise AuthenticationError(f"a record of {len(record)} bytes is none of this channel. {_BROKEN}")
        header, sealed = record[:_HEADER_BYTES], record[_HEADER_BYTES:]
        claimed = int.from_bytes(header[1:], "big")
        if claimed != receive.sequence:
            what = "came before" if claimed < receive.sequence else "is ahead: records before it are missing"
            raise AuthenticationError(
                f"record {claimed} {what}, but record {receive.sequence} is next. {_BROKEN}"
            )
        key, nonce, _ = receive.take()
        plaintext = aead_decrypt(
            key,
            nonce,
            sealed,
            _bound(header, receive.epoch, associated),
            otherwise=f"record {claimed} is not what the other end sealed. {_BROKEN}",
        )
        flags = header[0]
        if flags & _REKEY_AFTER:
            receive.ratchet()
        if flags & ~_REKEY_AFTER == _CLOSE:
            self._got_close = True
            return None
        return plaintext

    def _check_usable(self) -> None:
        if os.getpid() != self._process:
            # Parent and child would send different records under one nonce.
            raise ChannelError(f"the channel belongs to process {self._process}, not to its child. {_BROKEN}")
        if self._broken is not None:
            raise ChannelError(f"the channel is broken: {self._broken}")

    def __repr__(self) -> str:
        """Shows no keys."""
        return f"SecureChannel(peer {self.peer_key_id})"

    def __reduce__(self) -> NoReturn:
        """Refuses pickling and copying: two copies would use one nonce twice."""
        raise TypeError("A SecureChannel cannot be pickled or copied. Make a new one with a handshake.")


def _bound(header: bytes, epoch: int, associated: bytes) -> bytes:
    return framed(header, epoch.to_bytes(8, "big"), associated)
