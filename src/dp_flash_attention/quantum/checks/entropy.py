"""Checks of entropy: the sources of this machine, what they are worth together, and that a stuck one is found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from dp_flash_attention.core.errors import NoiseUnavailableError
from dp_flash_attention.noise import (
    CpuInstruction,
    EntropySource,
    ExternalSource,
    OsPool,
    SecretKey,
    WideSecretKey,
    draw_wide_key,
)
from dp_flash_attention.noise.cpu_entropy import has_rdseed
from dp_flash_attention.noise.entropy import os_entropy, vouched_entropy
from dp_flash_attention.noise.health import (
    check_health,
    largest_proportion,
    longest_run,
    proportion_cutoff,
    repetition_cutoff,
)
from dp_flash_attention.quantum.evidence import Evidence, NamedCheck
from dp_flash_attention.quantum.generator_strength import secret_bits, strength_assumptions

_SAMPLE_BYTES = 1 << 14
_DEEP_SAMPLE_BYTES = 1 << 20


def entropy_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Whether to test a mebibyte of each source.
    """
    sources: list[EntropySource] = [OsPool()]
    if has_rdseed():
        sources.append(CpuInstruction())
    size = _DEEP_SAMPLE_BYTES if deep else _SAMPLE_BYTES
    return [
        *((f"source {source.name!r}", partial(source_health, source, size)) for source in sources),
        ("a stuck source is found", stuck_source),
        ("what seeds are worth", partial(seed_strength, sources)),
        ("what a caller vouches for", vouched_strength),
    ]


def source_health(source: EntropySource, num_bytes: int) -> Iterator[Evidence]:
    """Yields both tests of SP 800-90B on fresh bytes of ``source``."""
    sample = source.read(num_bytes)
    rate = source.min_entropy_per_byte
    try:
        check_health(source.name, sample, min_entropy_per_byte=rate)
        verdict = True
    except NoiseUnavailableError:
        verdict = False
    yield Evidence(
        name=f"source {source.name!r}: health",
        claim=f"{len(sample):,} bytes do not contradict {rate:g} bits of min-entropy a byte (SP 800-90B, 4.4).",
        measured=f"longest run {longest_run(sample)}, most often in a window {largest_proportion(sample)}",
        bound=f"below {repetition_cutoff(rate)} and {proportion_cutoff(rate)} (false alarm 2^-40 a position)",
        holds=verdict and len(sample) > 0,
    )


def stuck_source() -> Iterator[Evidence]:
    """Yields whether a source that always returns one byte stops a seed from being drawn."""
    stuck = ExternalSource(name="stuck", reader=bytes, credit_bits=256)
    try:
        draw_wide_key([OsPool(), stuck], min_entropy_bits=256)
        found, refused = "a seed was drawn", False
    except NoiseUnavailableError as error:
        found, refused = str(error).partition(",")[0], True
    yield Evidence(
        name="a stuck source",
        claim="A source that is stuck stops the seed, although the pool alone would have carried it.",
        measured=found,
        bound="refused",
        holds=refused,
        basis="computed",
    )


def seed_strength(sources: Sequence[EntropySource]) -> Iterator[Evidence]:
    """Yields what one source and all of this machine's are credited with, and that two seeds differ."""
    for chosen in (sources[:1], sources) if len(sources) > 1 else (sources,):
        expected = min(512, sum(source.credit_bits for source in chosen))
        first, report = draw_wide_key(chosen, min_entropy_bits=expected)
        second, _ = draw_wide_key(chosen, min_entropy_bits=expected)
        names = " + ".join(source.name for source in report.sources)
        yield Evidence(
            name=f"seed from {names}",
            claim="A seed is worth what its sources are credited with, one source at most 256 bits.",
            measured=f"{report.entropy_bits} bits; two draws {'differ' if first != second else 'ARE EQUAL'}"
            + "".join(f"; assumed, on the caller's word: {statement}" for statement in report.vouched),
            bound=f"at most {256 * len(chosen)} bits, different",
            holds=report.entropy_bits <= 256 * len(chosen) and first != second,
        )


def vouched_strength() -> Iterator[Evidence]:
    """Yields whether bits that only a caller vouches for are listed as assumed, also those of subkeys."""
    token = ExternalSource(name="token", reader=os_entropy, credit_bits=256)
    mixed, report = draw_wide_key([OsPool(), token], min_entropy_bits=512)
    passed_in = WideSecretKey.from_bytes(mixed.export(), entropy_bits=512)
    for name, key, drawn in (
        ("a source of the caller's", mixed, report.drawn_bits),
        ("bytes that were passed in", passed_in, 0),
        ("the pool alone", SecretKey.from_os(), 256),
    ):
        vouched = vouched_entropy(key.derive("subkey"))
        bits = secret_bits(key)
        lines = strength_assumptions(bits, "shake256", vouched=vouched)
        found = sum(line.startswith("assumed, on the caller's word") for line in lines)
        wanted = int(drawn < bits)
        yield Evidence(
            name=f"strength from {name}",
            claim="Bits of entropy that rest on the caller's word are listed as assumed wherever a strength is stated.",
            measured=f"{bits} bits, {drawn} of them drawn by the library; {found} statement(s) 'assumed'",
            bound=f"{wanted} statement(s)",
            holds=found == wanted,
            basis="computed",
        )
