"""What do hybrid keys cost? Handshakes, signatures and sealing, each beside the classical or bare operation.

    python benchmarks/crypto.py --json > benchmarks/results/crypto-DEVICE.json

The ratio is time over the baseline's: above 1 is what the second algorithm, framing and authentication cost.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from _harness import Report, Row, Timing, emit, run_interleaved
from dp_flash_attention.crypto import (
    DecapsulationKey,
    Initiator,
    Responder,
    SigningKey,
    seal_stream,
    unseal_stream,
    x25519_ml_kem_768,
)
from dp_flash_attention.crypto.tls import handshake_of_pyopenssl

MESSAGE = bytes(4096)  # about the size of a certificate's canonical form
BASELINES = {
    "key agreement, X25519 + ML-KEM-768": "X25519 alone",
    "sign 4 KiB, Ed25519 + ML-DSA-65": "Ed25519 alone, sign",
    "verify 4 KiB, Ed25519 + ML-DSA-65": "Ed25519 alone, verify",
    "handshake of the channel, both ends": "TLS 1.3 by pyOpenSSL, one certificate, no client identity",
    "seal": "AES-256-GCM in one call",
    "open": "AES-256-GCM in one call",
}


def cases(payload: bytes) -> dict[str, Callable[[], object]]:
    """Returns what is timed; baselines among them."""
    one, other, recipient = SigningKey.generate(), SigningKey.generate(), DecapsulationKey.generate()
    signature = one.sign(MESSAGE, context=b"benchmark")
    classical = Ed25519PrivateKey.generate()
    classical_signature, classical_public = classical.sign(MESSAGE), classical.public_key()
    seed = x25519_ml_kem_768.generate()
    public, curve = x25519_ml_kem_768.public_key(seed), X25519PrivateKey.generate()
    sealed = io.BytesIO()
    seal_stream(io.BytesIO(payload), sealed, [recipient.public])
    sealed_bytes = sealed.getvalue()
    cipher = AESGCM(bytes(32))

    def agree() -> None:
        _, ciphertext = x25519_ml_kem_768.encapsulate(public)
        x25519_ml_kem_768.decapsulate(seed, ciphertext)

    def agree_classically() -> None:
        ephemeral = X25519PrivateKey.generate()
        ephemeral.exchange(curve.public_key())
        curve.exchange(ephemeral.public_key())

    def shake_hands() -> None:
        initiator, responder = Initiator(one, [other.public]), Responder(other, [one.public])
        answer, _ = initiator.finish(responder.respond(initiator.start()))
        responder.finish(answer)

    return {
        "key agreement, X25519 + ML-KEM-768": agree,
        "X25519 alone": agree_classically,
        "sign 4 KiB, Ed25519 + ML-DSA-65": lambda: one.sign(MESSAGE, context=b"benchmark"),
        "Ed25519 alone, sign": lambda: classical.sign(MESSAGE),
        "verify 4 KiB, Ed25519 + ML-DSA-65": lambda: one.public.verify(
            MESSAGE, signature, context=b"benchmark"
        ),
        "Ed25519 alone, verify": lambda: classical_public.verify(classical_signature, MESSAGE),
        "handshake of the channel, both ends": shake_hands,
        "TLS 1.3 by pyOpenSSL, one certificate, no client identity": handshake_of_pyopenssl,
        "seal": lambda: seal_stream(io.BytesIO(payload), io.BytesIO(), [recipient.public]),
        "open": lambda: unseal_stream(io.BytesIO(sealed_bytes), io.BytesIO(), recipient),
        "AES-256-GCM in one call": lambda: cipher.encrypt(bytes(12), payload, None),
    }


def report(timings: dict[str, Timing], *, payload_bytes: int) -> Report:
    """Returns the figures beside their baselines."""
    rows = [
        Row(
            name=name,
            config={"MiB": payload_bytes >> 20} if name in ("seal", "open") else {},
            value=1e3 * timings[name].median_s,
            unit="ms",
            baseline=baseline,
            ratio=timings[name].median_s / timings[baseline].median_s,
            spread=timings[name].spread,
        )
        for name, baseline in BASELINES.items()
    ]
    return Report(benchmark="crypto", rows=rows, peers=("pyopenssl",))


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=31, help="timed rounds")
    parser.add_argument("--mib", type=int, default=16, help="size of what is sealed")
    options = parser.parse_args()
    payload = os.urandom(options.mib << 20)
    timings = run_interleaved(cases(payload), repeats=options.repeats, warmup=2)
    emit(report(timings, payload_bytes=len(payload)), as_json=options.json)


if __name__ == "__main__":
    main()
