"""What the best published attacks on each primitive cost; figures with formula, source and assumptions.

Symmetric primitives are counted in calls of the primitive (a call takes thousands of gates, which are not counted),
lattices by core-SVP (see ``core_svp``), curves by Shor's algorithm. NIST's own figure for AES-256 is
2^285 / MAXDEPTH quantum gates (NIST 2022, call for additional signatures): with its depths of
2^40, 2^64 and 2^96 that is 2^245, 2^221 and 2^189 gates, above every figure given here.
"""

from __future__ import annotations

import math

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.quantum.core_svp import (
    LatticeAttack,
    LweInstance,
    SisInstance,
    dual_attack,
    primal_attack,
    sis_attack,
)
from dp_flash_attention.quantum.security_estimate import Bits, SecurityEstimate, hybrid

MAX_DEPTHS = (40, 64, 96)
"""log2 of the circuit depths that NIST considers (NIST 2016, section 4.A.5)."""

_CAPACITIES = {"shake256": 512, "sha3-512-counter": 1024}
_IDEAL = "No attack on the primitive itself beats generic search; none is known after public analysis."
_GROVER = "The quantum computer is free of errors and of any limit on circuit depth."
_CORE_SVP = (
    "No attack on module lattices beats BKZ with sieving, and their structure gives nothing away.",
    "One sieve in the block size is all that counts: memory, depth, polynomial factors and the number of calls are "
    "free to the attacker. Dual attacks that claim a few bits less (MATZOV 2022) rest on a heuristic that was shown "
    "to fail (Ducas & Pulles 2023) and are not counted.",
)


def cipher(name: str, *, key_bits: int) -> SecurityEstimate:
    """Returns the cost of finding a cipher's key."""
    bits = positive_int("key_bits", key_bits, remedy="256 for AES-256 and ChaCha20.")
    unit = f"evaluations of {name}"
    return SecurityEstimate(
        primitive=name,
        classical=Bits(
            bits, unit=unit, formula=f"key = {bits}", source="exhaustive search", assumptions=(_IDEAL,)
        ),
        quantum=Bits(
            bits / 2,
            unit=unit,
            formula=f"key / 2 = {bits} / 2",
            source="Grover 1996; Zalka 1999 (no quantum search is faster)",
            assumptions=(_IDEAL, _GROVER),
        ),
        quantum_within_depth=tuple((depth, _grover_within(bits, depth, unit=unit)) for depth in MAX_DEPTHS),
    )


def aes_256() -> SecurityEstimate:
    """Returns the cost of finding a key of AES-256: NIST's category 5 by definition."""
    return cipher("AES-256", key_bits=256)


def chacha20() -> SecurityEstimate:
    """Returns the cost of finding a key of ChaCha20."""
    return cipher("ChaCha20", key_bits=256)


def sponge(name: str, *, seed_bits: int) -> SecurityEstimate:
    """Returns the cost of telling a seeded SHA-3 function's output from random bits.

    Args:
        name: ``shake256``, or ``sha3-512-counter`` for SHA3-512 of seed and counter.
        seed_bits: Length of a uniform secret seed.

    Raises:
        InvalidInputError: If the function is unknown.
    """
    if name not in _CAPACITIES:
        raise InvalidInputError(
            "sponge", name, bound=f"one of {', '.join(_CAPACITIES)}", remedy="Choose one."
        )
    seed = positive_int("seed_bits", seed_bits, remedy="512 for 256 bits of quantum strength.")
    capacity = _CAPACITIES[name]
    unit = "evaluations of Keccak-f[1600]"
    return SecurityEstimate(
        primitive=f"{name}, uniform {seed}-bit seed",
        classical=Bits(
            min(seed, capacity / 2),
            unit=unit,
            formula=f"min(seed, capacity / 2) = min({seed}, {capacity} / 2)",
            source="Bertoni, Daemen, Peeters & Van Assche 2008 (indifferentiability up to 2^(capacity / 2))",
            assumptions=("Keccak-f[1600] has no exploitable structure: the sponge is attacked generically.",),
        ),
        quantum=Bits(
            min(seed, capacity) / 2,
            unit=unit,
            formula=f"min(seed, capacity) / 2 = min({seed}, {capacity}) / 2",
            source="Grover 1996 on the seed or on the hidden part of the state",
            assumptions=(
                "Keccak-f[1600] has no exploitable structure: the sponge is attacked generically.",
                "Against a sponge with a secret seed nothing beats searching for seed or hidden state. Collisions of "
                "the inner state (2^(capacity / 3) with as much quantum memory) are of no use, since it is secret. "
                "That is a statement about known attacks: the proofs for quantum queries cover a secret "
                "permutation (Czajkowski, Hülsing & Schaffner 2019).",
                _GROVER,
            ),
        ),
    )


def xor_of_two_ciphers(*, key_bits: int = 256) -> SecurityEstimate:
    """Returns the cost of finding both keys of E₁(k₁) ⊕ E₂(k₂): far less than the sum of their lengths."""
    bits = positive_int("key_bits", key_bits, remedy="256 for AES-256 with ChaCha20.")
    unit = "evaluations of both ciphers"
    return SecurityEstimate(
        primitive=f"XOR of two ciphers with {bits}-bit keys",
        classical=Bits(
            bits,
            unit=unit,
            formula=f"key = {bits}",
            source="meeting in the middle: Diffie & Hellman 1977",
            assumptions=(_IDEAL, f"2^{bits} words of memory cost nothing."),
        ),
        quantum=Bits(
            2 * bits / 3,
            unit=unit,
            formula=f"2/3 · key = 2 · {bits} / 3",
            source="claw finding by a quantum walk: Tani 2007",
            assumptions=(_IDEAL, _GROVER, f"2^{2 * bits // 3} words of quantum memory cost nothing."),
        ),
    )


def x25519() -> SecurityEstimate:
    """Returns the cost of a discrete logarithm on Curve25519: nothing that a quantum computer would notice."""
    return _curve("X25519")


def ed25519() -> SecurityEstimate:
    """Returns the cost of a discrete logarithm on the curve of Ed25519."""
    return _curve("Ed25519")


def lattice(name: str) -> SecurityEstimate:
    """Returns the core-SVP cost of breaking ML-KEM-768, ML-KEM-1024, ML-DSA-65 or ML-DSA-87.

    For ML-KEM that is recovering a key or a message, for ML-DSA recovering a key or forging a signature.

    Raises:
        InvalidInputError: If the name is none of them.
    """
    found = attacks(name)

    def bits(chosen: LatticeAttack, figure: float, exponent: str) -> Bits:
        return Bits(
            figure,
            unit="core-SVP",
            formula=f"{exponent}·b and repetitions, b = {chosen.block_size} ({chosen.name} attack)",
            source="Alkim et al. 2016, section 6; Kyber specification 3.02, table 4; Dilithium specification 3.1, "
            "table 1; recomputed here",
            assumptions=_CORE_SVP,
        )

    classical = min(found, key=lambda attack: attack.classical_bits)
    quantum = min(found, key=lambda attack: attack.quantum_bits)
    return SecurityEstimate(
        primitive=name,
        classical=bits(classical, classical.classical_bits, "0.292"),
        quantum=bits(quantum, quantum.quantum_bits, "0.265"),
    )


def attacks(name: str) -> tuple[LatticeAttack, ...]:
    """Returns the attacks that ``lattice`` takes the cheapest of, the primal one first.

    Raises:
        InvalidInputError: If the name is none of those that ``lattice`` knows.
    """
    if name in _ML_KEM:
        return _ml_kem_attacks(_ML_KEM[name])
    if name in _ML_DSA:
        return _ml_dsa_attacks(*_ML_DSA[name])
    raise InvalidInputError(
        "name", name, bound=f"one of {', '.join([*_ML_KEM, *_ML_DSA])}", remedy="Choose one."
    )


def estimates() -> tuple[SecurityEstimate, ...]:
    """Returns the estimates of every primitive that this library uses or advises against."""
    combiner = "Breaking the combined KEM breaks both (see crypto.hybrid); SHA3-512 is a random oracle."
    concatenation = "A forged pair holds a forgery of each half (see crypto.hybrid_signature)."
    return (
        aes_256(),
        chacha20(),
        sponge("shake256", seed_bits=512),
        sponge("sha3-512-counter", seed_bits=512),
        xor_of_two_ciphers(),
        x25519(),
        lattice("ML-KEM-768"),
        lattice("ML-KEM-1024"),
        hybrid("X25519 + ML-KEM-768", x25519(), lattice("ML-KEM-768"), because=combiner),
        hybrid("X25519 + ML-KEM-1024", x25519(), lattice("ML-KEM-1024"), because=combiner),
        ed25519(),
        lattice("ML-DSA-65"),
        lattice("ML-DSA-87"),
        hybrid("Ed25519 + ML-DSA-65", ed25519(), lattice("ML-DSA-65"), because=concatenation),
        hybrid("Ed25519 + ML-DSA-87", ed25519(), lattice("ML-DSA-87"), because=concatenation),
    )


def _grover_within(key_bits: int, depth: int, *, unit: str) -> Bits:
    """All machines' evaluations if each may do 2^depth in a row: 2^S machines gain only 2^(S/2) (Zalka 1999)."""
    return Bits(
        max(key_bits / 2, key_bits + math.log2(math.pi**2 / 16.0) - depth),
        unit=unit,
        formula=f"max(key / 2, log2(π²/16 · 2^{key_bits} / 2^{depth}))",
        source="Zalka 1999 (parallel search is optimal as it is); NIST 2016, section 4.A.5 (depths)",
        assumptions=(_IDEAL, "A circuit's depth is limited as stated; one evaluation counts as depth 1."),
    )


def _curve(name: str) -> SecurityEstimate:
    n = 255
    qubits = 9 * n + 2 * math.ceil(math.log2(n)) + 10
    toffoli = 448.0 * n**3 * math.log2(n) + 4090.0 * n**3
    return SecurityEstimate(
        primitive=name,
        classical=Bits(
            0.5 * math.log2(math.pi / 4.0) + 252 / 2,
            unit="additions on the curve",
            formula="log2 √(π · 2^252 / 4)",
            source="Pollard's rho with the negation map: Bernstein, Lange & Schwabe 2011",
            assumptions=("No attack on Curve25519 beats generic collision search.",),
        ),
        quantum=Bits(
            0.0,
            unit="polynomial time",
            formula=f"Shor: {qubits} logical qubits and 2^{math.log2(toffoli):.1f} Toffoli gates at n = {n}",
            source="Shor 1994; Roetteler, Naehrig, Svore & Lauter 2017, section 5 (9n + 2⌈log2 n⌉ + 10 qubits, "
            "448 n³ log2 n + 4090 n³ gates)",
            assumptions=("A fault-tolerant quantum computer of that size exists; it is counted as free.",),
        ),
    )


_ML_KEM = {"ML-KEM-768": 3, "ML-KEM-1024": 4}


def _ml_kem_attacks(rank: int) -> tuple[LatticeAttack, ...]:
    # FIPS 203, table 2: q = 3329, n = 256, η₁ = 2: a centred binomial of deviation √(η₁/2). The attacker sees
    # (k + 1)·256 equations, those of the ciphertext included.
    instance = LweInstance(
        dimension=256 * rank, max_samples=256 * (rank + 1), modulus=3329, stddev=math.sqrt(2 / 2.0)
    )
    return primal_attack(instance), dual_attack(instance)


# FIPS 204, table 1: k, l, η, γ₁, γ₂.
_Q = 8380417
_ML_DSA = {
    "ML-DSA-65": (6, 5, 4, 1 << 19, (_Q - 1) // 32),
    "ML-DSA-87": (8, 7, 2, 1 << 19, (_Q - 1) // 32),
}


def _ml_dsa_attacks(k: int, rank: int, eta: int, gamma_1: int, gamma_2: int) -> tuple[LatticeAttack, ...]:
    stddev = math.sqrt(sum(i * i for i in range(-eta, eta + 1)) / (2 * eta + 1))
    keys = LweInstance(dimension=256 * rank, max_samples=256 * k, modulus=_Q, stddev=stddev)
    # Strong unforgeability (Dilithium specification 3.1, section 5): the larger bound, so the easier problem.
    forgery = SisInstance(
        dimension=256 * (k + rank + 1),
        equations=256 * k,
        modulus=_Q,
        bound=float(max(2 * gamma_1, 4 * gamma_2 + 1)),
    )
    return primal_attack(keys), dual_attack(keys), sis_attack(forgery)
