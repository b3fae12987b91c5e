"""Seeds of 512 bits from several sources, by extract-and-expand, and the key type that carries them."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise.entropy import SecretBytes, os_entropy
from dp_flash_attention.noise.entropy_sources import (
    MAX_CREDIT_BITS,
    CpuInstruction,
    EntropySource,
    OsPool,
)
from dp_flash_attention.noise.health import STARTUP_BYTES, check_health

WIDE_KEY_BYTES: Final = 64
_SALT: Final = b"dpfa.seed.v1"
_INFO: Final = b"dpfa wide key"
_DERIVE: Final = b"dpfa.derive.wide.v1"


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What one source gave.

    Attributes:
        name: The source's name.
        num_bytes: Bytes that entered the seed.
        credited_bits: Bits of entropy counted for them: the least of the source's credit, what the bytes can
            carry at its claimed rate, and 256.
        vouched: Whether the credit is the caller's word: true of everything but the library's own ``OsPool`` and
            ``CpuInstruction``.
    """

    name: str
    num_bytes: int
    credited_bits: int
    vouched: bool


@dataclass(frozen=True, kw_only=True)
class SeedReport:
    """What a seed is worth, from what was really there.

    Attributes:
        sources: What each source gave.
        entropy_bits: The sum of credits, at most 512. *Assumed*: that the sources are independent and their
            claims true; the health tests would have noticed a stuck or badly biased one.
    """

    sources: tuple[SourceReport, ...]
    entropy_bits: int

    @property
    def drawn_bits(self) -> int:
        """What is left of ``entropy_bits`` if every source that the caller vouched for is worth nothing."""
        own = sum(source.credited_bits for source in self.sources if not source.vouched)
        return min(8 * WIDE_KEY_BYTES, own)

    @property
    def vouched(self) -> tuple[str, ...]:
        """What of the strength is the caller's word, one statement for each such source."""
        return tuple(
            f"{source.credited_bits} of the key's {self.entropy_bits} bits, from source {source.name!r}; without what the "
            f"caller vouched for the key is worth {self.drawn_bits} bits"
            for source in self.sources
            if source.vouched and source.credited_bits > 0
        )


class WideSecretKey(SecretBytes):
    """A 512-bit secret for SHAKE256 noise. It is never shown, cannot be pickled, and can be destroyed.

    Make one with ``draw_wide_key``; read a stored one back with ``from_bytes``. AES and ChaCha20 refuse it.

    Args:
        secret: 64 bytes.
        entropy_bits: What the secret is worth, 0 to 512; subkeys are worth the same together.
        vouched: As in ``SecretBytes``: what of that rests on the caller's word; None for all of it.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: none; a key knows nothing about data.
        * Public: ``entropy_bits``. Privacy of everything made with the key ends when its bytes are known.
        * Theorem: SHAKE256 keyed by a prefix is a pseudo-random function in the ideal-permutation model (sponge
          indifferentiability, capacity 512), so subkeys of different purposes are computationally independent.
        * Source: FIPS 202; Bertoni, Daemen, Peeters & Van Assche 2008.
    """

    kind = "wide secret key"
    num_bytes = WIDE_KEY_BYTES
    origin = "draw_wide_key"

    def __init__(
        self, secret: bytes | bytearray, *, entropy_bits: int, vouched: tuple[str, ...] | None = None
    ) -> None:
        super().__init__(secret, vouched=vouched)
        if isinstance(entropy_bits, bool) or not 0 <= entropy_bits <= 8 * WIDE_KEY_BYTES:
            raise InvalidInputError(
                "entropy_bits", entropy_bits, bound="0 to 512", remedy="Take it from the seed's report."
            )
        self.entropy_bits = int(entropy_bits)
        if vouched is None:
            self.vouched = (
                f"all {self.entropy_bits} bits of the wide secret key, whose bytes and figure were passed in and not drawn",
            )

    @classmethod
    def from_bytes(cls, secret: bytes, *, entropy_bits: int) -> WideSecretKey:
        """Returns the key that ``export`` wrote, with the worth that its report stated: *assumed*, the caller's word.

        Raises:
            InvalidInputError: If ``secret`` is not 64 bytes, or ``entropy_bits`` is out of range.
        """
        return cls(secret, entropy_bits=entropy_bits)

    def derive(self, purpose: str) -> WideSecretKey:
        """Returns the subkey for ``purpose``: SHAKE256(person | key | purpose's UTF-8 bytes), 64 bytes.

        Raises:
            InvalidInputError: If ``purpose`` is not a non-empty string.
            NoiseUnavailableError: If the key was destroyed.
        """
        if not isinstance(purpose, str) or not purpose:
            raise InvalidInputError(
                "purpose", purpose, bound="a non-empty string", remedy="Name what the derived key is for."
            )
        message = _DERIVE + self.export() + purpose.encode("utf-8")
        return WideSecretKey(
            hashlib.shake_256(message).digest(WIDE_KEY_BYTES),
            entropy_bits=self.entropy_bits,
            vouched=self.vouched,
        )

    def _state(self) -> str:
        return f"{super()._state()}, entropy_bits={self.entropy_bits}"


def draw_wide_key(
    sources: Sequence[EntropySource], *, min_entropy_bits: int
) -> tuple[WideSecretKey, SeedReport]:
    """Draws from every source, tests what came, and mixes it to one 512-bit key.

    From each source 1,024 bytes are read (a key file gives all it has), tested, and mixed whole: HKDF (RFC 5869) with
    HMAC-SHA3-512 over name and bytes of each, lengths first. The result is at least as hard to guess as any one
    source's share, whatever the others do. Where the operating system's pool is not among the sources, 64 bytes of it
    are mixed in without credit, so that two keys differ although a key file does not.

    Args:
        sources: At least one, with different names.
        min_entropy_bits: What is asked for: 256, or 512 for 256-bit quantum strength.

    Raises:
        NoiseUnavailableError: If a source fails, fails its health tests, gives too little or the same bytes as
            another one, or the credits do not add up to ``min_entropy_bits``.
        InvalidInputError: If the list is empty, repeats a name or has the pool or the processor twice, or
            ``min_entropy_bits`` is out of range.
    """
    names = [source.name for source in sources]
    if not names or len(set(names)) != len(names):
        raise InvalidInputError(
            "sources", names, bound="at least one, with different names", remedy="Start with OsPool()."
        )
    if isinstance(min_entropy_bits, bool) or not 0 < min_entropy_bits <= 8 * WIDE_KEY_BYTES:
        raise InvalidInputError(
            "min_entropy_bits", min_entropy_bits, bound="1 to 512", remedy="Ask for 256 or 512."
        )
    for kind in (OsPool, CpuInstruction):
        if sum(isinstance(source, kind) for source in sources) > 1:
            raise InvalidInputError(
                "sources",
                names,
                bound=f"with one {kind.__name__} at most: read twice, under any names, it is one source",
                remedy="Add an independent one.",
            )
    samples = {source.name: _sample(source) for source in sources}
    if len(set(samples.values())) != len(samples):
        raise NoiseUnavailableError(
            f"Two of the sources {names} returned the same bytes, but they must be independent. Name each only once."
        )
    reports = tuple(
        SourceReport(
            name=source.name,
            num_bytes=len(samples[source.name]),
            credited_bits=_credit(source, len(samples[source.name])),
            # A subclass can read and claim what it likes.
            vouched=type(source) not in (OsPool, CpuInstruction),
        )
        for source in sources
    )
    entropy = min(8 * WIDE_KEY_BYTES, sum(report.credited_bits for report in reports))
    if entropy < min_entropy_bits:
        listed = ", ".join(f"{report.name} {report.credited_bits}" for report in reports)
        raise NoiseUnavailableError(
            f"The sources are credited with {entropy} bits ({listed}), but {min_entropy_bits} are asked for. "
            "Add an independent source: CpuInstruction(), a KeyFile, a hardware token."
        )
    mixed = list(samples.items())
    if not any(isinstance(source, OsPool) for source in sources):
        mixed.append(("fresh", os_entropy(WIDE_KEY_BYTES)))
    report = SeedReport(sources=reports, entropy_bits=entropy)
    key = WideSecretKey(extract_and_expand(mixed), entropy_bits=entropy, vouched=report.vouched)
    return key, report


def extract_and_expand(samples: Sequence[tuple[str, bytes]]) -> bytes:
    """Returns 64 bytes: HKDF with HMAC-SHA3-512 (RFC 5869), salt ``dpfa.seed.v1``, info ``dpfa wide key``."""
    material = b"".join(
        struct.pack("<QQ", len(name.encode()), len(sample)) + name.encode() + sample
        for name, sample in samples
    )
    extracted = hmac.new(_SALT, material, hashlib.sha3_512).digest()
    return hmac.new(extracted, _INFO + b"\x01", hashlib.sha3_512).digest()


def _sample(source: EntropySource) -> bytes:
    sample = source.read(STARTUP_BYTES)
    if not isinstance(sample, bytes) or len(sample) < 32:
        shown = f"{len(sample)} bytes" if isinstance(sample, bytes) else type(sample).__name__
        raise NoiseUnavailableError(
            f"Entropy source {source.name!r} returned {shown}, but at least 32 bytes are needed. Repair it."
        )
    check_health(source.name, sample, min_entropy_per_byte=source.min_entropy_per_byte)
    return sample


def _credit(source: EntropySource, num_bytes: int) -> int:
    if isinstance(source.credit_bits, bool) or not 0 <= source.credit_bits <= MAX_CREDIT_BITS:
        raise InvalidInputError(
            f"the credit of source {source.name!r}",
            source.credit_bits,
            bound=f"0 to {MAX_CREDIT_BITS}",
            remedy="No source is credited with more; add another one.",
        )
    return min(int(source.credit_bits), int(num_bytes * source.min_entropy_per_byte))
