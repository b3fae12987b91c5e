"""What a mechanism did, in the terms an accountant needs: the events that are composed.

An event carries its own neighbouring relation and sampler. There is no event that could be read two
ways, so a shuffled loader or a replace-one claim cannot be accounted as Poisson add/remove by accident.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation
from dp_flash_attention.core.validation import positive_finite, positive_int, probability

_NOISE_REMEDY = (
    "It is the noise's standard deviation over the clip norm; common values lie between 0.5 and 10."
)
_COUNT_REMEDY = "Count the releases that are really made."


@dataclass(frozen=True, kw_only=True)
class PoissonSampledGaussian:
    """``num_steps`` releases of a clipped sum over a fresh Poisson sample, plus Gaussian noise.

    Each unit enters each step's sum independently with probability ``sampling_prob``, contributes a vector
    of L2 norm at most C, and N(0, (``noise_multiplier``·C)² I) is added to the sum. A sample that happens
    to be empty is a step like any other.

    Attributes:
        sampling_prob: Probability, in (0, 1], with which each unit enters a step; public.
        noise_multiplier: Noise standard deviation over the bound C on one unit's contribution; unitless.
        num_steps: Number of releases.
        neighboring_relation: Add/remove (the default of this library) or replace-one. Replacing a unit moves
            the sum by up to 2C: the same noise protects less, and the accountants charge for it.

    Raises:
        InvalidInputError: If a value lies outside its range.
    """

    sampling_prob: float
    noise_multiplier: float
    num_steps: int
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE

    def __post_init__(self) -> None:
        probability(
            "sampling_prob", self.sampling_prob, remedy="Use expected batch size / number of records."
        )
        positive_finite("noise_multiplier", self.noise_multiplier, remedy=_NOISE_REMEDY)
        positive_int("num_steps", self.num_steps, remedy=_COUNT_REMEDY)
        _check_relation(self.neighboring_relation)


@dataclass(frozen=True, kw_only=True)
class GaussianRelease:
    """``count`` releases over all the data, each with Gaussian noise.

    Attributes:
        noise_multiplier: Noise standard deviation over the release's L2 sensitivity *under*
            ``neighboring_relation``; unitless.
        count: Number of such releases.
        neighboring_relation: The relation that the sensitivity was derived for.

    Raises:
        InvalidInputError: If a value lies outside its range.
    """

    noise_multiplier: float
    count: int = 1
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE

    def __post_init__(self) -> None:
        positive_finite("noise_multiplier", self.noise_multiplier, remedy=_NOISE_REMEDY)
        positive_int("count", self.count, remedy=_COUNT_REMEDY)
        _check_relation(self.neighboring_relation)


@dataclass(frozen=True, kw_only=True)
class ShuffledGaussian:
    """``num_epochs`` passes over fixed-size batches of a permutation that ignores the data.

    Each unit enters exactly one batch per epoch, so there is no amplification by sampling to claim: the
    accountants charge one full Gaussian release of sensitivity 2C per epoch. Conditioned on the permutation
    that is exact, and hockey-stick divergences are jointly convex, so mixing over permutations cannot raise
    it (Chua et al. 2024, "How Private are DP-SGD Implementations?"). The bound needs both data
    sets to have the same size, hence replace-one only.

    Attributes:
        noise_multiplier: Noise standard deviation over the bound C on one unit's contribution; unitless.
        num_epochs: Number of passes.
        neighboring_relation: Replace-one.

    Raises:
        InvalidInputError: If a value lies outside its range, or the relation is add/remove.
    """

    noise_multiplier: float
    num_epochs: int
    neighboring_relation: NeighboringRelation = NeighboringRelation.REPLACE_ONE

    def __post_init__(self) -> None:
        positive_finite("noise_multiplier", self.noise_multiplier, remedy=_NOISE_REMEDY)
        positive_int("num_epochs", self.num_epochs, remedy=_COUNT_REMEDY)
        _check_relation(self.neighboring_relation)
        if self.neighboring_relation is not NeighboringRelation.REPLACE_ONE:
            raise InvalidInputError(
                "neighboring_relation",
                self.neighboring_relation.value,
                bound="replace_one for shuffled batches",
                remedy="Sample with Poisson, or state the guarantee for replace-one.",
            )


PrivacyEvent = PoissonSampledGaussian | GaussianRelease | ShuffledGaussian


def as_events(events: PrivacyEvent | Iterable[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """Returns one or several events as a tuple that may be composed.

    Raises:
        InvalidInputError: If it is empty, holds anything else, or mixes neighbouring relations.
    """
    listed = (events,) if isinstance(events, PrivacyEvent) else tuple(events)
    if not listed:
        raise InvalidInputError("events", (), bound="at least one event", remedy="State what was released.")
    for event in listed:
        if not isinstance(event, PrivacyEvent):
            raise InvalidInputError(
                "event",
                event,
                bound="a PoissonSampledGaussian, GaussianRelease or ShuffledGaussian",
                remedy="Describe the sampler that really ran; no other is accounted for.",
            )
    relations = {event.neighboring_relation for event in listed}
    if len(relations) > 1:
        raise InvalidInputError(
            "neighboring_relation",
            sorted(relation.value for relation in relations),
            bound="the same for all events that are composed",
            remedy="Restate every event for one relation.",
        )
    return listed


def _check_relation(relation: object) -> None:
    if not isinstance(relation, NeighboringRelation):
        raise InvalidInputError(
            "neighboring_relation",
            relation,
            bound="a NeighboringRelation",
            remedy="Use NeighboringRelation.ADD_OR_REMOVE_ONE unless the mechanism says otherwise.",
        )
