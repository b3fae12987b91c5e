"""Hybrid signatures: Ed25519 and ML-DSA side by side; both have to verify.

Both sign the same representative of the message M under a context:

    M' = "dpfa.hybrid-signature.v1" ‖ name ‖ SHA3-512(public keys) ‖ context ‖ M     (each after its 8-byte length)

ML-DSA has the algorithm's name as its own context string besides. A half that is taken out of a pair therefore
signs nothing that a plain Ed25519 or ML-DSA verifier would be shown, and neither half moves to another pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dp_flash_attention.crypto.errors import AuthenticationError
from dp_flash_attention.crypto.library import asymmetric, exactly, framed, fresh_secret, sha3_512
from dp_flash_attention.crypto.ml_dsa import MlDsa, ml_dsa_65, ml_dsa_87

_ED25519_KEY_BYTES = 32
_ED25519_SIGNATURE_BYTES = 64
_LABEL = b"dpfa.hybrid-signature.v1"


@dataclass(frozen=True, kw_only=True)
class HybridSignature:
    """Ed25519 with one parameter set of ML-DSA. Keys and signatures are Ed25519's part, then ML-DSA's.

    Attributes:
        name: Its name, such as ``ed25519_ml_dsa_65``.
        ml_dsa: The lattice half.

    Guarantees:
        Not a privacy mechanism. Public: public keys, messages, contexts and signatures. Theorem: unforgeable
        (EUF-CMA) if either Ed25519 or ML-DSA is, since a forgery of the pair holds a forgery of each. Source:
        Bindel, Herath, McKague & Stebila 2017 (the concatenation combiner C∥).
    """

    name: str
    ml_dsa: MlDsa

    @property
    def seed_bytes(self) -> int:
        """Length of a signing key's seed."""
        return _ED25519_KEY_BYTES + self.ml_dsa.seed_bytes

    @property
    def public_key_bytes(self) -> int:
        """Length of a public key."""
        return _ED25519_KEY_BYTES + self.ml_dsa.public_key_bytes

    @property
    def signature_bytes(self) -> int:
        """Length of a signature."""
        return _ED25519_SIGNATURE_BYTES + self.ml_dsa.signature_bytes

    def generate(self) -> bytes:
        """Returns the seed of a fresh key: two independent halves."""
        return fresh_secret(self.seed_bytes)

    def public_key(self, seed: bytes) -> bytes:
        """Returns the public key that belongs to a seed.

        Raises:
            InvalidInputError: If the seed has another length.
            DependencyMissingError: If ``cryptography`` has no ML-DSA.
        """
        curve, lattice = self._split_seed(seed)
        public: bytes = _private(curve).public_key().public_bytes_raw() + self.ml_dsa.public_key(lattice)
        return public

    def sign(self, seed: bytes, message: bytes, *, context: bytes) -> bytes:
        """Returns a signature of a message.

        Args:
            seed: The signing key.
            message: Any bytes.
            context: What kind of message this is; a signature of one kind is none of another.

        Raises:
            InvalidInputError: If the seed has another length.
            DependencyMissingError: If ``cryptography`` has no ML-DSA.
        """
        curve, lattice = self._split_seed(seed)
        signed = self._representative(self.public_key(seed), message, context)
        first: bytes = _private(curve).sign(signed)
        return first + self.ml_dsa.sign(lattice, signed, context=self._lattice_context)

    def verify(self, public_key: bytes, message: bytes, signature: bytes, *, context: bytes) -> None:
        """Returns if both halves are good.

        Raises:
            AuthenticationError: If one of them is not.
            InvalidInputError: If the public key has another length.
            DependencyMissingError: If ``cryptography`` has no ML-DSA.
        """
        from cryptography.exceptions import InvalidSignature

        whole = exactly(f"{self.name} public key", public_key, self.public_key_bytes)
        if len(signature) != self.signature_bytes:
            raise AuthenticationError(
                f"the signature has {len(signature)} bytes, but one of {self.name} has {self.signature_bytes}. "
                "Ask the signer for the original."
            )
        signed = self._representative(whole, message, context)
        curve, lattice = signature[:_ED25519_SIGNATURE_BYTES], signature[_ED25519_SIGNATURE_BYTES:]
        try:
            asymmetric("ed25519").Ed25519PublicKey.from_public_bytes(whole[:_ED25519_KEY_BYTES]).verify(
                curve, signed
            )
        except InvalidSignature:
            raise AuthenticationError(
                "the Ed25519 half of the signature is not one of this message by this key. Ask the signer for "
                "the original."
            ) from None
        self.ml_dsa.verify(whole[_ED25519_KEY_BYTES:], signed, lattice, context=self._lattice_context)

    @property
    def _lattice_context(self) -> bytes:
        return _LABEL + b"." + self.name.encode("ascii")

    def _representative(self, public_key: bytes, message: bytes, context: bytes) -> bytes:
        return framed(_LABEL, self.name.encode("ascii"), sha3_512(public_key), context, message)

    def _split_seed(self, seed: bytes) -> tuple[bytes, bytes]:
        whole = exactly(f"{self.name} seed", seed, self.seed_bytes)
        return whole[:_ED25519_KEY_BYTES], whole[_ED25519_KEY_BYTES:]


def _private(secret: bytes) -> Any:
    return asymmetric("ed25519").Ed25519PrivateKey.from_private_bytes(secret)


ed25519_ml_dsa_65 = HybridSignature(name="ed25519_ml_dsa_65", ml_dsa=ml_dsa_65)
ed25519_ml_dsa_87 = HybridSignature(name="ed25519_ml_dsa_87", ml_dsa=ml_dsa_87)
