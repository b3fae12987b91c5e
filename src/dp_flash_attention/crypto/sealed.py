"""Sealing: bytes or streams that only the chosen recipients can open.

    "DPFASEAL" ‖ version (1) ‖ header length (4) ‖ header ‖ HMAC-SHA3-512 of all of it (64) ‖ salt (32) ‖ chunks

The header holds, for each recipient, key id, algorithm, KEM ciphertext and the file key encrypted under the shared
secret. The MAC is keyed by the file key, so a file key fits one header only. The payload goes in chunks of 64 KiB
under AES-256-GCM with the nonce ``counter (11) ‖ last chunk (1)`` (STREAM, Hoang et al. 2015): a chunk that is
missing, moved or cut off is noticed, and memory stays small whatever the file's size.

Sealing says nothing about who sealed, and each recipient could seal something else to the others: sign first.
"""

from __future__ import annotations

import hashlib
import hmac
import io
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.errors import AuthenticationError
from dp_flash_attention.crypto.keys import KEMS, DecapsulationKey, EncapsulationKey
from dp_flash_attention.crypto.library import (
    AEAD_KEY_BYTES,
    AEAD_TAG_BYTES,
    NONCE_BYTES,
    aead_decrypt,
    aead_encrypt,
    derive,
    framed,
    fresh_secret,
)

CHUNK_BYTES = 1 << 16
MAX_RECIPIENTS = 256
_MAGIC = b"DPFASEAL\x01"
_LABEL = b"dpfa.sealed.v1"
_MAC_BYTES = 64
_SALT_BYTES = 32
_KEY_ID_BYTES = 16
_WRAPPED_BYTES = AEAD_KEY_BYTES + AEAD_TAG_BYTES
_MAX_HEADER_BYTES = MAX_RECIPIENTS * 2048
_ALTERED = "the sealed file is damaged or was altered; nothing of it was kept. Ask for it again."


def seal(plaintext: bytes, recipients: Sequence[EncapsulationKey]) -> bytes:
    """Returns bytes that any of the recipients can open; see ``seal_stream``."""
    target = io.BytesIO()
    seal_stream(io.BytesIO(plaintext), target, recipients)
    return target.getvalue()


def unseal(sealed: bytes, key: DecapsulationKey) -> bytes:
    """Returns what was sealed; see ``unseal_stream``."""
    target = io.BytesIO()
    unseal_stream(io.BytesIO(sealed), target, key)
    return target.getvalue()


def seal_stream(source: BinaryIO, target: BinaryIO, recipients: Sequence[EncapsulationKey]) -> None:
    """Seals a stream to recipients.

    Guarantees:
        Not a privacy mechanism. Public: the recipients' key ids, the length. Theorem: confidential against chosen
        ciphertexts if the hybrid KEM is IND-CCA and AES-256-GCM an AEAD; the recipient notices any change that was
        not made by another recipient. Source: KEM/DEM composition (Cramer & Shoup 2003, section 7); STREAM (Hoang,
        Reyhanitabar, Rogaway & Vizár 2015).

    Args:
        source: Read to its end.
        target: Where the sealed bytes go.
        recipients: 1 to 256 different keys.

    Raises:
        InvalidInputError: If there are too few or too many recipients, or one twice.
        DependencyMissingError: If ``cryptography`` has no ML-KEM.
    """
    ids = {key.key_id for key in recipients}
    if not 1 <= len(ids) <= MAX_RECIPIENTS or len(ids) != len(recipients):
        raise InvalidInputError(
            "recipients",
            f"{len(recipients)} keys, {len(ids)} of them different",
            bound=f"1 to {MAX_RECIPIENTS} different keys",
            remedy="Name each recipient once.",
        )
    file_key, salt = fresh_secret(AEAD_KEY_BYTES), fresh_secret(_SALT_BYTES)
    header = b"".join(_wrap(file_key, key) for key in recipients)
    start = _MAGIC + len(header).to_bytes(4, "big") + header
    target.write(start + _mac(file_key, start) + salt)
    key = _payload_key(file_key, salt)
    for counter, (chunk, last) in enumerate(_chunks(source, CHUNK_BYTES)):
        target.write(aead_encrypt(key, _nonce(counter, last=last), chunk, b""))


def unseal_stream(source: BinaryIO, target: BinaryIO, key: DecapsulationKey) -> None:
    """Opens what ``seal_stream`` made.

    Each chunk is authentic when it is written, but the end may still be missing: keep ``target`` aside until this
    returns, and throw it away if it raises.

    Raises:
        AuthenticationError: If the bytes are foreign, damaged, altered, cut off, or sealed to others only.
    """
    prefix = _exactly(source, len(_MAGIC) + 4)
    length = int.from_bytes(prefix[len(_MAGIC) :], "big")
    if prefix[: len(_MAGIC)] != _MAGIC or len(prefix) != len(_MAGIC) + 4:
        raise AuthenticationError("this is not a sealed file. Pass the one that dpfa certificate seal wrote.")
    if length > _MAX_HEADER_BYTES:
        raise AuthenticationError(_ALTERED)
    header, mac, salt = (_exactly(source, size) for size in (length, _MAC_BYTES, _SALT_BYTES))
    file_key = _unwrap(header, key)
    if len(salt) != _SALT_BYTES or not hmac.compare_digest(mac, _mac(file_key, prefix + header)):
        raise AuthenticationError(_ALTERED)
    payload_key = _payload_key(file_key, salt)
    for counter, (chunk, last) in enumerate(_chunks(source, CHUNK_BYTES + AEAD_TAG_BYTES)):
        nonce = _nonce(counter, last=last)
        target.write(aead_decrypt(payload_key, nonce, chunk, b"", otherwise=_ALTERED))


def _wrap(file_key: bytes, recipient: EncapsulationKey) -> bytes:
    shared, ciphertext = recipient.encapsulate(context=_LABEL)
    who = _who(recipient)
    return (
        who
        + ciphertext
        + aead_encrypt(derive(shared, salt=_LABEL, info=who), bytes(NONCE_BYTES), file_key, who)
    )


def _who(key: EncapsulationKey) -> bytes:
    name = key.algorithm.encode("ascii")
    return bytes.fromhex(key.key_id) + bytes([len(name)]) + name


def _unwrap(header: bytes, key: DecapsulationKey) -> bytes:
    for who, ciphertext, wrapped in _stanzas(header):
        if who != _who(key.public):
            continue
        try:
            shared = key.decapsulate(ciphertext, context=_LABEL)
        except InvalidInputError as error:
            raise AuthenticationError(_ALTERED) from error
        wrapping = derive(shared, salt=_LABEL, info=who)
        return aead_decrypt(wrapping, bytes(NONCE_BYTES), wrapped, who, otherwise=_ALTERED)
    raise AuthenticationError(
        f"the file is not sealed to key {key.key_id}. Open it with the key of a recipient, or ask for it again."
    )


def _stanzas(header: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    position = 0
    while position < len(header):
        name_length = header[position + _KEY_ID_BYTES] if position + _KEY_ID_BYTES < len(header) else 0
        end = position + _KEY_ID_BYTES + 1 + name_length
        who = header[position:end]
        name = who[_KEY_ID_BYTES + 1 :].decode("ascii", errors="replace")
        if name not in KEMS:
            raise AuthenticationError(_ALTERED)
        middle = end + KEMS[name].ciphertext_bytes
        position = middle + _WRAPPED_BYTES
        if position > len(header):
            raise AuthenticationError(_ALTERED)
        yield who, header[end:middle], header[middle:position]


def _mac(file_key: bytes, start: bytes) -> bytes:
    key = derive(file_key, salt=_LABEL, info=b"header", num_bytes=64)
    return hmac.new(key, start, hashlib.sha3_512).digest()


def _payload_key(file_key: bytes, salt: bytes) -> bytes:
    return derive(file_key, salt=salt, info=framed(_LABEL, b"payload"))


def _nonce(counter: int, *, last: bool) -> bytes:
    return counter.to_bytes(NONCE_BYTES - 1, "big") + bytes([last])


def _chunks(source: BinaryIO, size: int) -> Iterator[tuple[bytes, bool]]:
    """Yields chunks with whether they are the last; an empty stream is one empty chunk."""
    chunk = _exactly(source, size)
    while len(chunk) == size and (following := _exactly(source, size)):
        yield chunk, False
        chunk = following
    yield chunk, True


def _exactly(source: BinaryIO, size: int) -> bytes:
    """Reads ``size`` bytes, or what is left; a pipe may give less at a time."""
    parts = []
    while size > 0 and (part := source.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
