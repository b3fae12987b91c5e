"""The checks hold, and each one fails when what it looks at is broken on purpose."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from dp_flash_attention.crypto import (
    Encapsulation,
    HybridKem,
    HybridSignature,
    MlDsa,
    MlKem,
    SecureChannel,
    tls,
)
from dp_flash_attention.crypto import channel as channel_module
from dp_flash_attention.quantum import core_svp, primitive_costs, security_estimate
from dp_flash_attention.quantum.checks import crypto as checks
from dp_flash_attention.quantum.evidence import run_checks

ROOT = Path(__file__).resolve().parents[4]


def failing(deep=False):
    """Names of the checks that do not hold."""
    return {result.name for result in run_checks(checks.crypto_checks(deep=deep)) if not result.holds}


def test_all_hold():
    assert failing() == set()


def test_all_hold_in_depth():
    assert failing(deep=True) == set()


def test_every_row_says_what_it_claims_and_found():
    rows = [row for result in run_checks(checks.crypto_checks()) for row in result.rows]
    assert len({row.name for row in rows}) == len(rows) > 15
    assert all(row.claim and row.measured and row.bound for row in rows)


def test_no_printed_figure_of_strength_comes_without_its_assumption():
    rows = [row for result in run_checks(checks.crypto_checks()) for row in result.rows]
    figures = [row for row in rows if re.search(r"\d bits", row.measured)]
    assert len(figures) >= 15
    assert all("assuming" in row.measured for row in figures)


def test_the_vectors_are_those_of_the_independent_implementations():
    spec = importlib.util.spec_from_file_location("make_vectors", ROOT / "tests/data/make_crypto_vectors.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert json.loads(maker.TARGET.read_text()) == maker.vectors()


# What is broken, and the checks that must notice.
def wrong_secret(monkeypatch):
    monkeypatch.setattr(MlKem, "decapsulate", lambda self, seed, ciphertext: bytes(32))


def explicit_rejection_lost(monkeypatch):
    right = MlKem.decapsulate
    # An altered ciphertext gives the secret of the original: what implicit rejection is there to prevent.
    monkeypatch.setattr(
        MlKem,
        "decapsulate",
        lambda self, seed, c: min(right(self, seed, c), right(self, seed, bytes([c[0] ^ 1]) + c[1:])),
    )


def other_keys(monkeypatch):
    right = MlKem.public_key
    monkeypatch.setattr(MlKem, "public_key", lambda self, seed: right(self, bytes(64)))


def every_signature_is_good(monkeypatch):
    monkeypatch.setattr(MlDsa, "verify", lambda self, public, message, signature, context=b"": None)


def no_signature_is_good(monkeypatch):
    from dp_flash_attention.crypto import AuthenticationError

    def refuse(self, *arguments, **options):
        raise AuthenticationError("no")

    monkeypatch.setattr(MlDsa, "verify", refuse)


def hybrid_accepts_everything(monkeypatch):
    monkeypatch.setattr(HybridSignature, "verify", lambda self, public, message, signature, *, context: None)


def hybrid_checks_the_curve_alone(monkeypatch):
    monkeypatch.setattr(MlDsa, "verify", lambda self, *arguments, **options: None)


def context_is_not_signed(monkeypatch):
    right = HybridSignature._representative
    monkeypatch.setattr(
        HybridSignature,
        "_representative",
        lambda self, public, message, context: right(self, public, message, b""),
    )


def one_half_of_the_secret(monkeypatch):
    right = HybridKem._combine
    monkeypatch.setattr(
        HybridKem, "_combine", lambda self, lattice, curve, *rest: right(self, lattice, bytes(32), *rest)
    )


def unbound_combiner(monkeypatch):
    right = HybridKem._combine
    monkeypatch.setattr(
        HybridKem,
        "_combine",
        lambda self, lattice, curve, ciphertext, public, context: right(
            self, lattice, curve, b"", public, context
        ),
    )


def swapped_encapsulation(monkeypatch):
    right = MlKem.encapsulate
    # cryptography returns (shared secret, ciphertext); taking it the other way round must not pass.
    monkeypatch.setattr(
        MlKem, "encapsulate", lambda self, public: Encapsulation(*reversed(right(self, public)))
    )


def reused_nonce(monkeypatch):
    right = channel_module._Direction.take

    def take(self):
        key, nonce, _ = right(self)
        self.sequence = 0
        return key, nonce, 0

    monkeypatch.setattr(channel_module._Direction, "take", take)


def replays_pass(monkeypatch):
    right = SecureChannel._open

    def opened(self, record, associated):
        self._receive.sequence = int.from_bytes(record[1:9], "big")
        return right(self, record, associated)

    monkeypatch.setattr(SecureChannel, "_open", opened)


def header_is_not_bound(monkeypatch):
    monkeypatch.setattr(channel_module, "_bound", lambda header, epoch, associated: b"")


def truncation_passes(monkeypatch):
    monkeypatch.setattr(SecureChannel, "require_complete", lambda self: None)


def classical_tls(monkeypatch):
    classical = tls.TlsHandshake(library="old", group="x25519")
    monkeypatch.setattr(tls, "handshake_of_pyopenssl", lambda: classical)
    monkeypatch.setattr(tls, "handshake_of_python", lambda: classical)


def no_tls(monkeypatch):
    from dp_flash_attention.core.errors import DependencyMissingError

    def fail():
        raise DependencyMissingError("pyOpenSSL is not installed")

    monkeypatch.setattr(tls, "handshake_of_pyopenssl", fail)
    monkeypatch.setattr(tls, "handshake_of_python", lambda: tls.TlsHandshake(library="old", group="x25519"))


def inflated_lattice(monkeypatch):
    monkeypatch.setattr(core_svp, "QUANTUM_EXPONENT", core_svp.CLASSICAL_EXPONENT)


def weaker_noise_assumed(monkeypatch):
    right = core_svp.root_hermite
    monkeypatch.setattr(core_svp, "root_hermite", lambda block: right(block + 20))


def entropy_by_asking(monkeypatch):
    pool = security_estimate.EntropySource(name="pool", bits=512, assumption="Whatever is read is entropy.")
    monkeypatch.setattr(security_estimate, "operating_system_pool", lambda: pool)


def no_grover(monkeypatch):
    right = security_estimate._guessing
    monkeypatch.setattr(
        security_estimate,
        "_guessing",
        lambda entropy, *, quantum, assumptions: right(entropy, quantum=False, assumptions=assumptions),
    )
    monkeypatch.setattr(primitive_costs, "aes_256", lambda: primitive_costs.cipher("AES-512", key_bits=512))


def no_claws(monkeypatch):
    monkeypatch.setattr(
        primitive_costs,
        "xor_of_two_ciphers",
        lambda: primitive_costs.cipher("XOR of two ciphers with 256-bit keys", key_bits=512),
    )


def no_shor(monkeypatch):
    monkeypatch.setattr(primitive_costs, "x25519", lambda: primitive_costs.cipher("X25519", key_bits=252))


def hybrid_is_the_weaker_half(monkeypatch):
    monkeypatch.setattr(security_estimate, "strongest", security_estimate.weakest)


def assumptions_forgotten(monkeypatch):
    def build(self, log2_cost, *, unit, formula, source, assumptions):
        self._log2_cost, self.unit, self.formula = log2_cost, unit, formula
        self.source, self.assumptions = source, tuple(assumptions)

    monkeypatch.setattr(security_estimate.Bits, "__init__", build)


KEM, DSA = "known answers of ML-KEM", "known answers of ML-DSA"
AGREEMENT, SIGNATURES = "hybrid key agreement", "altered signatures"
RECORDS, TLS = "altered records", "TLS key agreement"
SVP, SEED = "core-SVP against published figures", "security of the noise's seed"
ESTIMATE = "security estimate"


@pytest.mark.parametrize(
    ("break_it", "noticed_by"),
    [
        (wrong_secret, {KEM, AGREEMENT}),
        (explicit_rejection_lost, {KEM}),
        (other_keys, {KEM}),
        (every_signature_is_good, {DSA, SIGNATURES}),
        (no_signature_is_good, {DSA, SIGNATURES}),
        (hybrid_accepts_everything, {SIGNATURES}),
        (hybrid_checks_the_curve_alone, {SIGNATURES}),
        (context_is_not_signed, {SIGNATURES}),
        (one_half_of_the_secret, {AGREEMENT}),
        (unbound_combiner, {AGREEMENT}),
        (swapped_encapsulation, {AGREEMENT}),
        (reused_nonce, {RECORDS}),
        (replays_pass, {RECORDS}),
        (header_is_not_bound, {RECORDS}),
        (truncation_passes, {RECORDS}),
        (classical_tls, {TLS}),
        (no_tls, {TLS}),
        (inflated_lattice, {SVP}),
        (weaker_noise_assumed, {SVP}),
        (entropy_by_asking, {SEED}),
        (no_grover, {SEED}),
        (no_claws, {ESTIMATE}),
        (no_shor, {ESTIMATE}),
        (hybrid_is_the_weaker_half, {ESTIMATE}),
        (assumptions_forgotten, {SEED}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_broken_on_purpose_is_noticed(monkeypatch, break_it, noticed_by):
    break_it(monkeypatch)
    assert noticed_by <= failing()


def test_an_unavailable_tls_group_is_said_and_does_not_hold(monkeypatch):
    no_tls(monkeypatch)
    (row,) = checks.tls_key_agreement()
    assert not row.holds
    assert "not available on this OpenSSL" in row.measured
    assert "pyOpenSSL is not installed" in row.measured
