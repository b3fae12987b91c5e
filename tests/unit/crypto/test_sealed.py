"""Sealing: recipients open, nobody else does, and every change is noticed."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto import AuthenticationError, DecapsulationKey, seal, seal_stream, unseal
from dp_flash_attention.crypto.sealed import CHUNK_BYTES, unseal_stream

BOB = DecapsulationKey("x25519_ml_kem_768", bytes(range(96)))
CAROL = DecapsulationKey("x25519_ml_kem_1024", bytes(range(96, 192)))
EVE = DecapsulationKey("x25519_ml_kem_768", bytes(96))
HEADER = 16 + 1 + len("x25519_ml_kem_768") + 1120 + 48
PAYLOAD = 9 + 4 + HEADER + 64 + 32


@pytest.mark.parametrize(
    "size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 5]
)
def test_what_is_sealed_opens(size):
    text = bytes(index % 251 for index in range(size))
    sealed = seal(text, [BOB.public])
    chunks = max(1, -(-size // CHUNK_BYTES))
    assert len(sealed) == PAYLOAD + size + 16 * chunks
    assert unseal(sealed, BOB) == text


def test_each_recipient_opens_and_nobody_else():
    sealed = seal(b"secret text", [BOB.public, CAROL.public])
    assert unseal(sealed, BOB) == unseal(sealed, CAROL) == b"secret text"
    with pytest.raises(AuthenticationError, match=f"not sealed to key {EVE.key_id}"):
        unseal(sealed, EVE)


def test_sealing_twice_gives_different_bytes():
    first, second = seal(b"text", [BOB.public]), seal(b"text", [BOB.public])
    assert first[9 + 4 + 40 :] != second[9 + 4 + 40 :]
    assert b"text" not in first


@settings(max_examples=150)
@given(data=st.data())
def test_any_altered_byte_is_noticed(data):
    sealed = bytearray(seal(bytes(200), [BOB.public]))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(AuthenticationError):
        unseal(bytes(sealed), BOB)


def test_an_altered_stanza_of_another_recipient_is_noticed():
    sealed = bytearray(seal(b"text", [BOB.public, CAROL.public]))
    sealed[9 + 4 + HEADER + 60] ^= 1  # Carol's ciphertext; Bob does not need it, but the header is bound
    with pytest.raises(AuthenticationError, match="altered"):
        unseal(bytes(sealed), BOB)


@settings(max_examples=60)
@given(cut=st.integers(0, PAYLOAD + 216 - 1))
def test_any_truncation_is_noticed(cut):
    sealed = seal(bytes(200), [BOB.public])
    with pytest.raises(AuthenticationError):
        unseal(sealed[:cut], BOB)


def test_chunks_cannot_be_dropped_moved_repeated_or_added():
    sealed = seal(bytes(3 * CHUNK_BYTES + 5), [BOB.public])
    size = CHUNK_BYTES + 16
    start, payload = sealed[:PAYLOAD], sealed[PAYLOAD:]
    chunks = [payload[position : position + size] for position in range(0, len(payload), size)]
    assert len(chunks) == 4
    first, second, third, last = chunks
    for order in (
        [first, second, third],
        [first, second],
        [first, third, second, last],
        [first, first, third, last],
        [second, third, last],
        [first, second, third, last, last],
        [last],
        [],
    ):
        with pytest.raises(AuthenticationError):
            unseal(start + b"".join(order), BOB)


def test_a_whole_last_chunk_cannot_be_dropped():
    sealed = seal(bytes(2 * CHUNK_BYTES), [BOB.public])
    with pytest.raises(AuthenticationError):
        unseal(sealed[: PAYLOAD + CHUNK_BYTES + 16], BOB)


def test_a_payload_does_not_move_to_another_header():
    one, other = seal(b"text", [BOB.public]), seal(b"text", [BOB.public])
    with pytest.raises(AuthenticationError):
        unseal(one[:PAYLOAD] + other[PAYLOAD:], BOB)
    with pytest.raises(AuthenticationError):
        unseal(one[: 9 + 4 + HEADER] + other[9 + 4 + HEADER :], BOB)


@pytest.mark.parametrize("foreign", [b"", b"DPFASEAL", b"PK\x03\x04zip", b"DPFASEAL\x02" + bytes(100)])
def test_foreign_bytes_are_named(foreign):
    with pytest.raises(AuthenticationError, match="not a sealed file"):
        unseal(foreign, BOB)


def test_a_header_that_claims_too_much_is_not_read():
    class Counting(io.BytesIO):
        asked = 0

        def read(self, size=-1):
            self.asked = max(self.asked, size)
            return super().read(size)

    source = Counting(b"DPFASEAL\x01" + b"\xff" * 4 + bytes(10_000))
    with pytest.raises(AuthenticationError):
        unseal_stream(source, io.BytesIO(), BOB)
    assert source.asked < 100


def test_recipients_are_counted():
    for recipients in ([], [BOB.public, BOB.public], [BOB.public] * 300):
        with pytest.raises(InvalidInputError, match="1 to 256 different"):
            seal(b"text", recipients)


def test_a_source_that_gives_little_at_a_time_is_read_whole():
    class Dripping(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 1000))

    text, target = bytes(range(256)) * 500, io.BytesIO()
    seal_stream(Dripping(text), target, [BOB.public])
    opened = io.BytesIO()
    unseal_stream(Dripping(target.getvalue()), opened, BOB)
    assert opened.getvalue() == text


def test_nothing_is_written_before_the_header_is_good():
    sealed = bytearray(seal(b"text", [BOB.public]))
    sealed[9 + 4 + HEADER] ^= 1
    target = io.BytesIO()
    with pytest.raises(AuthenticationError):
        unseal_stream(io.BytesIO(bytes(sealed)), target, BOB)
    assert target.getvalue() == b""
