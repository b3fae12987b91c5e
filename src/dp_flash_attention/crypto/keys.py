"""Keys with their algorithm and identity: signing and verifying, decapsulating and encapsulating.

A key signs or opens, never both. Secret keys show nothing in their ``repr`` and cannot be pickled or copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.hybrid import HybridKem, x25519_ml_kem_768, x25519_ml_kem_1024
from dp_flash_attention.crypto.hybrid_signature import HybridSignature, ed25519_ml_dsa_65, ed25519_ml_dsa_87
from dp_flash_attention.crypto.library import exactly, framed
from dp_flash_attention.crypto.ml_kem import Encapsulation

SIGNATURES: Mapping[str, HybridSignature] = MappingProxyType(
    {scheme.name: scheme for scheme in (ed25519_ml_dsa_65, ed25519_ml_dsa_87)}
)
KEMS: Mapping[str, HybridKem] = MappingProxyType(
    {scheme.name: scheme for scheme in (x25519_ml_kem_768, x25519_ml_kem_1024)}
)
_KEY_ID_BYTES = 16


def _key_id(algorithm: str, public: bytes) -> str:
    # 128 bits: a second key with the id of a given one costs 2^128 hashes. Signatures bind the whole key besides.
    return (
        hashlib.sha3_256(framed(b"dpfa.key-id.v1", algorithm.encode("ascii"), public))
        .digest()[:_KEY_ID_BYTES]
        .hex()
    )


def _scheme(algorithm: str, schemes: Mapping[str, HybridSignature] | Mapping[str, HybridKem]) -> None:
    if algorithm not in schemes:
        raise InvalidInputError(
            "algorithm", algorithm, bound=f"one of {', '.join(schemes)}", remedy="Choose one of them."
        )


@dataclass(frozen=True, kw_only=True)
class VerifyingKey:
    """A public key that checks signatures.

    Attributes:
        algorithm: A name in ``SIGNATURES``.
        public: The key's bytes.

    Raises:
        InvalidInputError: If the algorithm is unknown or the bytes have another length.
    """

    algorithm: str
    public: bytes

    def __post_init__(self) -> None:
        _scheme(self.algorithm, SIGNATURES)
        exactly(f"{self.algorithm} public key", self.public, SIGNATURES[self.algorithm].public_key_bytes)

    @property
    def key_id(self) -> str:
        """32 hexadecimal digits that name the key."""
        return _key_id(self.algorithm, self.public)

    def verify(self, message: bytes, signature: bytes, *, context: bytes) -> None:
        """Returns if the signature is good; see ``HybridSignature.verify``.

        Raises:
            AuthenticationError: If it is not.
        """
        SIGNATURES[self.algorithm].verify(self.public, message, signature, context=context)


@dataclass(frozen=True, kw_only=True)
class EncapsulationKey:
    """A public key that secrets are sent to.

    Attributes:
        algorithm: A name in ``KEMS``.
        public: The key's bytes.

    Raises:
        InvalidInputError: If the algorithm is unknown or the bytes have another length.
    """

    algorithm: str
    public: bytes

    def __post_init__(self) -> None:
        _scheme(self.algorithm, KEMS)
        exactly(f"{self.algorithm} public key", self.public, KEMS[self.algorithm].public_key_bytes)

    @property
    def key_id(self) -> str:
        """32 hexadecimal digits that name the key."""
        return _key_id(self.algorithm, self.public)

    def encapsulate(self, *, context: bytes) -> Encapsulation:
        """Returns a fresh shared secret and its ciphertext; see ``HybridKem.encapsulate``."""
        return KEMS[self.algorithm].encapsulate(self.public, context=context)


class _SecretKey:
    """What both kinds of secret keys share: seed, algorithm, silence."""

    def __init__(self, algorithm: str, seed: bytes) -> None:
        self.algorithm = algorithm
        self._seed = seed

    def export(self) -> bytes:
        """Returns the seed; whoever holds it is the key's owner."""
        return self._seed

    def __repr__(self) -> str:
        """Says what it is and never what it holds."""
        return f"{type(self).__name__}({self.algorithm}, <secret>)"

    def __reduce__(self) -> NoReturn:
        """Refuses pickling and copying."""
        raise TypeError("A secret key cannot be pickled or copied. Write it with crypto.key_files.")


class SigningKey(_SecretKey):
    """A secret key that signs.

    Args:
        algorithm: A name in ``SIGNATURES``.
        seed: Its seed, as ``export`` gives it.

    Raises:
        InvalidInputError: If the algorithm is unknown or the seed has another length.
    """

    def __init__(self, algorithm: str, seed: bytes) -> None:
        _scheme(algorithm, SIGNATURES)
        super().__init__(algorithm, exactly(f"{algorithm} seed", seed, SIGNATURES[algorithm].seed_bytes))
        self.public = VerifyingKey(algorithm=algorithm, public=SIGNATURES[algorithm].public_key(self._seed))

    @classmethod
    def generate(cls, algorithm: str = "ed25519_ml_dsa_65") -> SigningKey:
        """Returns a fresh key.

        Raises:
            InvalidInputError: If the algorithm is unknown.
            DependencyMissingError: If ``cryptography`` has no ML-DSA.
        """
        _scheme(algorithm, SIGNATURES)
        return cls(algorithm, SIGNATURES[algorithm].generate())

    @property
    def key_id(self) -> str:
        """The id of the public key."""
        return self.public.key_id

    def sign(self, message: bytes, *, context: bytes) -> bytes:
        """Returns a signature; see ``HybridSignature.sign``."""
        return SIGNATURES[self.algorithm].sign(self._seed, message, context=context)


class DecapsulationKey(_SecretKey):
    """A secret key that opens what was sealed to its public key.

    Args:
        algorithm: A name in ``KEMS``.
        seed: Its seed, as ``export`` gives it.

    Raises:
        InvalidInputError: If the algorithm is unknown or the seed has another length.
    """

    def __init__(self, algorithm: str, seed: bytes) -> None:
        _scheme(algorithm, KEMS)
        super().__init__(algorithm, exactly(f"{algorithm} seed", seed, KEMS[algorithm].seed_bytes))
        self.public = EncapsulationKey(algorithm=algorithm, public=KEMS[algorithm].public_key(self._seed))

    @classmethod
    def generate(cls, algorithm: str = "x25519_ml_kem_768") -> DecapsulationKey:
        """Returns a fresh key.

        Raises:
            InvalidInputError: If the algorithm is unknown.
            DependencyMissingError: If ``cryptography`` has no ML-KEM.
        """
        _scheme(algorithm, KEMS)
        return cls(algorithm, KEMS[algorithm].generate())

    @property
    def key_id(self) -> str:
        """The id of the public key."""
        return self.public.key_id

    def decapsulate(self, ciphertext: bytes, *, context: bytes) -> bytes:
        """Returns the shared secret; see ``HybridKem.decapsulate``."""
        return KEMS[self.algorithm].decapsulate(self._seed, ciphertext, context=context)
