"""Security estimates: numbers of bits that never appear without what they rest on.

``Bits`` cannot be built without formula, source and assumptions, is no number, and prints them with the figure.
What is composed of several keeps the assumptions of all that decide it. The costs of single primitives are in
``primitive_costs``. All of it is *assumed* or *estimated*, never certified: nobody has a lower bound on attacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NoReturn

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int

GeneratorName = Literal["aes-256-ctr", "chacha20", "shake256", "sha3-512-counter"]
CIPHER_KEY_BITS: Mapping[str, int] = MappingProxyType({"aes-256-ctr": 256, "chacha20": 256})
"""Length of the key, of the generators that have one; the others take a seed of any length."""


class Bits:
    """log2 of an attack's cost, together with what that figure means.

    ``float(bits)`` and arithmetic are refused; comparisons, ``str`` and ``to_dict`` work.

    Args:
        log2_cost: The figure; 0 if the attack takes polynomial time.
        unit: What is counted, such as "evaluations of AES-256".
        formula: How the figure follows.
        source: Author and year, or standard and section.
        assumptions: What has to hold for it; at least one, none empty.

    Raises:
        InvalidInputError: If the figure is not a finite number of at least 0, or a text is empty.
    """

    __slots__ = ("_log2_cost", "assumptions", "formula", "source", "unit")

    def __init__(
        self, log2_cost: float, *, unit: str, formula: str, source: str, assumptions: Sequence[str]
    ) -> None:
        if not math.isfinite(log2_cost) or log2_cost < 0.0:
            raise InvalidInputError(
                "log2_cost",
                log2_cost,
                bound="a finite number of at least 0",
                remedy="0 means polynomial time.",
            )
        texts = {"unit": unit, "formula": formula, "source": source}
        stated = (assumptions,) if isinstance(assumptions, str) else tuple(assumptions)
        texts |= {f"assumption {number}": text for number, text in enumerate(stated, start=1)}
        for name, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise InvalidInputError(
                    name, text, bound="a sentence", remedy="A figure without it says nothing."
                )
        if not stated:
            raise InvalidInputError(
                "assumptions", stated, bound="at least one", remedy="Every estimate assumes something."
            )
        self._log2_cost = float(log2_cost)
        self.unit, self.formula, self.source, self.assumptions = unit, formula, source, stated

    def to_dict(self) -> dict[str, Any]:
        """Returns the figure, rounded down, and all that belongs to it, as JSON values."""
        return {
            "bits": math.floor(self._log2_cost),
            "unit": self.unit,
            "formula": self.formula,
            "source": self.source,
            "assumptions": list(self.assumptions),
        }

    def __str__(self) -> str:
        """Says figure, unit, formula, source and assumptions in one line."""
        return (
            f"{math.floor(self._log2_cost)} bits ({self.unit}; {self.formula}; {self.source}; assuming: "
            f"{' '.join(self.assumptions)})"
        )

    def __repr__(self) -> str:
        """Says the same as ``str``."""
        return f"Bits({self})"

    def __lt__(self, other: Bits) -> bool:
        """Compares the figures."""
        return self._log2_cost < other._log2_cost

    def reaches(self, num_bits: float) -> bool:
        """Returns whether the figure, under its assumptions, is at least ``num_bits``."""
        return self._log2_cost >= num_bits

    def __float__(self) -> NoReturn:
        """Refuses: a bare number would lose its assumptions."""
        raise TypeError(
            "Bits are no bare number. Use to_dict(), str() or reaches(), which keep the assumptions."
        )

    __hash__ = None  # type: ignore[assignment]


def weakest(parts: Sequence[Bits], *, because: str) -> Bits:
    """Returns what holds where an attacker may choose the cheapest of several attacks.

    Assumptions of all parts are kept: the minimum needs every one of them.

    Args:
        parts: At least one.
        because: Why the attacker may choose, one sentence.

    Raises:
        InvalidInputError: If there are no parts.
    """
    chosen = min(_some(parts))
    return Bits(
        chosen._log2_cost,
        unit=chosen.unit,
        formula=f"min over {len(parts)}: {chosen.formula}",
        source=chosen.source,
        assumptions=_merged(*(part.assumptions for part in parts), (because,)),
    )


def strongest(parts: Sequence[Bits], *, because: str) -> Bits:
    """Returns what holds where an attacker must carry out several attacks: the dearest of them, not their sum.

    Args:
        parts: At least one.
        because: Why the attacker must carry out all, one sentence.

    Raises:
        InvalidInputError: If there are no parts.
    """
    chosen = max(_some(parts))
    return Bits(
        chosen._log2_cost,
        unit=chosen.unit,
        formula=f"max over {len(parts)}: {chosen.formula}",
        source=chosen.source,
        assumptions=_merged(chosen.assumptions, (because,)),
    )


@dataclass(frozen=True, kw_only=True)
class SecurityEstimate:
    """What breaking a primitive costs.

    Attributes:
        primitive: Its name.
        classical: Without a quantum computer.
        quantum: With one, as large and as deep as wanted.
        quantum_within_depth: With one whose circuits are at most 2^D gates deep, by D; empty where depth does
            not matter or is not worked out.
    """

    primitive: str
    classical: Bits
    quantum: Bits
    quantum_within_depth: tuple[tuple[int, Bits], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {
            "primitive": self.primitive,
            "classical": self.classical.to_dict(),
            "quantum": self.quantum.to_dict(),
            "quantum_within_depth": {
                f"2^{depth}": bits.to_dict() for depth, bits in self.quantum_within_depth
            },
        }


@dataclass(frozen=True, kw_only=True)
class EntropySource:
    """A source that a seed was really drawn from.

    Attributes:
        name: What it is.
        bits: Min-entropy that it contributed.
        assumption: What makes that true, one sentence.
    """

    name: str
    bits: int
    assumption: str

    def __post_init__(self) -> None:
        positive_int("bits", self.bits, remedy="Leave out a source that contributed nothing.")
        if not self.assumption.strip() or not self.name.strip():
            raise InvalidInputError(
                "entropy source",
                self.name,
                bound="named and with an assumption",
                remedy="Say why it is unpredictable.",
            )


def operating_system_pool() -> EntropySource:
    """Returns the operating system's pool: 256 bits, however many bytes are read from it."""
    return EntropySource(
        name="operating system pool",
        bits=256,
        assumption="The operating system's pool was seeded with 256 bits that nobody else knows; its generator has "
        "a 256-bit key, so reading more bytes adds none.",
    )


def noise_security(
    generator: GeneratorName, *, seed_bits: int, sources: Sequence[EntropySource]
) -> SecurityEstimate:
    """Returns how hard it is to tell a generator's output from uniform bits.

    The quantum figure is ``min(seed entropy / 2, key / 2, capacity / 2)``. The seed's entropy is what the sources
    contributed, at most its length: asking for more bits of strength than were drawn does not give them.

    Args:
        generator: Which one.
        seed_bits: Length of the seed or key that it was given.
        sources: Independent sources that went into the seed.

    Raises:
        InvalidInputError: If there is no source, two have one name, the generator is unknown, or a cipher is given
            a seed of another length than its key.

    >>> pool = operating_system_pool()
    >>> noise_security("aes-256-ctr", seed_bits=256, sources=[pool]).quantum.to_dict()["bits"]
    128
    >>> noise_security("shake256", seed_bits=512, sources=[pool]).quantum.to_dict()["bits"]
    128
    """
    from dp_flash_attention.quantum import primitive_costs as costs

    length = positive_int("seed_bits", seed_bits, remedy="256 for a cipher, 512 for a sponge.")
    if not sources or len({source.name for source in sources}) != len(sources):
        raise InvalidInputError(
            "sources",
            [source.name for source in sources],
            bound="at least one, with different names",
            remedy="Name every source once.",
        )
    if generator in ("shake256", "sha3-512-counter"):
        own = costs.sponge(generator, seed_bits=length)
    elif generator in CIPHER_KEY_BITS:
        if length != CIPHER_KEY_BITS[generator]:
            raise InvalidInputError(
                "seed_bits",
                length,
                bound=f"{CIPHER_KEY_BITS[generator]}, the key of {generator}",
                remedy="Use shake256 for a longer seed.",
            )
        own = costs.aes_256() if generator == "aes-256-ctr" else costs.chacha20()
    else:
        raise InvalidInputError(
            "generator",
            generator,
            bound="one of aes-256-ctr, chacha20, shake256, sha3-512-counter",
            remedy="Choose one.",
        )
    entropy = min(length, sum(source.bits for source in sources))
    why = "The attacker attacks seed or generator, whichever is cheaper."
    assumed = [*(source.assumption for source in sources)]
    if len(sources) > 1:
        assumed.append("The sources are independent, and at least as many bits as stated came from each.")
    guess = _guessing(entropy, quantum=False, assumptions=assumed)
    search = _guessing(entropy, quantum=True, assumptions=assumed)
    return SecurityEstimate(
        primitive=f"{generator}, {length}-bit seed from {', '.join(source.name for source in sources)}",
        classical=weakest([guess, own.classical], because=why),
        quantum=weakest([search, own.quantum], because=why),
    )


def search_probability(quantum: Bits, *, iterations_log2: float) -> float:
    """Returns a bound of the probability that quantum search ends in time: 4q²/2^n, for a cost of 2^(n/2).

    Source: Boyer, Brassard, Høyer & Tapp 1998; Zalka 1999.

    Args:
        quantum: What the whole search costs.
        iterations_log2: log2 of the iterations q that the attacker makes, one after the other.
    """
    return min(1.0, 4.0 * math.pow(2.0, 2.0 * (iterations_log2 - quantum._log2_cost)))


def hybrid(name: str, first: SecurityEstimate, second: SecurityEstimate, *, because: str) -> SecurityEstimate:
    """Returns the estimate of two primitives that both have to be broken: for each attacker, the dearer one.

    Args:
        name: What the two make together.
        first: One of them.
        second: The other.
        because: The theorem by which breaking one is not enough.
    """
    return SecurityEstimate(
        primitive=name,
        classical=strongest([first.classical, second.classical], because=because),
        quantum=strongest([first.quantum, second.quantum], because=because),
    )


def _guessing(entropy: int, *, quantum: bool, assumptions: Sequence[str]) -> Bits:
    return Bits(
        entropy / 2 if quantum else entropy,
        unit="evaluations of the generator",
        formula=f"seed entropy / 2 = {entropy} / 2" if quantum else f"seed entropy = {entropy}",
        source="Grover 1996; Zalka 1999 (no quantum search is faster)" if quantum else "exhaustive search",
        assumptions=assumptions,
    )


def _some(parts: Sequence[Bits]) -> Sequence[Bits]:
    if not parts:
        raise InvalidInputError("parts", parts, bound="at least one", remedy="Estimate something first.")
    return parts


def _merged(*groups: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for group in groups for text in group))
