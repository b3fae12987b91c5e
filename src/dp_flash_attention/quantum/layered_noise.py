"""``LayeredNoise``: n parties add noise, and any h honest ones that stay to the end suffice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import Guarantee, PrivacyBudget, PrivacyUnit, Sensitivity
from dp_flash_attention.core.validation import non_negative_int, positive_int
from dp_flash_attention.noise import NoiseKey, SecretKey
from dp_flash_attention.noise.chunk_threads import ChunkThreads
from dp_flash_attention.noise.entropy import vouched_entropy
from dp_flash_attention.quantum.fresh_keys import fresh_subkey
from dp_flash_attention.quantum.generator_strength import (
    generator_advantage,
    given_assumed_entropy,
    quantum_security_bits,
    secret_bits,
    strength_assumptions,
)
from dp_flash_attention.quantum.grid import OnGrid
from dp_flash_attention.quantum.interface import Release, checked_request
from dp_flash_attention.quantum.layered_plan import LayeredPlan, NoiseLaw, plan_layered, share_noise
from dp_flash_attention.quantum.values import MAX_MAGNITUDE, Integers, Vector, unpack

_CIPHER: Final = "aes-256-ctr"
_KEY_BITS = 256
_PIECE: Final = 1 << 16


class LayeredNoise:
    """Sums one row a party. Each party adds a share of noise of variance σ²/h, so h shares make the whole.

    A party that drops out takes its row and its share along; a dishonest one knows its share and can subtract it. What
    is left as long as h honest parties stay is at least the planned noise. With more of them it is more: the surplus is
    reported and stays (taking it out would need shares that only their owners know).

    Args:
        num_parties: n, at least h.
        num_honest: h, how many honest parties must stay to the end.
        law: ``"skellam"``, whose sums are exact, or ``"discrete_gaussian"``, less noise at the same ε, with the
            closeness bound τ of its sums accounted.
        grid: γ, a power of two, which all parties use; None for the default.
        privacy_unit: What the sensitivity was derived for. A unit lies within one party's row.

    Raises:
        InvalidInputError: If a count or the law is out of range.

    Guarantees:
        * Neighbouring relation: that of the sensitivity. Privacy unit: ``privacy_unit``.
        * Sensitivity: of the sum, Δ; Δ + γ√d after a row is rounded.
        * Public: counts, law, grid, Δ, budget, share variance, who stayed. Secret: rows, and each party's key.
        * Theorem: what an attacker cannot subtract is the sum of at least h honest shares, and more honest shares are
          post-processing. Skellam: Agarwal, Kairouz & Liu 2021, Corollary 4.1. Discrete Gaussian: Kairouz, Liu & Steinke
          2021, section 3. Each layer guards against another failure; their ε and bits are never added up.
        * Not part of it: hiding a single party's message from the server (secure aggregation does that). Without it,
          the server sees each row with one share of noise: the layer "own share".
    """

    name = "LayeredNoise"

    def __init__(
        self,
        *,
        num_parties: int,
        num_honest: int,
        law: NoiseLaw = "skellam",
        grid: float | None = None,
        privacy_unit: PrivacyUnit = PrivacyUnit.USER,
    ) -> None:
        self._n = positive_int("num_parties", num_parties, remedy="Count the parties.")
        self._h = positive_int("num_honest", num_honest, remedy="Count those that must be honest and stay.")
        if self._h > self._n:
            raise InvalidInputError(
                "num_honest", num_honest, bound=f"at most num_parties = {self._n}", remedy="Lower it."
            )
        if law not in ("skellam", "discrete_gaussian"):
            raise InvalidInputError(
                "law", law, bound="'skellam' or 'discrete_gaussian'", remedy="Use 'skellam'."
            )
        self._law: NoiseLaw = law
        self._grid = grid
        self._unit = privacy_unit

    def plan(self, *, dimension: int, sensitivity: Sensitivity, budget: PrivacyBudget) -> LayeredPlan:
        """Returns what every party adds. Spends and draws nothing.

        Raises:
            InvalidInputError: As ``plan_layered``.
        """
        sensitivity, budget = checked_request(sensitivity, budget)
        d = positive_int("dimension", dimension, remedy="Count the coordinates.")
        return plan_layered(
            law=self._law,
            num_parties=self._n,
            num_honest=self._h,
            dimension=d,
            l2_sensitivity=sensitivity.l2,
            budget=budget,
            grid=self._grid,
            advantage=generator_advantage(d, _KEY_BITS, _CIPHER),
        )

    def message(self, row: Any, plan: LayeredPlan, *, key: NoiseKey, step: int) -> Integers:
        """Returns one party's rounded row with its share of noise, int64 [d], as that party sends it.

        Args:
            row: The party's d numbers, bounded by whoever derived the sensitivity.
            plan: The common plan.
            key: This party's own secret. A pair (key, step) is for one release only.
            step: Number of the release.

        Raises:
            InvalidInputError: If the row has another length or kind. What it holds never raises: NaN counts as 0, and
                numbers saturate at ±2^52·γ.
        """
        unpacked = unpack(row)
        if unpacked.flat.size != plan.dimension:
            raise InvalidInputError(
                "row",
                f"{unpacked.flat.size} numbers",
                bound=f"{plan.dimension} numbers",
                remedy="See the plan.",
            )
        step = non_negative_int("step", step, remedy="Count releases from 0.")
        subkey = key.derive("quantum.layered_noise")
        target = OnGrid(unpacked.flat, plan.grid, steps=True)
        share_noise(plan.law, plan.share_variance).stream(subkey, plan.dimension, target, step=step)
        return target.out

    def combine(
        self,
        messages: Mapping[int, Integers],
        plan: LayeredPlan,
        sensitivity: Sensitivity,
        *,
        key_bits: int,
    ) -> Release:
        """Returns the sum of what the survivors sent, float64 [d].

        Args:
            messages: By party number, from those that stayed.
            plan: The common plan.
            sensitivity: For its relation.
            key_bits: Secret bits of the weakest honest party's key, as the parties state it (256 for a ``SecretKey``); nobody
                can check it here, so there is no default. 0 for public test keys: the release then says that it promises
                nothing.

        Raises:
            InvalidInputError: If fewer than h stayed, a party is unknown, a message has another length, or a key is weaker
                than the plan's δ counts on. Nothing is released then.
        """
        stated = f"{key_bits} bits of the weakest honest party's key, as the parties state it"
        return self._combined(messages, plan, sensitivity, key_bits=key_bits, vouched=(stated,))

    def _combined(
        self,
        messages: Mapping[int, Integers],
        plan: LayeredPlan,
        sensitivity: Sensitivity,
        *,
        key_bits: int,
        vouched: Sequence[str],
    ) -> Release:
        bits = non_negative_int("key_bits", key_bits, remedy="Ask the parties; 256 for a SecretKey.")
        if 0 < bits < _KEY_BITS:
            # The plan's δ holds the chance of finding a key of that many bits; a shorter one is found far more often.
            raise InvalidInputError(
                "key_bits",
                bits,
                bound=f"at least {_KEY_BITS}, which the plan's delta counts on",
                remedy="Let every party draw a key of its own with SecretKey.from_os().",
            )
        if not all(isinstance(party, int) and 0 <= party < plan.num_parties for party in messages):
            raise InvalidInputError(
                "messages",
                sorted(messages),
                bound=f"from parties 0 to {plan.num_parties - 1}",
                remedy="Drop them.",
            )
        if len(messages) < plan.num_honest:
            raise InvalidInputError(
                "survivors",
                len(messages),
                bound=f"at least the {plan.num_honest} whose noise the budget needs",
                remedy="Repeat the round with the parties that are there, or plan with a smaller num_honest.",
            )
        for message in messages.values():
            if message.shape != (plan.dimension,) or message.dtype != np.int64:
                raise InvalidInputError(
                    "message", message.shape, bound=f"int64 [{plan.dimension}]", remedy="Use message()."
                )
        return self._describe(
            _summed(list(messages.values()), plan.grid), plan, sensitivity, len(messages), key_bits, vouched
        )

    def release(
        self,
        value: Any,
        sensitivity: Sensitivity,
        budget: PrivacyBudget,
        *,
        keys: Sequence[NoiseKey] | None = None,
    ) -> Release:
        """Runs all parties in this process: sums the rows of ``value`` [n, d] with everyone's noise.

        Args:
            value: One row a party.
            sensitivity: Of the sum.
            budget: What h honest shares guarantee.
            keys: One secret a party, all different; fresh ones if None. Each release uses subkeys of its own.

        Raises:
            InvalidInputError: If an argument is out of range.
        """
        shape: tuple[int, ...] = tuple(getattr(value, "shape", ()))
        if len(shape) != 2 or shape[0] != self._n:
            raise InvalidInputError(
                "value",
                tuple(shape),
                bound=f"a matrix with {self._n} rows, one a party",
                remedy="Stack the rows.",
            )
        plan = self.plan(dimension=int(shape[1]), sensitivity=sensitivity, budget=budget)
        secrets = [SecretKey.from_os() for _ in range(self._n)] if keys is None else list(keys)
        if len(secrets) != self._n:
            raise InvalidInputError("keys", len(secrets), bound=f"{self._n} keys", remedy="One a party.")
        if len({key.export() for key in secrets}) != self._n:
            raise InvalidInputError(
                "keys",
                "not shown",
                bound="all different: equal keys make equal shares, whose sum shows the value modulo their number",
                remedy="Let every party draw its own.",
            )
        messages = {
            party: self.message(
                value[party], plan, key=fresh_subkey(secrets[party], "quantum.layered_noise.release"), step=0
            )
            for party in range(self._n)
        }
        return self._combined(
            messages,
            plan,
            sensitivity,
            key_bits=min(map(secret_bits, secrets)),
            vouched=tuple(dict.fromkeys(line for key in secrets for line in vouched_entropy(key))),
        )

    def _describe(
        self,
        value: Any,
        plan: LayeredPlan,
        sensitivity: Sensitivity,
        survivors: int,
        key_bits: int,
        vouched: Sequence[str],
    ) -> Release:
        h = plan.num_honest
        return Release(
            value=value,
            mechanism=self.name,
            epsilon=plan.budget.epsilon,
            delta=plan.delta,
            rho=plan.rho,
            noise_stddev=(survivors * float(plan.share_variance)) ** 0.5 * plan.grid,
            grid=plan.grid,
            guarantee=Guarantee(
                neighboring_relation=sensitivity.neighboring_relation,
                privacy_unit=self._unit,
                sensitivity=f"{plan.l2_sensitivity:g} in L2; {plan.grid_sensitivity * plan.grid:g} after rounding",
                public=(
                    "counts of parties",
                    "survivors",
                    "law",
                    "grid",
                    "sensitivity",
                    "budget",
                    "share variance",
                    f"numbers saturate at {MAX_MAGNITUDE * plan.grid:g}, NaN counts as 0",
                ),
                theorem=f"sum of at least {h} honest shares of {plan.law.replace('_', ' ')} noise",
                source="Agarwal, Kairouz & Liu 2021; Kairouz, Liu & Steinke 2021",
            ),
            quantum_security_bits=quantum_security_bits(key_bits, _CIPHER),
            certified=(
                f"({plan.budget.epsilon:g}, {plan.delta.total:.3g})-DP if at least {h} of the {survivors} survivors are "
                f"honest{given_assumed_entropy(vouched)}",
                f"realised noise: {survivors} shares, {survivors / h:.3g} times the planned variance",
            ),
            estimated=(),
            assumed=(
                f"At least {h} survivors drew their share as planned and keep it secret.",
                "The sensitivity passed in holds for the sum of the rows, and a unit lies within one row.",
                *strength_assumptions(key_bits, _CIPHER, vouched=vouched),
            ),
            layers=(
                plan.layer(f"the server and all but {h} survivors collude", h),
                plan.layer("nobody who took part; an outsider sees the result", survivors),
                plan.layer("the server and every other party collude: the party's own share is left", 1),
            ),
        )


def _summed(messages: Sequence[Integers], grid: float) -> Vector:
    """Returns the sum of whole-numbered rows times ``grid``, piece by piece, so that no sum leaves the cache."""
    out = np.empty(messages[0].shape, dtype=np.float64)

    def write_piece(total: Integers, start: int) -> None:
        part = slice(start, start + _PIECE)
        total = total[: len(out[part])]
        np.copyto(total, messages[0][part])
        for message in messages[1:]:
            np.add(total, message[part], out=total)
        np.multiply(total, grid, out=out[part], dtype=np.float64)

    threads = ChunkThreads(lambda: np.empty(_PIECE, dtype=np.int64), chunk=_PIECE)
    threads.run(write_piece, len(out), num_threads=torch.get_num_threads())
    return out
