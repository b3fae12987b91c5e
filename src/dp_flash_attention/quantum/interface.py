"""What every mechanism of this room offers, and what it says about a release."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import Guarantee, PrivacyBudget, Sensitivity


@dataclass(frozen=True, kw_only=True)
class DeltaParts:
    """Where the δ of a release comes from.

    Attributes:
        ideal: δ of the mechanism over ideal noise, at the release's ε.
        sampler: (1+e^ε)·N·TV, for the distance of N sampled integers from the ideal law.
        generator: (1+e^ε)·(advantage), for bits that come from a cipher and not from coins.
    """

    ideal: float
    sampler: float
    generator: float

    @property
    def total(self) -> float:
        """The sum, rounded up."""
        total = math.fsum((self.ideal, self.sampler, self.generator))
        return min(1.0, math.nextafter(total, math.inf))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One thing that can fail, and what protects if everything else does. Layers are never added up.

    Attributes:
        fails: What has failed when this layer is all that is left.
        epsilon: ε against an attacker who has all of that, at ``delta``.
        delta: δ.
        noise_stddev: Of the noise that attacker cannot subtract, in the value's unit.
    """

    fails: str
    epsilon: float
    delta: float
    noise_stddev: float


@dataclass(frozen=True, kw_only=True)
class Release:
    """A released value with everything that is claimed about it. All of it may be published.

    Attributes:
        value: The value with its noise, of the type that was passed in.
        mechanism: Name of the mechanism.
        epsilon: ε.
        delta: δ by origin; ``delta.total`` is what is promised.
        rho: ρ of zero-concentrated DP of the ideal mechanism, which composes by addition; None where no theorem
            gives one.
        noise_stddev: Standard deviation of each coordinate's noise, in the value's own unit.
        grid: Distance of neighbouring released values (or a lattice's description); public.
        guarantee: Relation, unit, sensitivity, what is public, theorem, source.
        quantum_security_bits: log2 of the work that the best known quantum attack on the noise's key takes.
        certified: What follows from theorems and public numbers.
        estimated: What was measured.
        assumed: What has to be true besides.
        layers: For mechanisms of several parties: what holds when which of them fail.
    """

    value: Any
    mechanism: str
    epsilon: float
    delta: DeltaParts
    rho: float | None
    noise_stddev: float
    grid: float | str
    guarantee: Guarantee
    quantum_security_bits: int
    certified: tuple[str, ...]
    estimated: tuple[str, ...]
    assumed: tuple[str, ...]
    layers: tuple[Layer, ...] = ()

    def statement(self) -> dict[str, Any]:
        """Returns the claim without the value, as JSON values."""
        return {
            "mechanism": self.mechanism,
            "epsilon": self.epsilon,
            "delta": {
                "total": self.delta.total,
                "ideal": self.delta.ideal,
                "sampler": self.delta.sampler,
                "generator": self.delta.generator,
            },
            "rho": self.rho,
            "noise_stddev": self.noise_stddev,
            "grid": self.grid,
            "neighboring_relation": self.guarantee.neighboring_relation.value,
            "privacy_unit": self.guarantee.privacy_unit.value,
            "sensitivity": self.guarantee.sensitivity,
            "public": list(self.guarantee.public),
            "theorem": self.guarantee.theorem,
            "source": self.guarantee.source,
            "quantum_security_bits": self.quantum_security_bits,
            "certified": list(self.certified),
            "estimated": list(self.estimated),
            "assumed": list(self.assumed),
            "layers": [asdict(layer) for layer in self.layers],
        }


class Mechanism(Protocol):
    """Turns a bounded value into a private one."""

    def release(self, value: Any, sensitivity: Sensitivity, budget: PrivacyBudget) -> Release:
        """Returns ``value`` with noise that meets ``budget``.

        Args:
            value: A tensor, a NumPy array or a number; nothing about it is public but its kind and shape.
            sensitivity: How far it moves between neighbours in L2 norm, in its own unit.
            budget: The (ε, δ) that all terms together must meet.

        Raises:
            InvalidInputError: If anything is out of range. Nothing is released then, and no noise is drawn.
        """


def checked_request(sensitivity: object, budget: object) -> tuple[Sensitivity, PrivacyBudget]:
    """Returns both if they are what their names say.

    Raises:
        InvalidInputError: If one of them is not.
    """
    if not isinstance(sensitivity, Sensitivity):
        raise InvalidInputError(
            "sensitivity",
            sensitivity,
            bound="a Sensitivity, with the relation it was derived for",
            remedy="Pass Sensitivity(l2=..., neighboring_relation=...).",
        )
    if not isinstance(budget, PrivacyBudget):
        raise InvalidInputError(
            "budget", budget, bound="a PrivacyBudget", remedy="Pass PrivacyBudget(epsilon=..., delta=...)."
        )
    if budget.epsilon > 500.0:
        raise InvalidInputError(
            "epsilon", budget.epsilon, bound="at most 500", remedy="Common values lie between 0.1 and 10."
        )
    return sensitivity, budget
