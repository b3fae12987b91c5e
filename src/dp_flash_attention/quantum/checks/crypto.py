"""Checks of keys, signatures, channel, TLS and the security estimate.

Known answers come from kyber-py and dilithium-py, which share no code with ``cryptography``; they are in
``crypto_vectors.json`` and ``tests/data/make_crypto_vectors.py`` makes them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from dp_flash_attention.core.errors import DependencyMissingError, InvalidInputError
from dp_flash_attention.quantum.evidence import Evidence, NamedCheck
from dp_flash_attention.quantum.known_answers import counted, from_base64, read_vectors, sha3_256

# What the submissions state for the primal attack on keys, in bits: block size, classical, quantum (Kyber
# specification 3.02, table 4; Dilithium specification 3.1, table 1). The two differ from the formula's answer by the
# simulated shape of the basis, hence the tolerances.
_PUBLISHED = {
    "ML-KEM-768": (625, 182, 165),
    "ML-KEM-1024": (877, 256, 232),
    "ML-DSA-65": (624, 182, 165),
    "ML-DSA-87": (863, 252, 229),
}
_BLOCK_TOLERANCE, _BITS_TOLERANCE = 3, 1.0
# Bits against a quantum computer that follow from lengths alone: half the key, half the capacity, two thirds of the
# key for a claw, none against Shor's algorithm. A lattice with a curve has to reach what NIST's category 5 search has.
_SEARCHED = {
    "AES-256": 128,
    "ChaCha20": 128,
    "shake256, uniform 512-bit seed": 256,
    "sha3-512-counter, uniform 512-bit seed": 256,
    "XOR of two ciphers with 256-bit keys": 170,
    "X25519": 0,
    "Ed25519": 0,
}
_LEAST_BITS = 128


def crypto_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Whether to alter every byte of a signature and a record rather than a sample of them.
    """
    return [
        ("known answers of ML-KEM", known_answers_of_ml_kem),
        ("known answers of ML-DSA", known_answers_of_ml_dsa),
        ("hybrid key agreement", hybrid_key_agreement),
        ("altered signatures", lambda: altered_signatures(step=1 if deep else 97)),
        ("altered records", lambda: altered_records(step=1 if deep else 7)),
        ("TLS key agreement", tls_key_agreement),
        ("core-SVP against published figures", published_core_svp),
        ("security estimate", security_of_primitives),
        ("security of the noise's seed", seed_security),
    ]


def known_answers_of_ml_kem() -> Iterator[Evidence]:
    """Yields whether ML-KEM gives the answers of an independent implementation."""
    from dp_flash_attention.crypto import ml_kem_768, ml_kem_1024

    for scheme in (ml_kem_768, ml_kem_1024):
        cases = _vectors()[scheme.name]
        good = 0
        for case in cases:
            seed, ciphertext = from_base64(case["seed"]), from_base64(case["ciphertext"])
            altered = bytes([ciphertext[0] ^ 1]) + ciphertext[1:]
            good += (
                sha3_256(scheme.public_key(seed)) == case["public_key_sha3_256"]
                and scheme.decapsulate(seed, ciphertext).hex() == case["shared_secret"]
                and scheme.decapsulate(seed, altered).hex() == case["shared_secret_of_altered"]
            )
        yield counted(
            f"{scheme.name}: known answers",
            "Key generation, decapsulation and implicit rejection of FIPS 203 give kyber-py's answers.",
            good,
            len(cases),
        )


def known_answers_of_ml_dsa() -> Iterator[Evidence]:
    """Yields whether ML-DSA accepts an independent implementation's signatures, and refuses them once altered."""
    from dp_flash_attention.crypto import ml_dsa_65, ml_dsa_87

    for scheme in (ml_dsa_65, ml_dsa_87):
        cases = _vectors()[scheme.name]
        good = 0
        for case in cases:
            public = scheme.public_key(from_base64(case["seed"]))
            message, signature = from_base64(case["message"]), from_base64(case["signature"])
            context = from_base64(case["context"])
            right = _accepts(partial(scheme.verify, public, message, signature, context=context))
            wrong = _accepts(partial(scheme.verify, public, message + b"x", signature, context=context))
            good += sha3_256(public) == case["public_key_sha3_256"] and right and not wrong
        yield counted(
            f"{scheme.name}: known answers",
            "Key generation of FIPS 204 gives dilithium-py's keys; its signatures verify, for its messages only.",
            good,
            len(cases),
        )


def hybrid_key_agreement() -> Iterator[Evidence]:
    """Yields whether both ends agree, and whether the secret is the combiner's of both halves."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    from dp_flash_attention.crypto import x25519_ml_kem_768, x25519_ml_kem_1024

    for scheme in (x25519_ml_kem_768, x25519_ml_kem_1024):
        seed = scheme.generate()
        public = scheme.public_key(seed)
        shared, ciphertext = scheme.encapsulate(public, context=b"check")
        # The combiner again, from its definition in crypto.hybrid.
        lattice = scheme.ml_kem.decapsulate(seed[:64], ciphertext[:-32])
        curve = X25519PrivateKey.from_private_bytes(seed[64:]).exchange(
            X25519PublicKey.from_public_bytes(ciphertext[-32:])
        )
        label = f"dpfa.hybrid-kem.v1.{scheme.name}".encode()
        text = b"\0\0\0\1" + lattice + curve + ciphertext + public + label + (5).to_bytes(8, "big") + b"check"
        expected = hashlib.sha3_512(text).digest()[:32]
        agreed = scheme.decapsulate(seed, ciphertext, context=b"check") == shared == expected
        altered = bytes([ciphertext[0] ^ 1]) + ciphertext[1:]
        moved = ciphertext[:-1] + bytes([ciphertext[-1] ^ 1])
        others = {
            scheme.decapsulate(seed, altered, context=b"check"),
            scheme.decapsulate(seed, moved, context=b"check"),
            scheme.decapsulate(seed, ciphertext, context=b"other"),
        }
        yield Evidence(
            name=f"{scheme.name}: agreement",
            claim="Both ends get one secret, made of both halves; altering either half or the context changes it.",
            measured=f"{'agreed' if agreed else 'not agreed'}; {len(others - {shared})} of 3 alterations changed it",
            bound="agreed; 3 of 3",
            holds=agreed and len(others - {shared}) == 3,
        )


def altered_signatures(*, step: int) -> Iterator[Evidence]:
    """Yields whether altered signatures are refused.

    Args:
        step: Every how many bytes one is altered.
    """
    from dp_flash_attention.crypto import SigningKey

    for algorithm in ("ed25519_ml_dsa_65", "ed25519_ml_dsa_87"):
        key, message = SigningKey.generate(algorithm), b"a certificate"
        signature = key.sign(message, context=b"check")
        verify = key.public.verify
        accepted = _accepts(partial(verify, message, signature, context=b"check"))
        altered = [
            partial(verify, message, _flipped(signature, position), context=b"check")
            for position in range(0, len(signature), step)
        ]
        altered.append(partial(verify, b"another", signature, context=b"check"))
        altered.append(partial(verify, message, signature, context=b"other"))
        refused = sum(not _accepts(attempt) for attempt in altered)
        yield Evidence(
            name=f"{algorithm}: altered signatures",
            claim="A good signature verifies; none does once a byte of it, the message or the context is another.",
            measured=f"good one {'accepted' if accepted else 'refused'}; {refused} of {len(altered)} refused",
            bound=f"accepted; {len(altered)} of {len(altered)}",
            holds=accepted and refused == len(altered),
        )


def altered_records(*, step: int) -> Iterator[Evidence]:
    """Yields whether a channel refuses records that were altered, replayed, moved or cut off.

    Args:
        step: Every how many bytes one is altered.
    """
    from dp_flash_attention.crypto import Initiator, Responder, SecureChannel, SigningKey

    one, other = SigningKey.generate(), SigningKey.generate()

    def ends() -> tuple[SecureChannel, SecureChannel]:
        initiator, responder = Initiator(one, [other.public]), Responder(other, [one.public])
        answer, sender = initiator.finish(responder.respond(initiator.start()))
        return sender, responder.finish(answer)

    def delivered(choose: Callable[[list[bytes]], list[bytes]]) -> bool:
        sender, receiver = ends()
        records = choose([sender.seal(b"first"), sender.seal(b"second")])
        return _accepts(lambda: [receiver.open(record) for record in records])

    sender, receiver = ends()
    size = len(sender.seal(b"first"))
    attacks: list[Callable[[list[bytes]], list[bytes]]] = [
        partial(_altered_first, position=position) for position in range(0, size, step)
    ]
    attacks += [
        lambda records: [records[0], records[0]],
        lambda records: [records[1]],
        lambda records: [records[0][:-1]],
        lambda records: [records[0] + b"\0"],
    ]
    refused = sum(not delivered(attack) for attack in attacks)
    honest = delivered(lambda records: records)
    truncated = not _accepts(receiver.require_complete)
    numbers = {sender.seal(b"x")[1:9] for _ in range(1000)}
    yield Evidence(
        name="channel: altered records",
        claim="A channel opens what was sealed, in order, once; anything else is refused, a cut-off end is noticed.",
        measured=f"honest records {'opened' if honest else 'refused'}; {refused} of {len(attacks)} attacks refused; "
        f"truncation {'noticed' if truncated else 'missed'}; {len(numbers)} nonces in 1000 records",
        bound=f"opened; {len(attacks)} of {len(attacks)}; noticed; 1000",
        holds=honest and refused == len(attacks) and truncated and len(numbers) == 1000,
    )


def tls_key_agreement() -> Iterator[Evidence]:
    """Yields which group a TLS 1.3 handshake on this machine ends with."""
    from dp_flash_attention.crypto import tls

    found, notes = [], []
    for handshake in (tls.handshake_of_pyopenssl, tls.handshake_of_python):
        try:
            result = handshake()
        except (DependencyMissingError, OSError) as error:
            notes.append(" ".join(str(error).split()))
            continue
        found.append(result.is_hybrid)
        hint = "" if result.is_hybrid else " (a hybrid group is not available on this OpenSSL)"
        notes.append(f"{result.group} by {result.library}{hint}")
    yield Evidence(
        name="TLS 1.3: negotiated group",
        claim="A TLS 1.3 handshake of this installation, with default settings, ends with a hybrid key agreement.",
        measured="; ".join(notes),
        bound="a hybrid group, such as X25519MLKEM768, by at least one library; only that one may be relied on",
        holds=any(found),
    )


def published_core_svp() -> Iterator[Evidence]:
    """Yields whether the estimator gives the schemes' own published figures."""
    from dp_flash_attention.quantum import primitive_costs

    for name, (block, classical, quantum) in _PUBLISHED.items():
        attack = primitive_costs.attacks(name)[0]
        holds = (
            abs(attack.block_size - block) <= _BLOCK_TOLERANCE
            and abs(math.floor(attack.classical_bits) - classical) <= _BITS_TOLERANCE
            and abs(math.floor(attack.quantum_bits) - quantum) <= _BITS_TOLERANCE
        )
        yield Evidence(
            name=f"{name}: core-SVP, primal attack",
            claim="The estimator reproduces the submission's figures (no proof of hardness: the best known attack).",
            measured=f"block size {attack.block_size}; {attack.classical_bits:.1f} bits classical, "
            f"{attack.quantum_bits:.1f} quantum, assuming that no attack beats BKZ and that one sieve in this block "
            "size is all that counts",
            bound=f"published {block}, {classical}, {quantum}; within {_BLOCK_TOLERANCE} and {_BITS_TOLERANCE:g}",
            holds=holds,
            basis="computed",
        )


def security_of_primitives() -> Iterator[Evidence]:
    """Yields what breaking each primitive costs with a quantum computer, with what that assumes."""
    from dp_flash_attention.quantum.primitive_costs import estimates

    for estimate in estimates():
        found = estimate.quantum.to_dict()["bits"]
        expected = _SEARCHED.get(estimate.primitive)
        if expected is None:
            if "+" not in estimate.primitive:
                continue  # a half of a hybrid: it counts there
            bound, holds = f"at least {_LEAST_BITS} bits", found >= _LEAST_BITS
        else:
            bound, holds = f"{expected} bits", found == expected
        yield Evidence(
            name=f"{estimate.primitive}: estimate",
            claim="The best known quantum attack costs this, under the assumptions that stand beside the figure.",
            measured=str(estimate.quantum),
            bound=bound,
            holds=holds,
            basis="computed",
        )


def seed_security() -> Iterator[Evidence]:
    """Yields what strength the noise's seed gives, and that more cannot be had by asking."""
    from dp_flash_attention.quantum.security_estimate import (
        Bits,
        EntropySource,
        noise_security,
        operating_system_pool,
    )

    pool = operating_system_pool()
    second = EntropySource(name="key file", bits=256, assumption="The key file was drawn by another machine.")
    expected = {
        "AES-256-CTR, operating system alone": (
            noise_security("aes-256-ctr", seed_bits=256, sources=[pool]),
            128,
        ),
        "SHAKE256, 512-bit seed, operating system alone": (
            noise_security("shake256", seed_bits=512, sources=[pool]),
            128,
        ),
        "SHAKE256, 512-bit seed, two sources": (
            noise_security("shake256", seed_bits=512, sources=[pool, second]),
            256,
        ),
    }
    for name, (estimate, bits) in expected.items():
        found = estimate.quantum.to_dict()["bits"]
        yield Evidence(
            name=f"seed: {name}",
            claim="Quantum strength is min(seed entropy / 2, key / 2, capacity / 2) of what was really drawn.",
            measured=str(estimate.quantum),
            bound=f"{bits} bits, and never without assumptions",
            holds=found == bits and len(estimate.quantum.assumptions) > 0,
            basis="computed",
        )
    refused = not _accepts(
        lambda: Bits(128.0, unit="calls", formula="key / 2", source="Grover 1996", assumptions=())
    )
    yield Evidence(
        name="estimate without assumption",
        claim="A figure cannot be made without stating what it assumes.",
        measured="refused" if refused else "made",
        bound="refused",
        holds=refused,
        basis="computed",
    )


def _vectors() -> dict[str, list[dict[str, str]]]:
    vectors: dict[str, list[dict[str, str]]] = read_vectors("crypto_vectors.json")
    return vectors


def _flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def _altered_first(records: list[bytes], *, position: int) -> list[bytes]:
    return [_flipped(records[0], position)]


def _accepts(attempt: Callable[[], Any]) -> bool:
    from dp_flash_attention.crypto import AuthenticationError, ChannelError

    try:
        attempt()
    except (AuthenticationError, ChannelError, InvalidInputError):
        return False
    return True
