"""``AmplitudeEstimationResistant``: a query asked again is answered with the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.errors import InvalidInputError, NoiseReuseError
from dp_flash_attention.core.privacy import (
    Guarantee,
    PrivacyBudget,
    PrivacyUnit,
    Sensitivity,
)
from dp_flash_attention.core.validation import non_negative_int
from dp_flash_attention.noise import NoiseKey, SecretKey, WideSecretKey
from dp_flash_attention.noise.discrete_gaussian import Consume
from dp_flash_attention.noise.entropy import vouched_entropy
from dp_flash_attention.quantum.canonical import canonical_bytes
from dp_flash_attention.quantum.charges import ChargeBook
from dp_flash_attention.quantum.exact_noise import noise_for
from dp_flash_attention.quantum.gaussian_plan import GaussianPlan, plan_gaussian
from dp_flash_attention.quantum.generator_strength import (
    generator_advantage,
    given_assumed_entropy,
    quantum_security_bits,
    searched_bits,
    secret_bits,
    strength_assumptions,
    suitable_cipher,
)
from dp_flash_attention.quantum.grid import rounded_steps
from dp_flash_attention.quantum.interface import Release, checked_request
from dp_flash_attention.quantum.prf import keyed_shake256
from dp_flash_attention.quantum.universal_digest import MAX_PIECE, UniversalDigest
from dp_flash_attention.quantum.values import unpack

_DIGEST_BYTES = 64


class AmplitudeEstimationResistant:
    """Answers queries about one version of a data set, each distinct one once and for all.

    The noise of an answer is a pseudo-random function of (key, epoch, data version, query, plan, rounded value).
    *Query* is what ``canonical`` says: other queries have other noise and are charged. *Plan* (grid, variance, number
    of coordinates) is in, because one noise at two scales would solve for the value. *Data version* is in, because equal
    noise on two versions would show their exact difference. *Epoch* is a counter to raise when answers should be fresh,
    at their price. The *rounded value* is in as well, in case the caller forgets to change the version: then the noise
    is independent and not shared.

    The charge book remembers which queries were paid for, and a keyed digest of each answer *before* it is released. So
    after a restart with the same key and a ``DurableChargeBook`` a repeat costs nothing and has the same bytes, and
    whatever would be another answer to a query that was paid for is refused.

    Args:
        key: Secret; from ``load_memo_key`` for answers that survive a restart. A ``WideSecretKey`` carries more than 128
            bits against quantum search.
        charges: Where each distinct query pays, before the data are looked at. A ``ConcentratedBudget`` ends with the
            process; a ``DurableChargeBook`` does not.
        data_version: Public name of this state of the data; any change of the data needs a new one.
        epoch: Public counter.
        grid: As in ``PostQuantumGaussian``.
        privacy_unit: What the sensitivities were derived for.

    Raises:
        InvalidInputError: If an argument is out of range.

    Guarantees:
        * Neighbouring relation: that of the sensitivities, one for all answers. Privacy unit: ``privacy_unit``.
        * Sensitivity: that of each query, Δ + γ√d after rounding.
        * Public: queries, budgets, grid, data version, epoch. Secret: the key.
        * Theorem: fix the data. Whatever is asked, and however often, the transcript is a function of one answer per
          distinct (query, plan), each a discrete Gaussian release with its own independent noise (PRF); repeats are
          post-processing, so q repeats cost what one costs. Distinct ones add up in ``charges``. Superposed calls
          evaluate a fixed function: amplitude estimation finds its values, which were paid for, and nothing
          behind them. A caller that lets a query register hold k distinct queries must charge all k.
        * Source: Dwork & Roth 2014, Proposition 2.1 (post-processing); Brassard, Høyer, Mosca & Tapp 2002.
    """

    name = "AmplitudeEstimationResistant"

    def __init__(
        self,
        *,
        key: NoiseKey,
        charges: ChargeBook,
        data_version: str,
        epoch: int = 0,
        grid: float | None = None,
        privacy_unit: PrivacyUnit = PrivacyUnit.EXAMPLE,
    ) -> None:
        if not isinstance(data_version, str) or not data_version:
            raise InvalidInputError(
                "data_version", data_version, bound="a non-empty text", remedy="Name this state of the data."
            )
        self._version = data_version
        self._epoch = non_negative_int("epoch", epoch, remedy="Count epochs from 0.")
        self._master = key
        self._secret = key.derive("quantum.amplitude_estimation_resistant").export()
        self._cipher = suitable_cipher(key, None)
        self._charges = charges
        self._grid = grid
        self._unit = privacy_unit

    def answer(
        self,
        query: object,
        compute: Callable[[], Any],
        *,
        sensitivity: Sensitivity,
        budget: PrivacyBudget,
        dimension: int = 1,
        whole: bool = False,
    ) -> Release:
        """Charges ``query`` if it is new, then computes it and adds its noise.

        Args:
            query: What is asked, in plain values (``canonical``).
            compute: Returns the true answer. Not called if the budget refuses.
            sensitivity: How far the true answer moves between neighbours.
            budget: What this answer may cost.
            dimension: How many numbers the answer has; public.
            whole: Whether the answer's type holds whole numbers only; public.

        Raises:
            BudgetExhaustedError: If the query is new and does not fit; nothing was computed.
            InvalidInputError: If an argument is out of range, the answer has another kind or length, or the sensitivity
                another neighbouring relation than the first one.
            NoiseReuseError: If the same query gave another true answer before: the data changed and the data version
                did not. Nothing is released.
        """
        sensitivity, budget = checked_request(sensitivity, budget)
        plan = plan_gaussian(
            dimension=dimension,
            whole=whole,
            l2_sensitivity=sensitivity.l2,
            budget=budget,
            grid=self._grid,
            advantage=generator_advantage(dimension, searched_bits(self._master), self._cipher),
        )
        label = self._label(query, plan, sensitivity)
        # Paid once, and before anything is computed: a computation that fails has still been paid for.
        self._charges.charge(
            rho=plan.rho, distance=plan.distance, query=label, relation=sensitivity.neighboring_relation
        )
        unpacked = unpack(compute())
        if unpacked.flat.size != dimension or unpacked.whole is not whole:
            raise InvalidInputError(
                "the computed answer",
                "of another length or kind, not shown",
                bound=f"{dimension} numbers, whole: {whole}, as declared",
                remedy="Declare the answer's length and kind.",
            )
        return self._describe(unpacked.restore(self._noisy(label, unpacked.flat, plan)), plan, sensitivity)

    def release(
        self, value: Any, sensitivity: Sensitivity, budget: PrivacyBudget, *, query: object = None
    ) -> Release:
        """Releases a value that was computed already, as the answer to ``query``; see ``answer``."""
        unpacked = unpack(value)
        return self.answer(
            query,
            lambda: value,
            sensitivity=sensitivity,
            budget=budget,
            dimension=unpacked.flat.size,
            whole=unpacked.whole,
        )

    def _label(self, query: object, plan: GaussianPlan, sensitivity: Sensitivity) -> bytes:
        """The memo's key: what has to be the same for an answer to be the same, apart from the value."""
        scale = canonical_bytes(
            [
                plan.dimension,
                plan.whole,
                plan.grid,
                plan.variance.numerator,
                plan.variance.denominator,
                sensitivity.l2,
                sensitivity.neighboring_relation.value,
            ]
        )
        return keyed_shake256(
            self._secret,
            canonical_bytes(self._epoch),
            canonical_bytes(self._version),
            canonical_bytes(query),
            scale,
            domain=b"dpfa.memo.label.v1",
            num_bytes=_DIGEST_BYTES,
        )

    def _noisy(self, label: bytes, flat: npt.NDArray[Any], plan: GaussianPlan) -> npt.NDArray[Any]:
        """Returns the answer, once the charge book has a digest of it."""
        commitment = UniversalDigest(self._secret, label, domain=b"dpfa.memo.commitment.v2")
        # A copy of its own: the noise belongs to these numbers, even if the caller's memory changes meanwhile.
        steps = rounded_steps(flat, plan.grid, commitment.absorb, piece=MAX_PIECE)
        answer = UniversalDigest(self._secret, label, domain=b"dpfa.memo.answer.v2")
        out = np.empty(flat.shape, np.float32 if flat.dtype == np.float32 else np.float64)

        def finish(start: int, noise: npt.NDArray[Any]) -> None:
            part = slice(start, start + len(noise))
            # Doubles hold sums of two whole numbers of at most 2^52 each; 0 comes with one sign only, as x + 0 is never −0 here.
            np.add(steps[part], noise, out=steps[part])
            answer.absorb(start, steps[part])
            np.multiply(steps[part], plan.grid, out=steps[part])
            with np.errstate(over="ignore"):  # float32 rounds to infinity, in silence
                np.copyto(out[part], steps[part], casting="unsafe")

        self._add_noise(self._noise_key(label, commitment.digest(_DIGEST_BYTES)), plan, finish)
        self._bind(label, answer.digest(_DIGEST_BYTES))
        return out

    def _bind(self, label: bytes, answer: bytes) -> None:
        """Records a keyed digest of what is about to be released; another one than before is not released.

        A query that was paid for is answered for nothing, also after a restart. That is sound only if it is the same
        answer: changed data, or a version of the library that draws other noise, would make a second release.
        """
        if not self._charges.bind(query=label, answer=answer):
            raise NoiseReuseError(
                f"A query gave another answer than before under data_version {self._version!r}, but one version "
                "has one answer. Give changed data a new data_version (and make the computation deterministic); after an "
                "upgrade that changed the noise, raise the epoch."
            )

    def _noise_key(self, label: bytes, commitment: bytes) -> NoiseKey:
        seed = keyed_shake256(
            self._secret,
            label,
            commitment,
            domain=b"dpfa.memo.noise.v1",
            num_bytes=len(self._secret),
        )
        if isinstance(self._master, WideSecretKey):
            return WideSecretKey.from_bytes(seed, entropy_bits=self._master.entropy_bits)
        return SecretKey.from_bytes(seed)

    def _add_noise(self, key: NoiseKey, plan: GaussianPlan, finish: Consume) -> None:
        noise_for(plan.variance).stream(key, plan.dimension, finish, step=0, cipher=self._cipher)

    def _describe(self, value: Any, plan: GaussianPlan, sensitivity: Sensitivity) -> Release:
        return Release(
            value=value,
            mechanism=self.name,
            epsilon=plan.epsilon,
            delta=plan.delta,
            rho=plan.rho,
            noise_stddev=plan.noise_stddev,
            grid=plan.grid,
            guarantee=Guarantee(
                neighboring_relation=sensitivity.neighboring_relation,
                privacy_unit=self._unit,
                sensitivity=f"{plan.l2_sensitivity:g} in L2; "
                f"{plan.grid_sensitivity * plan.grid:g} after rounding to the grid",
                public=(
                    "query",
                    "budget",
                    "grid",
                    "noise variance",
                    "data version",
                    "epoch",
                    f"numbers saturate at {plan.reach:g}, NaN counts as 0",
                ),
                theorem="any number of repeats is post-processing of one discrete Gaussian answer",
                source="Canonne, Kamath & Steinke 2020; Dwork & Roth 2014, Proposition 2.1",
            ),
            quantum_security_bits=quantum_security_bits(secret_bits(self._master), self._cipher),
            certified=(
                f"this query, asked any number of times: ({plan.epsilon:g}, {plan.delta.total:.3g})-DP"
                f"{given_assumed_entropy(vouched_entropy(self._master))}",
                "distinct queries are added up in the charge book",
            ),
            estimated=(),
            assumed=(
                self._charges.assumption,
                "The data do not change under one data_version, and the computation is deterministic.",
                "The sensitivity passed in holds for the answer, between answers with NaN counted as 0.",
                "SHAKE256 keyed by a prefix is a pseudo-random function (capacity 512 bits); under keys that nobody can query, "
                "AES-256 of two points looks uniform to one pass of polynomial hashing.",
                *strength_assumptions(
                    secret_bits(self._master), self._cipher, vouched=vouched_entropy(self._master)
                ),
            ),
        )
