"""NIST's own vectors: ML-KEM and ML-DSA give the answers of the programme that validates implementations.

A few cases of the ACVP vectors are in ``acvp_vectors.json``, with source and licence; ``tests/data/make_acvp_vectors.py``
takes them. That they pass is no validation: nothing here went through the programme. Left out is what ``cryptography``
has no interface for: encapsulation with chosen coins, and decapsulation with keys that are given without their seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from dp_flash_attention.quantum.evidence import Evidence, NamedCheck
from dp_flash_attention.quantum.known_answers import counted, from_base64, read_vectors, sha3_256


def acvp_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Taken for the common form; all vectors are always tried.
    """
    return [("keys of ML-KEM and ML-DSA", key_generation), ("signatures of ML-DSA", verification)]


def key_generation() -> Iterator[Evidence]:
    """Yields whether seeds give the public keys that NIST states."""
    from dp_flash_attention.crypto import ml_dsa_65, ml_dsa_87, ml_kem_768, ml_kem_1024

    for scheme in (ml_kem_768, ml_kem_1024, ml_dsa_65, ml_dsa_87):
        cases = _vectors()["key_generation"][scheme.name]
        good = sum(
            sha3_256(scheme.public_key(from_base64(case["seed"]))) == case["public_key_sha3_256"]
            for case in cases
        )
        yield counted(
            f"{scheme.name}: NIST's keys",
            "Seeds give the public keys of NIST's ACVP vectors.",
            good,
            len(cases),
        )


def verification() -> Iterator[Evidence]:
    """Yields whether ML-DSA accepts what NIST's vectors say is good, and refuses what they say is not."""
    for name, group in _vectors()["verification"].items():
        cases = group["cases"]
        good = sum(
            _accepts_internally(
                name,
                from_base64(group["public_key"]),
                from_base64(case["message"]),
                from_base64(case["signature"]),
            )
            == case["passes"]
            for case in cases
        )
        accepted = sum(case["passes"] for case in cases)
        yield counted(
            f"{name}: NIST's signatures",
            f"{accepted} good signature of NIST's ACVP vectors verifies; altered ones, one with too many hints and one "
            "whose z is too large do not.",
            good,
            len(cases),
        )


def _accepts_internally(name: str, public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Returns what ML-DSA.Verify_internal says (FIPS 204, algorithm 8): the message has no context in front of it."""
    from cryptography.exceptions import InvalidSignature

    from dp_flash_attention.crypto.library import asymmetric

    public = getattr(asymmetric("mldsa"), f"{name.upper().replace('_', '')}PublicKey")
    hashed_key = hashlib.shake_256(public_key).digest(64)
    try:
        public.from_public_bytes(public_key).verify_mu(
            signature, hashlib.shake_256(hashed_key + message).digest(64)
        )
    except InvalidSignature:
        return False
    return True


def _vectors() -> dict[str, Any]:
    vectors: dict[str, Any] = read_vectors("acvp_vectors.json")
    return vectors
