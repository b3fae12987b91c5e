"""Makes the known answers of ML-KEM and ML-DSA that ``dpfa verify`` carries, by independent implementations.

kyber-py and dilithium-py are plain Python written from FIPS 203 and 204, sharing no code with ``cryptography``. All
inputs follow from SHAKE256 of a label, so that nothing is chosen. Run this file to write the package's copy.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[2] / "src/dp_flash_attention/quantum/checks/crypto_vectors.json"
CASES = 2


def stream(label: str, num_bytes: int) -> bytes:
    return hashlib.shake_256(f"dpfa.vectors.v1 {label}".encode()).digest(num_bytes)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def ml_kem(name: str, scheme: Any, case: int) -> dict[str, str]:
    seed, message = stream(f"{name} {case} seed", 64), stream(f"{name} {case} message", 32)
    public, secret = scheme.key_derive(seed)
    shared, ciphertext = scheme._encaps_internal(public, message)
    altered = bytes([ciphertext[0] ^ 1]) + ciphertext[1:]
    return {
        "seed": text(seed),
        "public_key_sha3_256": hashlib.sha3_256(public).hexdigest(),
        "ciphertext": text(ciphertext),
        "shared_secret": shared.hex(),
        # The first byte's lowest bit flipped: implicit rejection has a known answer too.
        "shared_secret_of_altered": scheme.decaps(secret, altered).hex(),
    }


def ml_dsa(name: str, scheme: Any, case: int) -> dict[str, str]:
    seed, message = stream(f"{name} {case} seed", 32), stream(f"{name} {case} message", 64 * case)
    context = stream(f"{name} {case} context", 16 * case)
    public, secret = scheme.key_derive(seed)
    return {
        "seed": text(seed),
        "public_key_sha3_256": hashlib.sha3_256(public).hexdigest(),
        "message": text(message),
        "context": text(context),
        "signature": text(scheme.sign(secret, message, ctx=context, deterministic=True)),
    }


def vectors() -> dict[str, Any]:
    from dilithium_py.ml_dsa import ML_DSA_65, ML_DSA_87
    from kyber_py.ml_kem import ML_KEM_768, ML_KEM_1024

    kems = {"ml_kem_768": ML_KEM_768, "ml_kem_1024": ML_KEM_1024}
    signatures = {"ml_dsa_65": ML_DSA_65, "ml_dsa_87": ML_DSA_87}
    return {
        **{name: [ml_kem(name, scheme, case) for case in range(CASES)] for name, scheme in kems.items()},
        **{
            name: [ml_dsa(name, scheme, case) for case in range(CASES)] for name, scheme in signatures.items()
        },
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(vectors(), indent=1) + "\n", encoding="utf-8")
