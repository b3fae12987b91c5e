"""Hybrid key encapsulation: X25519 and ML-KEM together, so that breaking one of them is not enough.

The combiner, over byte strings whose lengths the parameter set fixes:

    shared = SHA3-512(00000001 ‖ ss_M ‖ ss_X ‖ ct_M ‖ ct_X ‖ pk_M ‖ pk_X ‖ label ‖ |context| ‖ context)[:32]

with M for ML-KEM, X for X25519, and ``ct_X`` the ephemeral public key. This is the one-step key derivation of
SP 800-56C rev. 2 (section 4.1, H = SHA3-512) over Z = ss_M ‖ ss_X, with both ciphertexts, both public keys and a
label in its FixedInfo. X-Wing (Barbosa et al. 2024) leaves ct_M and pk_M out, which its proof for ML-KEM allows;
they are kept here, at the cost of one more hash of 3 KiB, so that the argument below needs no property of ML-KEM
beyond IND-CCA. The format is this project's own: it interoperates with itself, not with X-Wing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.library import asymmetric, exactly, fresh_secret
from dp_flash_attention.crypto.ml_kem import Encapsulation, MlKem, ml_kem_768, ml_kem_1024

_X25519_BYTES = 32
_COUNTER = (1).to_bytes(4, "big")


@dataclass(frozen=True, kw_only=True)
class HybridKem:
    """X25519 with one parameter set of ML-KEM. Keys and ciphertexts are ML-KEM's part, then X25519's.

    Attributes:
        name: Its name, such as ``x25519_ml_kem_768``; part of the combiner's label.
        ml_kem: The lattice half.

    Guarantees:
        Not a privacy mechanism. Public: encapsulation keys and ciphertexts. Theorem: the combined KEM is IND-CCA
        if ML-KEM is (SHA3-512 a pseudo-random function keyed by ss_M), or, against attackers without a quantum
        computer, if the strong Diffie–Hellman problem on Curve25519 is hard (SHA3-512 a random oracle; X25519
        alone, unhashed, would not be IND-CCA). Source: Giacon, Heuer & Poettering 2018 (a parallel combiner whose
        core function is a split-key PRF is IND-CCA if one ingredient is); Barbosa et al. 2024 (X-Wing) for both
        arguments with these ingredients.
    """

    name: str
    ml_kem: MlKem

    @property
    def seed_bytes(self) -> int:
        """Length of a decapsulation key's seed."""
        return self.ml_kem.seed_bytes + _X25519_BYTES

    @property
    def public_key_bytes(self) -> int:
        """Length of an encapsulation key."""
        return self.ml_kem.public_key_bytes + _X25519_BYTES

    @property
    def ciphertext_bytes(self) -> int:
        """Length of a ciphertext."""
        return self.ml_kem.ciphertext_bytes + _X25519_BYTES

    def generate(self) -> bytes:
        """Returns the seed of a fresh key: two independent halves."""
        return fresh_secret(self.seed_bytes)

    def public_key(self, seed: bytes) -> bytes:
        """Returns the encapsulation key that belongs to a seed.

        Raises:
            InvalidInputError: If the seed has another length.
            DependencyMissingError: If ``cryptography`` has no ML-KEM.
        """
        lattice, curve = self._split_seed(seed)
        public: bytes = self.ml_kem.public_key(lattice) + _private(curve).public_key().public_bytes_raw()
        return public

    def encapsulate(self, public_key: bytes, *, context: bytes = b"") -> Encapsulation:
        """Returns a fresh 32-byte shared secret and its ciphertext.

        Args:
            public_key: The recipient's.
            context: What the secret is for; decapsulating under another context gives another secret.

        Raises:
            InvalidInputError: If the key has a wrong length, or one of its halves is no key of its kind.
            DependencyMissingError: If ``cryptography`` has no ML-KEM.
        """
        whole = exactly(f"{self.name} public key", public_key, self.public_key_bytes)
        lattice_key, curve_key = whole[:-_X25519_BYTES], whole[-_X25519_BYTES:]
        lattice = self.ml_kem.encapsulate(lattice_key)
        ephemeral = _private(fresh_secret(_X25519_BYTES))
        curve_ciphertext: bytes = ephemeral.public_key().public_bytes_raw()
        curve_secret = _exchange(ephemeral, curve_key)
        shared = self._combine(
            lattice.shared_secret,
            curve_secret,
            lattice.ciphertext + curve_ciphertext,
            whole,
            context,
        )
        return Encapsulation(shared, lattice.ciphertext + curve_ciphertext)

    def decapsulate(self, seed: bytes, ciphertext: bytes, *, context: bytes = b"") -> bytes:
        """Returns the shared secret; for a ciphertext or context that was altered, one that nobody knows.

        Raises:
            InvalidInputError: If a length is wrong or the ciphertext's curve half is a point of low order.
            DependencyMissingError: If ``cryptography`` has no ML-KEM.
        """
        lattice, curve = self._split_seed(seed)
        whole = exactly(f"{self.name} ciphertext", ciphertext, self.ciphertext_bytes)
        private = _private(curve)
        public_key = self.ml_kem.public_key(lattice) + private.public_key().public_bytes_raw()
        return self._combine(
            self.ml_kem.decapsulate(lattice, whole[:-_X25519_BYTES]),
            _exchange(private, whole[-_X25519_BYTES:]),
            whole,
            public_key,
            context,
        )

    def _split_seed(self, seed: bytes) -> tuple[bytes, bytes]:
        whole = exactly(f"{self.name} seed", seed, self.seed_bytes)
        return whole[: self.ml_kem.seed_bytes], whole[self.ml_kem.seed_bytes :]

    def _combine(
        self, lattice: bytes, curve: bytes, ciphertext: bytes, public_key: bytes, context: bytes
    ) -> bytes:
        label = b"dpfa.hybrid-kem.v1." + self.name.encode("ascii")
        fixed = ciphertext + public_key + label + len(context).to_bytes(8, "big") + context
        return hashlib.sha3_512(_COUNTER + lattice + curve + fixed).digest()[
            : self.ml_kem.shared_secret_bytes
        ]


def _private(secret: bytes) -> Any:
    return asymmetric("x25519").X25519PrivateKey.from_private_bytes(secret)


def _exchange(private: Any, public: bytes) -> bytes:
    try:
        shared: bytes = private.exchange(asymmetric("x25519").X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        # RFC 7748, section 6.1: the shared secret would be zero, whatever our key is.
        raise InvalidInputError(
            "X25519 public key",
            f"{len(public)} bytes",
            bound="a point that is not of low order",
            remedy="Refuse whoever sent it: no honest key is one.",
        ) from error
    return shared


x25519_ml_kem_768 = HybridKem(name="x25519_ml_kem_768", ml_kem=ml_kem_768)
x25519_ml_kem_1024 = HybridKem(name="x25519_ml_kem_1024", ml_kem=ml_kem_1024)
