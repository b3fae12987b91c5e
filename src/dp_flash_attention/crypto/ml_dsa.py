"""ML-DSA, the module-lattice signatures of FIPS 204, as functions of bytes.

A signing key is kept as its 32-byte seed ξ (FIPS 204, section 3.6). Signing is hedged: it mixes fresh randomness
in, so two signatures of one message differ. The arithmetic is that of ``cryptography``; nothing here says that an
implementation was validated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.errors import AuthenticationError
from dp_flash_attention.crypto.library import asymmetric, exactly, fresh_secret, missing, unsupported

_MAX_CONTEXT_BYTES = 255


@dataclass(frozen=True, kw_only=True)
class MlDsa:
    """One parameter set of ML-DSA.

    Attributes:
        name: Its name, such as ``ml_dsa_65``.
        public_key_bytes: Length of a public key.
        signature_bytes: Length of a signature.
        seed_bytes: Length of a signing key's seed.

    Guarantees:
        Not a privacy mechanism. Public: public keys, messages and signatures. Theorem: strongly unforgeable
        (SUF-CMA) if Module-LWE and SelfTargetMSIS are hard, in the (quantum) random oracle model. Source: FIPS 204
        (2024), section 3.2; Kiltz, Lyubashevsky & Schaffner 2018.
    """

    name: str
    public_key_bytes: int
    signature_bytes: int
    seed_bytes: int = 32

    def generate(self) -> bytes:
        """Returns the seed of a fresh key."""
        return fresh_secret(self.seed_bytes)

    def public_key(self, seed: bytes) -> bytes:
        """Returns the public key that belongs to a seed.

        Raises:
            InvalidInputError: If the seed has another length.
            DependencyMissingError: If ``cryptography`` has no ML-DSA.
        """
        public: bytes = self._private(seed).public_key().public_bytes_raw()
        return public

    def sign(self, seed: bytes, message: bytes, *, context: bytes = b"") -> bytes:
        """Returns a signature of a message under a context of at most 255 bytes.

        Raises:
            InvalidInputError: If seed or context have a wrong length.
            DependencyMissingError: If ``cryptography`` has no ML-DSA.
        """
        signature: bytes = self._private(seed).sign(message, _checked(context))
        return signature

    def verify(self, public_key: bytes, message: bytes, signature: bytes, *, context: bytes = b"") -> None:
        """Returns if the signature is good.

        Raises:
            AuthenticationError: If it is not, whatever its length.
            InvalidInputError: If public key or context have a wrong length.
            DependencyMissingError: If ``cryptography`` has no ML-DSA.
        """
        from cryptography.exceptions import InvalidSignature

        public_bytes = exactly(f"{self.name} public key", public_key, self.public_key_bytes)
        try:
            public = getattr(asymmetric("mldsa"), f"{self._class}PublicKey").from_public_bytes(public_bytes)
        except unsupported() as error:
            raise missing(self.name, error) from error
        try:
            public.verify(signature, message, _checked(context))
        except InvalidSignature:
            raise AuthenticationError(
                f"the {self.name} signature is not one of this message by this key. Ask the signer for the "
                "original."
            ) from None

    @property
    def _class(self) -> str:
        return self.name.replace("ml_dsa_", "MLDSA")

    def _private(self, seed: bytes) -> Any:
        secret = exactly(f"{self.name} seed", seed, self.seed_bytes)
        try:
            return getattr(asymmetric("mldsa"), f"{self._class}PrivateKey").from_seed_bytes(secret)
        except unsupported() as error:
            raise missing(self.name, error) from error


def _checked(context: bytes) -> bytes:
    if not isinstance(context, bytes) or len(context) > _MAX_CONTEXT_BYTES:
        raise InvalidInputError(
            "context",
            context if len(context) < 32 else f"{len(context)} bytes",
            bound="at most 255 bytes (FIPS 204, section 5.2)",
            remedy="Hash a longer one first.",
        )
    return context


# FIPS 204, table 2.
ml_dsa_65 = MlDsa(name="ml_dsa_65", public_key_bytes=1952, signature_bytes=3309)
ml_dsa_87 = MlDsa(name="ml_dsa_87", public_key_bytes=2592, signature_bytes=4627)
