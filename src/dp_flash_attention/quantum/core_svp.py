"""Core-SVP: what the best known lattice attacks on ML-KEM and ML-DSA cost, by one SVP call in their block size.

The methodology is that of the schemes' own submissions (Alkim et al. 2016, section 6; Kyber specification 3.02,
section 5.2; Dilithium specification 3.1, section 5 and appendix C): find the smallest BKZ block size b for which an
attack works, and charge it 2^(0.292·b) classically or 2^(0.265·b) quantumly, the exponent of one sieve in dimension
b. Everything else is free to the attacker: the polynomial factors, the number of SVP calls, the memory of 2^(0.2075·b)
vectors, the depth and the error correction of the quantum circuit. Real attacks cost more; how much more is open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# log2 of the cost of one sieve in dimension b, over b: Becker, Ducas, Gama & Laarhoven 2016; Laarhoven 2015,
# section 14.2.10; and of the number of vectors it returns.
CLASSICAL_EXPONENT = math.log2(math.sqrt(3.0 / 2.0))  # 0.2925
QUANTUM_EXPONENT = math.log2(math.sqrt(13.0 / 9.0))  # 0.2653
_VECTORS_EXPONENT = math.log2(math.sqrt(4.0 / 3.0))  # 0.2075
_SMALLEST_BLOCK = 50  # below it the root-Hermite formula is not meant to hold
_SAMPLE_STEP = 1


@dataclass(frozen=True, kw_only=True)
class LweInstance:
    """Learning with errors: recover s from (A, As + e mod q).

    Attributes:
        dimension: n, the number of unknowns: the ring's degree times the module's rank.
        max_samples: The most equations there are.
        modulus: q.
        stddev: Standard deviation of a coordinate of s and e.
    """

    dimension: int
    max_samples: int
    modulus: int
    stddev: float


@dataclass(frozen=True, kw_only=True)
class SisInstance:
    """Short integer solutions: find x ≠ 0 with Ax = 0 mod q and every coordinate within a bound.

    Attributes:
        dimension: The number of coordinates.
        equations: The number of rows of A.
        modulus: q.
        bound: Largest absolute value of a coordinate.
    """

    dimension: int
    equations: int
    modulus: int
    bound: float


@dataclass(frozen=True, kw_only=True)
class LatticeAttack:
    """The cheapest attack of a kind.

    Attributes:
        name: ``primal``, ``dual`` or ``sis``.
        block_size: b.
        samples: Equations it uses; for ``sis`` all of them.
        classical_bits: log2 of its cost with a classical sieve.
        quantum_bits: log2 of its cost with a quantum sieve.
    """

    name: str
    block_size: int
    samples: int
    classical_bits: float
    quantum_bits: float


def root_hermite(block_size: int) -> float:
    """Returns δ(b), by which BKZ-b shortens: ((πb)^(1/b)·b / 2πe)^(1/(2(b − 1))) (Chen 2013, thesis)."""
    b = block_size
    return float(((math.pi * b) ** (1.0 / b) * b / (2.0 * math.pi * math.e)) ** (1.0 / (2.0 * (b - 1.0))))


def primal_attack(instance: LweInstance) -> LatticeAttack:
    """Returns the cheapest primal (unique-SVP) attack.

    It works if the error's projection on the last block is shorter than that block's first Gram–Schmidt vector:
    σ·√b ≤ δ^(2b−d−1)·q^(m/d) with d = m + n + 1 (Alkim et al. 2016, section 6.3). The block size is the smallest
    for which some number m of samples satisfies it.
    """

    def works(block: int, samples: int) -> bool:
        d = samples + instance.dimension + 1
        left = math.log(instance.stddev) + 0.5 * math.log(block)
        right = (2 * block - d - 1) * math.log(root_hermite(block)) + samples / d * math.log(instance.modulus)
        return d > block and left <= right

    def samples_for(block: int) -> int | None:
        return next((m for m in range(1, instance.max_samples + 1, _SAMPLE_STEP) if works(block, m)), None)

    block = _smallest(lambda b: samples_for(b) is not None, upper=instance.dimension + instance.max_samples)
    samples = samples_for(block)
    assert samples is not None, "the search returned a block that works"
    return _attack("primal", block, samples, repetitions_bits=0.0)


def dual_attack(instance: LweInstance) -> LatticeAttack:
    """Returns the cheapest dual (distinguishing) attack.

    BKZ-b finds a dual vector of length ℓ = δ^(d−1)·q^(n/d), d = m + n, whose product with the sample is biased by
    ε = exp(−2π²τ²), τ = ℓσ/q. It needs 1/ε² such vectors; one sieve gives 2^(0.2075·b) of them, so the attack is
    repeated max(1, 1/(2^(0.2075·b)·ε²)) times (Alkim et al. 2016, section 6.4).
    """
    best: LatticeAttack | None = None
    for block in range(_SMALLEST_BLOCK, instance.dimension + instance.max_samples):
        if best is not None and block * CLASSICAL_EXPONENT >= best.classical_bits:
            break  # a larger block costs more even without repetition
        log_delta = math.log(root_hermite(block))
        log_q = math.log(instance.modulus)
        # The length is smallest where its logarithm (d − 1)·ln δ + (n/d)·ln q is: at d = √(n·ln q / ln δ).
        d = round(math.sqrt(instance.dimension * log_q / log_delta))
        d = min(max(d, instance.dimension + 1), instance.dimension + instance.max_samples)
        log_length = (d - 1) * log_delta + instance.dimension / d * log_q
        tau = math.exp(log_length - log_q) * instance.stddev
        log2_bias = -2.0 * math.pi**2 * tau**2 / math.log(2.0)
        repetitions = max(0.0, -2.0 * log2_bias - block * _VECTORS_EXPONENT)
        found = _attack("dual", block, d - instance.dimension, repetitions_bits=repetitions)
        if best is None or found.classical_bits < best.classical_bits:
            best = found
    assert best is not None, "there is at least one block size"
    return best


def sis_attack(instance: SisInstance) -> LatticeAttack:
    """Returns the cheapest attack on SIS with a bound on every coordinate.

    After randomising the basis and BKZ-b its Gram–Schmidt lengths fall from ℓ₁ by δ^(−2) a step to 1, over B
    vectors whose product is q^equations. A sieve's vectors in the first block have length about ℓ₁; on the B
    dimensions of the slope their coordinates are taken as Gaussian with deviation ℓ₁/√B, and 0 on the rest. The
    chance that all lie within the bound is erf(bound/(√2·ℓ₁/√B))^B; divided by the sieve's 2^(0.2075·b) vectors it
    is the number of repetitions (Dilithium specification 3.1, appendix C.3).
    """
    best: LatticeAttack | None = None
    log_volume = instance.equations * math.log(instance.modulus)
    for block in range(_SMALLEST_BLOCK, instance.dimension):
        if best is not None and block * CLASSICAL_EXPONENT >= best.classical_bits:
            break
        slope = 2.0 * math.log(root_hermite(block))
        # slope·B(B + 1)/2 = log volume gives the slope's length.
        steps = min(instance.dimension, int((math.sqrt(1.0 + 8.0 * log_volume / slope) - 1.0) / 2.0))
        log_first = log_volume / steps + slope * (steps - 1) / 2.0
        deviation = math.exp(log_first) / math.sqrt(steps + 1)
        inside = math.erf(instance.bound / (math.sqrt(2.0) * deviation))
        if inside <= 0.0:
            continue
        repetitions = max(0.0, -(steps + 1) * math.log2(inside) - block * _VECTORS_EXPONENT)
        found = _attack("sis", block, instance.equations, repetitions_bits=repetitions)
        if best is None or found.classical_bits < best.classical_bits:
            best = found
    assert best is not None, "there is at least one block size"
    return best


def _attack(name: str, block: int, samples: int, *, repetitions_bits: float) -> LatticeAttack:
    return LatticeAttack(
        name=name,
        block_size=block,
        samples=samples,
        classical_bits=block * CLASSICAL_EXPONENT + repetitions_bits,
        quantum_bits=block * QUANTUM_EXPONENT + repetitions_bits,
    )


def _smallest(holds: Callable[[int], bool], *, upper: int) -> int:
    """Returns the smallest block size for which a monotone property holds, by bisection."""
    low, high = _SMALLEST_BLOCK, upper
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
