"""What the noise's bits stand on: the advantage of telling them from coins, and the strength of their key.

Both are statements about the *best known* attacks under stated assumptions. A key of n bits falls to Grover's search with
q sequential iterations with probability at most 4q²/2^n (Boyer, Brassard, Høyer & Tapp 1998; Zalka 1999: no algorithm
that only evaluates the cipher does better). AES in counter mode never repeats a block where coins would, which is worth
b²/2^129 after b blocks (Bellare & Rogaway 2006).
"""

from __future__ import annotations

from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.noise import NoiseKey

# NIST's upper guess of how many gates in sequence anyone will ever run is 2^96; 2^64 is its figure for a decade of
# serial computing at the fastest conceivable clock (FIPS 203 call for proposals, 2016, section 4.A.5).
GROVER_ITERATIONS_LOG2 = 64
KEY_BITS = 256


def generator_advantage(num_blocks: int) -> float:
    """Returns a bound of what an attacker of 2^64 sequential Grover iterations gains from ``num_blocks`` AES blocks.

    Assumed: no attack on AES-256 beats key search. Added: the switching term, which needs no assumption.
    """
    blocks = positive_int("num_blocks", num_blocks, remedy="Count what the noise reads.")
    key_search = 4.0 * 2.0 ** (2 * GROVER_ITERATIONS_LOG2 - KEY_BITS)
    return key_search + float(blocks) ** 2 * 2.0**-129


def quantum_security_bits(key: NoiseKey) -> int:
    """Returns half the key's bits, or 0 for a test key, whose bytes anyone can compute."""
    return 0 if key.is_test_key else KEY_BITS // 2


def strength_assumptions(key: NoiseKey) -> tuple[str, ...]:
    """Returns what has to be true for ``quantum_security_bits`` to mean anything."""
    if key.is_test_key:
        return ("NOTHING: the noise comes from a test key, so anyone can subtract it.",)
    return (
        "The noise's 256-bit key has 256 bits of entropy and stays secret; quantum search then takes about 2^128 calls.",
        f"No attack on AES-256 beats key search; an attacker runs at most 2^{GROVER_ITERATIONS_LOG2} Grover iterations "
        "in sequence (the advantage in δ); searches in parallel divide the time by the root of their number only.",
    )
