"""The handshake: who is at the other end, and what an attacker in the middle can do (nothing)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto import AuthenticationError, ChannelError, Initiator, Responder, SigningKey
from dp_flash_attention.crypto.library import aead_decrypt, aead_encrypt, derive, framed

ALICE, BOB, MALLORY = (SigningKey("ed25519_ml_dsa_65", bytes([number]) * 64) for number in (1, 2, 3))


def ends(initiator=None, responder=None):
    return (
        Initiator(ALICE, [BOB.public], **(initiator or {})),
        Responder(BOB, [ALICE.public], **(responder or {})),
    )


def carried_out(one, other):
    answer, channel = one.finish(other.respond(one.start()))
    return channel, other.finish(answer)


@pytest.mark.parametrize("algorithm", ["x25519_ml_kem_768", "x25519_ml_kem_1024"])
def test_both_ends_get_one_channel_and_know_each_other(algorithm):
    options = {"algorithm": algorithm, "context": b"round 3"}
    here, there = carried_out(*ends(options, options))
    assert there.open(here.seal(b"question")) == b"question"
    assert here.open(there.seal(b"answer")) == b"answer"
    assert (here.peer_key_id, there.peer_key_id) == (BOB.key_id, ALICE.key_id)
    assert here.binding == there.binding
    assert len(here.binding) == 32


def test_identities_of_different_strengths_meet():
    strong = SigningKey.generate("ed25519_ml_dsa_87")
    here, there = carried_out(Initiator(strong, [BOB.public]), Responder(BOB, [strong.public]))
    assert there.open(here.seal(b"x")) == b"x"


def test_every_handshake_has_its_own_keys():
    channels = [carried_out(*ends())[0] for _ in range(3)]
    assert len({channel.binding for channel in channels}) == 3
    assert len({channel.seal(b"x") for channel in channels}) == 3


def test_directions_have_different_keys():
    here, there = carried_out(*ends())
    assert here._send._key != here._receive._key
    assert here._send._key == there._receive._key


def test_an_unknown_responder_is_refused():
    one, other = Initiator(ALICE, [BOB.public]), Responder(MALLORY, [ALICE.public])
    with pytest.raises(AuthenticationError, match=MALLORY.key_id):
        one.finish(other.respond(one.start()))


def test_an_unknown_initiator_is_refused():
    one, other = Initiator(MALLORY, [BOB.public]), Responder(BOB, [ALICE.public])
    answer, _ = one.finish(other.respond(one.start()))
    with pytest.raises(AuthenticationError, match="not among the 1 trusted"):
        other.finish(answer)


def test_a_claimed_identity_without_its_key_is_refused():
    # Mallory says that she is Bob, and signs with her own key.
    impostor = SigningKey("ed25519_ml_dsa_65", MALLORY.export())
    impostor.public = BOB.public
    one, other = Initiator(ALICE, [BOB.public]), Responder(impostor, [ALICE.public])
    with pytest.raises(AuthenticationError, match="signature"):
        one.finish(other.respond(one.start()))


def proof_key(end, role):
    return derive(end._secret, salt=end._transcript, info=framed(b"dpfa.handshake.v1", b"proof", role))


def test_a_proof_carried_over_from_another_handshake_is_refused():
    # Mallory talks to Bob with an exchange of her own, takes his proof, and encrypts it anew for Alice.
    mallory, bob = Initiator(MALLORY, [BOB.public]), Responder(BOB, [MALLORY.public])
    second = bob.respond(mallory.start())
    ciphertext, proof = second[38 : 38 + 1120], second[38 + 1120 :]
    mallory._absorb(second[6:38], ciphertext)
    mallory._secret = mallory._ephemeral.decapsulate(ciphertext, context=b"dpfa.handshake.v1")
    taken = aead_decrypt(proof_key(mallory, b"responder"), bytes(12), proof, b"responder", otherwise="no")
    assert BOB.public.public in taken

    alice, false_bob = Initiator(ALICE, [BOB.public]), Responder(MALLORY, [ALICE.public])
    false_bob._prove = lambda role: aead_encrypt(proof_key(false_bob, role), bytes(12), taken, role)
    with pytest.raises(AuthenticationError, match="signature"):
        alice.finish(false_bob.respond(alice.start()))


def test_a_proof_with_something_behind_it_is_refused():
    alice, bob = ends()
    right = bob._prove

    def longer(role):
        inner = aead_decrypt(proof_key(bob, role), bytes(12), right(role), role, otherwise="no")
        return aead_encrypt(proof_key(bob, role), bytes(12), inner + b"\0", role)

    bob._prove = longer
    with pytest.raises(AuthenticationError):
        alice.finish(bob.respond(alice.start()))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_altered_byte_of_a_message_ends_the_handshake(number):
    @settings(max_examples=40)
    @given(data=st.data())
    def attempt(data):
        def carried(message, mine):
            if mine != number:
                return message
            altered = bytearray(message)
            altered[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
            return bytes(altered)

        def whole():
            one, other = ends()
            answer, _ = one.finish(carried(other.respond(carried(one.start(), 1)), 2))
            other.finish(carried(answer, 3))

        with pytest.raises(AuthenticationError):
            whole()

    attempt()


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("cut", [0, 5, 40, 1000, -1])
def test_a_shortened_message_ends_the_handshake(number, cut):
    def whole():
        one, other = ends()
        first = one.start()
        second = other.respond(first[:cut] if number == 1 else first)
        third, _ = one.finish(second[:cut] if number == 2 else second)
        other.finish(third[:cut])

    with pytest.raises(AuthenticationError):
        whole()


def test_a_lengthened_first_message_ends_the_handshake():
    one, other = ends()
    with pytest.raises(AuthenticationError, match="longer"):
        other.respond(one.start() + b"\0")


def test_a_replayed_third_message_does_not_open_another_handshake():
    one, other = ends()
    first = one.start()
    answer, _ = one.finish(other.respond(first))
    again = Responder(BOB, [ALICE.public])
    again.respond(first)
    with pytest.raises(AuthenticationError):
        again.finish(answer)


def test_a_message_reflected_to_its_sender_is_refused():
    one, _ = ends()
    with pytest.raises(AuthenticationError):
        one.finish(one.start())


def test_a_responders_proof_is_none_of_an_initiator():
    # Both trust both, as peers do: roles must not be exchangeable.
    keys = [ALICE.public, BOB.public]
    one, other = Initiator(ALICE, keys), Responder(BOB, keys)
    second = other.respond(one.start())
    with pytest.raises(AuthenticationError):
        other.finish(second[:5] + b"\x03" + second[6 + 32 + 1120 :])


@pytest.mark.parametrize(
    "responder", [{"context": b"other"}, {"algorithm": "x25519_ml_kem_1024"}], ids=["context", "algorithm"]
)
def test_ends_that_mean_different_things_do_not_meet(responder):
    with pytest.raises(AuthenticationError):
        carried_out(*ends({"context": b"this"}, {"context": b"this"} | responder))


def test_a_degenerate_key_or_ciphertext_is_refused():
    one, other = ends()
    first = one.start()
    with pytest.raises(AuthenticationError, match="holds no key"):
        other.respond(first[:-32] + bytes(32))
    one, other = ends()
    second = other.respond(one.start())
    curve = slice(6 + 32 + 1088, 6 + 32 + 1120)
    with pytest.raises(AuthenticationError, match="holds no ciphertext"):
        one.finish(second[: curve.start] + bytes(32) + second[curve.stop :])


def test_an_end_is_used_once_and_in_order():
    one, other = ends()
    with pytest.raises(ChannelError, match="new"):
        one.finish(b"")
    first = one.start()
    with pytest.raises(ChannelError, match="waiting for message 2"):
        one.start()
    with pytest.raises(ChannelError):
        other.finish(b"")
    second = other.respond(first)
    with pytest.raises(ChannelError):
        other.respond(first)
    one.finish(second)
    with pytest.raises(ChannelError, match="finished"):
        one.finish(second)


def test_an_end_that_failed_stays_broken():
    one, other = ends()
    second = other.respond(one.start())
    with pytest.raises(AuthenticationError):
        one.finish(second[:-1])
    with pytest.raises(ChannelError, match="broken"):
        one.finish(second)


def test_nobody_trusted_or_an_unknown_algorithm_is_refused():
    with pytest.raises(InvalidInputError, match="at least one key"):
        Initiator(ALICE, [])
    with pytest.raises(InvalidInputError, match="one of x25519"):
        Responder(BOB, [ALICE.public], algorithm="x25519")


def test_identities_are_not_on_the_wire():
    one, other = ends()
    first = one.start()
    second = other.respond(first)
    third, _ = one.finish(second)
    wire = first + second + third
    for key in (ALICE, BOB):
        assert key.public.public[:32] not in wire
        assert key.public.public[32:64] not in wire
