"""The channel: nonces never repeat, and whatever happens to records is noticed."""

import copy
import os
import pickle
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto import AuthenticationError, ChannelError, ChannelLimits, SecureChannel
from dp_flash_attention.crypto import channel as module


def make_ends(limits=None):
    one, other = bytes(range(64)), bytes(range(64, 128))
    make = lambda send, receive: SecureChannel(  # noqa: E731
        send_secret=send, receive_secret=receive, peer_key_id="peer", binding=bytes(32), limits=limits
    )
    return make(one, other), make(other, one)


def spy_on_nonces(monkeypatch):
    used = []

    def encrypt(key, nonce, plaintext, associated, original=module.aead_encrypt):
        used.append((key, nonce))
        return original(key, nonce, plaintext, associated)

    monkeypatch.setattr(module, "aead_encrypt", encrypt)
    return used


def test_records_arrive_in_both_directions():
    here, there = make_ends()
    for text in (b"", b"x", bytes(100_000)):
        assert there.open(here.seal(text, associated=b"a"), associated=b"a") == text
        assert here.open(there.seal(text)) == text


def test_a_record_is_as_long_as_documented_and_hides_its_content():
    here, _ = make_ends()
    record = here.seal(b"secret text")
    assert len(record) == 1 + 8 + 11 + 16
    assert b"secret" not in record


@settings(max_examples=80)
@given(data=st.data())
def test_any_altered_byte_breaks_the_channel(data):
    here, there = make_ends()
    record = bytearray(here.seal(b"some text", associated=b"bound"))
    position = data.draw(st.integers(0, len(record) - 1))
    record[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(AuthenticationError):
        there.open(bytes(record), associated=b"bound")
    with pytest.raises(ChannelError, match="broken"):
        there.open(here.seal(b"next"))
    with pytest.raises(ChannelError, match="broken"):
        there.seal(b"answer")


@pytest.mark.parametrize("associated", [b"", b"boun", b"bound "])
def test_associated_data_is_bound(associated):
    here, there = make_ends()
    with pytest.raises(AuthenticationError):
        there.open(here.seal(b"text", associated=b"bound"), associated=associated)


def test_a_replay_is_noticed():
    here, there = make_ends()
    record = here.seal(b"pay once")
    there.open(record)
    with pytest.raises(AuthenticationError, match="record 0 came before"):
        there.open(record)


def test_a_missing_or_moved_record_is_noticed():
    here, there = make_ends()
    here.seal(b"first")
    with pytest.raises(AuthenticationError, match="records before it are missing"):
        there.open(here.seal(b"second"))


def test_a_renumbered_record_is_noticed():
    here, there = make_ends()
    here.seal(b"first")
    second = here.seal(b"second")
    with pytest.raises(AuthenticationError, match="not what the other end sealed"):
        there.open(second[:1] + bytes(8) + second[9:])


def test_a_reflected_record_is_noticed():
    here, _ = make_ends()
    with pytest.raises(AuthenticationError):
        here.open(here.seal(b"mirror"))


@pytest.mark.parametrize("cut", [0, 1, 9, 24, -1])
def test_a_shortened_record_is_noticed(cut):
    here, there = make_ends()
    with pytest.raises(AuthenticationError):
        there.open(here.seal(b"text")[:cut])


def test_a_cut_off_stream_is_noticed_and_a_whole_one_is_not():
    here, there = make_ends()
    there.open(here.seal(b"text"))
    with pytest.raises(AuthenticationError, match="cut off"):
        there.require_complete()
    assert there.open(here.close()) is None
    there.require_complete()


def test_a_data_record_does_not_pass_for_a_close():
    here, there = make_ends()
    record = here.seal(b"")
    with pytest.raises(AuthenticationError):
        there.open(b"\x01" + record[1:])


def test_nothing_follows_a_close():
    here, there = make_ends()
    there.open(here.close())
    with pytest.raises(ChannelError, match="closed"):
        here.seal(b"more")
    with pytest.raises(ChannelError, match="has closed"):
        there.open(b"anything")
    # The other direction is its own.
    assert here.open(there.seal(b"still")) == b"still"


def test_no_nonce_repeats_under_a_key(monkeypatch):
    used = spy_on_nonces(monkeypatch)
    here, there = make_ends(ChannelLimits(max_records=7))
    for number in range(100):
        here.seal(bytes(number))
        there.seal(bytes(number))
        if number % 10 == 0:
            here.rekey()
    assert len(used) == len(set(used)) == 200
    assert len({key for key, _ in used}) > 20


def test_threads_do_not_share_a_nonce(monkeypatch):
    used = spy_on_nonces(monkeypatch)
    here, _ = make_ends()
    threads = [threading.Thread(target=lambda: [here.seal(b"x") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(used) == len(set(used)) == 800


def test_a_nonce_is_taken_and_used_under_the_lock(monkeypatch):
    here, there = make_ends()
    record, held = there.seal(b"x"), []
    for name in ("aead_encrypt", "aead_decrypt"):
        right = getattr(module, name)

        def watched(*arguments, right=right, **options):
            held.append(here._lock.locked())
            return right(*arguments, **options)

        monkeypatch.setattr(module, name, watched)
    here.seal(b"x")
    here.open(record)
    here.close()
    assert held == [True] * 3


def test_a_child_process_cannot_use_the_channel(monkeypatch):
    here, _ = make_ends()
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    for attempt in (lambda: here.seal(b"x"), lambda: here.open(b"x"), here.close):
        with pytest.raises(ChannelError, match="not to its child"):
            attempt()


def test_the_channel_cannot_be_copied():
    here, _ = make_ends()
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            attempt(here)


def test_sequence_numbers_end_before_they_wrap():
    here, there = make_ends()
    here._send.sequence = there._receive.sequence = 2**64 - 1
    assert there.open(here.seal(b"last")) == b"last"
    with pytest.raises(ChannelError, match="sequence numbers"):
        here.seal(b"one too many")


@pytest.mark.parametrize(
    ("limits", "epochs"),
    [
        (ChannelLimits(max_records=1), 6),
        (ChannelLimits(max_records=3), 2),
        (ChannelLimits(max_bytes=1), 6),
        (ChannelLimits(), 0),
    ],
)
def test_keys_change_at_the_limits_and_both_ends_follow(limits, epochs):
    here, there = make_ends(limits)
    keys = set()
    for number in range(6):
        keys.add(here._send._key)
        assert there.open(here.seal(b"text %d" % number)) == b"text %d" % number
    assert here._send.epoch == there._receive.epoch == epochs
    assert len(keys) == max(1, epochs)


def test_a_wanted_rekey_happens_once():
    here, there = make_ends()
    here.rekey()
    for number in range(3):
        assert there.open(here.seal(bytes(number))) == bytes(number)
    assert here._send.epoch == 1


def test_the_rekey_flag_is_authenticated():
    here, there = make_ends()
    record = here.seal(b"text")
    with pytest.raises(AuthenticationError):
        there.open(bytes([record[0] ^ 0x80]) + record[1:])


def test_an_old_key_does_not_follow_from_the_next():
    here, _ = make_ends()
    before = here._send._secret
    here._send.ratchet()
    assert here._send._secret != before
    assert before not in (here._send._key, here._send._secret)


def test_long_plaintexts_and_wrong_limits_are_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_PLAINTEXT_BYTES", 10)
    here, there = make_ends()
    with pytest.raises(InvalidInputError, match="pieces"):
        here.seal(bytes(11))
    with pytest.raises(AuthenticationError, match="none of this channel"):
        there.open(bytes(36))
    for wrong in ({"max_records": 0}, {"max_bytes": -1}, {"max_records": 1.5}):
        with pytest.raises(InvalidInputError):
            ChannelLimits(**wrong)


def test_the_repr_shows_no_key():
    here, _ = make_ends()
    assert repr(here) == "SecureChannel(peer peer)"
