"""Keys, signatures, sealed files and channels that a quantum computer does not open. Never torch, never flwr.

Hybrid throughout: a classical and a lattice algorithm together (FIPS 203 and 204), so that one of them may fall.
``cryptography`` is imported only when something is computed.
"""

from dp_flash_attention.crypto.bundles import open_run, seal_run
from dp_flash_attention.crypto.certificates import (
    VerifiedCertificate,
    sign_certificate,
    verify_certificate,
)
from dp_flash_attention.crypto.channel import ChannelLimits, SecureChannel
from dp_flash_attention.crypto.errors import (
    AuthenticationError,
    ChannelError,
    KeyFileError,
    UnlistedFilesError,
)
from dp_flash_attention.crypto.handshake import Initiator, Responder
from dp_flash_attention.crypto.hybrid import HybridKem, x25519_ml_kem_768, x25519_ml_kem_1024
from dp_flash_attention.crypto.hybrid_signature import HybridSignature, ed25519_ml_dsa_65, ed25519_ml_dsa_87
from dp_flash_attention.crypto.key_files import (
    ScryptCost,
    read_public_key,
    read_secret_key,
    write_public_key,
    write_secret_key,
)
from dp_flash_attention.crypto.keys import DecapsulationKey, EncapsulationKey, SigningKey, VerifyingKey
from dp_flash_attention.crypto.ml_dsa import MlDsa, ml_dsa_65, ml_dsa_87
from dp_flash_attention.crypto.ml_kem import Encapsulation, MlKem, ml_kem_768, ml_kem_1024
from dp_flash_attention.crypto.sealed import seal, seal_stream, unseal, unseal_stream
from dp_flash_attention.crypto.trust import KeyState, TrustedKey, TrustFile, make_succession

__all__ = [
    "AuthenticationError",
    "ChannelError",
    "ChannelLimits",
    "DecapsulationKey",
    "Encapsulation",
    "EncapsulationKey",
    "HybridKem",
    "HybridSignature",
    "Initiator",
    "KeyFileError",
    "KeyState",
    "MlDsa",
    "MlKem",
    "Responder",
    "ScryptCost",
    "SecureChannel",
    "SigningKey",
    "TrustFile",
    "TrustedKey",
    "UnlistedFilesError",
    "VerifiedCertificate",
    "VerifyingKey",
    "ed25519_ml_dsa_65",
    "ed25519_ml_dsa_87",
    "make_succession",
    "ml_dsa_65",
    "ml_dsa_87",
    "ml_kem_768",
    "ml_kem_1024",
    "open_run",
    "read_public_key",
    "read_secret_key",
    "seal",
    "seal_run",
    "seal_stream",
    "sign_certificate",
    "unseal",
    "unseal_stream",
    "verify_certificate",
    "write_public_key",
    "write_secret_key",
    "x25519_ml_kem_768",
    "x25519_ml_kem_1024",
]
