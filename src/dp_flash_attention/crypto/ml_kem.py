"""ML-KEM, the module-lattice key encapsulation of FIPS 203, as functions of bytes.

A decapsulation key is kept as its 64-byte seed ``d ‖ z`` (FIPS 203, section 3.3). The arithmetic is that of
``cryptography``; nothing here says that an implementation was validated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.library import asymmetric, exactly, fresh_secret, missing, unsupported


class Encapsulation(NamedTuple):
    """What encapsulating gives; in this order, as ``cryptography`` returns it.

    Attributes:
        shared_secret: 32 secret bytes.
        ciphertext: What the holder of the decapsulation key turns into the same secret.
    """

    shared_secret: bytes
    ciphertext: bytes


@dataclass(frozen=True, kw_only=True)
class MlKem:
    """One parameter set of ML-KEM.

    Attributes:
        name: Its name, such as ``ml_kem_768``.
        public_key_bytes: Length of an encapsulation key.
        ciphertext_bytes: Length of a ciphertext.
        seed_bytes: Length of a decapsulation key's seed.
        shared_secret_bytes: Length of a shared secret.

    Guarantees:
        Not a privacy mechanism. Public: encapsulation keys and ciphertexts. Theorem: IND-CCA2 if Module-LWE is
        hard, in the (quantum) random oracle model. Source: FIPS 203 (2024), section 3.1; Bos et al. 2018.
    """

    name: str
    public_key_bytes: int
    ciphertext_bytes: int
    seed_bytes: int = 64
    shared_secret_bytes: int = 32

    def generate(self) -> bytes:
        """Returns the seed of a fresh key."""
        return fresh_secret(self.seed_bytes)

    def public_key(self, seed: bytes) -> bytes:
        """Returns the encapsulation key that belongs to a seed.

        Raises:
            InvalidInputError: If the seed has another length.
            DependencyMissingError: If ``cryptography`` has no ML-KEM.
        """
        public: bytes = self._private(seed).public_key().public_bytes_raw()
        return public

    def encapsulate(self, public_key: bytes) -> Encapsulation:
        """Returns a fresh shared secret and its ciphertext.

        Raises:
            InvalidInputError: If the key has another length or fails the modulus check (FIPS 203, section 7.2).
            DependencyMissingError: If ``cryptography`` has no ML-KEM.
        """
        public_bytes = exactly(f"{self.name} public key", public_key, self.public_key_bytes)
        try:
            public = getattr(asymmetric("mlkem"), f"{self._class}PublicKey").from_public_bytes(public_bytes)
        except unsupported() as error:
            raise missing(self.name, error) from error
        except ValueError as error:
            raise InvalidInputError(
                f"{self.name} public key",
                f"{len(public_bytes)} bytes",
                bound="an encoding of polynomials modulo 3329",
                remedy="Fetch the key again; this one is damaged.",
            ) from error
        return Encapsulation(*public.encapsulate())

    def decapsulate(self, seed: bytes, ciphertext: bytes) -> bytes:
        """Returns the shared secret; for a ciphertext that was altered, one that nobody knows (implicit rejection).

        Raises:
            InvalidInputError: If seed or ciphertext have another length.
            DependencyMissingError: If ``cryptography`` has no ML-KEM.
        """
        whole = exactly(f"{self.name} ciphertext", ciphertext, self.ciphertext_bytes)
        shared: bytes = self._private(seed).decapsulate(whole)
        return shared

    @property
    def _class(self) -> str:
        return self.name.replace("ml_kem_", "MLKEM")

    def _private(self, seed: bytes) -> Any:
        secret = exactly(f"{self.name} seed", seed, self.seed_bytes)
        try:
            return getattr(asymmetric("mlkem"), f"{self._class}PrivateKey").from_seed_bytes(secret)
        except unsupported() as error:
            raise missing(self.name, error) from error


# FIPS 203, table 3.
ml_kem_768 = MlKem(name="ml_kem_768", public_key_bytes=1184, ciphertext_bytes=1088)
ml_kem_1024 = MlKem(name="ml_kem_1024", public_key_bytes=1568, ciphertext_bytes=1568)
