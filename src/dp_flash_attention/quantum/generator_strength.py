"""What the noise's bits stand on: the advantage of telling them from coins, and the strength of their key.

Both are statements about the *best known* attacks under stated assumptions. A key of n bits falls to Grover's search with
q sequential iterations with probability at most 4q²/2^n (Boyer, Brassard, Høyer & Tapp 1998; Zalka 1999: no algorithm
that only evaluates the cipher does better). How many bits that are is ``security_estimate``'s to say: every figure
here is read off its estimate. AES in counter mode never repeats a block where coins would, which is worth
b²/2^129 after b blocks under one key (Bellare & Rogaway 2006); SHAKE256 and ChaCha20 have no such term.
"""

from __future__ import annotations

from collections.abc import Sequence

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.noise import ExactCipher, NoiseKey, WideSecretKey
from dp_flash_attention.quantum.security_estimate import (
    CIPHER_KEY_BITS,
    Bits,
    EntropySource,
    noise_security,
    search_probability,
)

# 2^64 gates in sequence are about what NIST expects of a decade on present architectures; 2^96 is more than anyone's
# guess (call for post-quantum proposals, 2016, section 4.A.5, MAXDEPTH).
GROVER_ITERATIONS_LOG2 = 64
# A tile of 8,192 samples reads at most 1,216 blocks and 8,192 more in the rare event, for each of at most 50 layers. Wide
# samplers read less: at most 71,232 blocks for one sample and 379,904 for 114,688 (``noise.wide_sampler``).
_TILE = 8192
_BLOCKS_PER_TILE = 50 * (1216 + 8192)


def generator_advantage(dimension: int, bits: int, cipher: ExactCipher) -> float:
    """Returns a bound of what an attacker of 2^64 sequential Grover iterations gains from one release's bits.

    Assumed: no attack on the cipher beats key search. Added for AES: the switching term, which needs no assumption.

    Args:
        dimension: Number of coordinates that read noise.
        bits: Bits of entropy in the key that the noise starts from.
        cipher: What turns the key into bits.
    """
    tiles = positive_int("dimension", dimension, remedy="Count the coordinates.") // _TILE + 1
    key_search = (
        search_probability(_strength(bits, cipher), iterations_log2=GROVER_ITERATIONS_LOG2) if bits else 1.0
    )
    switching = float(tiles * _BLOCKS_PER_TILE) ** 2 * 2.0**-129 if cipher == "aes-256-ctr" else 0.0
    return key_search + switching


def suitable_cipher(key: NoiseKey, cipher: ExactCipher | None) -> ExactCipher:
    """Returns ``cipher``, or the fastest that can carry the key: AES-256 for 256 bits, SHAKE256 for more.

    Raises:
        InvalidInputError: If the cipher cannot use the whole key; cutting a key would weaken it in silence.
    """
    bits = key_bits(key)
    chosen: ExactCipher = cipher or ("aes-256-ctr" if bits == 256 else "shake256")
    if chosen != "shake256" and bits != CIPHER_KEY_BITS.get(chosen):
        raise InvalidInputError(
            "cipher", cipher, bound=f"'shake256' for a key of {bits} bits", remedy="Leave cipher at None."
        )
    return chosen


def key_bits(key: NoiseKey) -> int:
    """Returns the length of the key in bits."""
    return 8 * len(key.export())


def given_assumed_entropy(vouched: Sequence[str]) -> str:
    """Returns what a certified statement adds where δ counts on bits that are the caller's word; nothing otherwise."""
    return ", given the key's bits, which are assumed" if vouched else ""


def secret_bits(key: NoiseKey) -> int:
    """Returns the bits of entropy the key is credited with; 0 for a test key, whose bytes anyone can compute."""
    if key.is_test_key:
        return 0
    return min(key_bits(key), key.entropy_bits) if isinstance(key, WideSecretKey) else key_bits(key)


def searched_bits(key: NoiseKey) -> int:
    """Returns the bits that a search for the key has to cover; a test key's are counted as if it were secret."""
    return key_bits(key) if key.is_test_key else secret_bits(key)


def quantum_security_bits(bits: int, cipher: ExactCipher) -> int:
    """Returns the estimate's figure, rounded down: min(secret bits, cipher's key or capacity)/2; 0 without a secret."""
    figure: int = _strength(bits, cipher).to_dict()["bits"] if bits else 0
    return figure


def strength_assumptions(bits: int, cipher: ExactCipher, *, vouched: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns what has to be true for ``quantum_security_bits`` to mean anything.

    Args:
        bits: Secret bits of the key.
        cipher: What turns the key into bits.
        vouched: What of those bits is the caller's word (``noise.entropy.vouched_entropy``); listed one by one.
    """
    if bits == 0:
        return ("NOTHING: the noise comes from a test key, so anyone can subtract it.",)
    strength = quantum_security_bits(bits, cipher)
    return (
        f"The noise's key has {2 * strength} bits of entropy and stays secret; quantum search then takes about "
        f"2^{strength} calls.",
        f"No attack on {cipher} beats key search; an attacker runs at most 2^{GROVER_ITERATIONS_LOG2} Grover iterations "
        "in sequence (the advantage in δ); running k searches side by side divides the time by √k only.",
        *(f"assumed, on the caller's word: {statement}." for statement in vouched),
    )


def _strength(bits: int, cipher: ExactCipher) -> Bits:
    """Returns the quantum part of the security estimate of a key with ``bits`` bits of entropy."""
    key = EntropySource(
        name="the noise's key",
        bits=bits,
        assumption=f"The noise's key has {bits} bits of entropy and stays secret.",
    )
    return noise_security(cipher, seed_bits=CIPHER_KEY_BITS.get(cipher, bits), sources=[key]).quantum
