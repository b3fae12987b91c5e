"""``PostQuantumGaussian``: clip, round to a public grid, add exact discrete Gaussian noise, account every term."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import (
    Guarantee,
    NeighboringRelation,
    PrivacyBudget,
    PrivacyUnit,
    Sensitivity,
)
from dp_flash_attention.core.validation import positive_finite
from dp_flash_attention.noise import ExactCipher, NoiseKey, SecretKey
from dp_flash_attention.noise.entropy import vouched_entropy
from dp_flash_attention.quantum.exact_noise import ExactNoise, makes_layers, noise_for
from dp_flash_attention.quantum.fresh_keys import fresh_subkey
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
from dp_flash_attention.quantum.grid import OnGrid, round_to_grid
from dp_flash_attention.quantum.interface import Release, checked_request
from dp_flash_attention.quantum.on_device import (
    add_on_device,
    checked_on_device,
    projected_on_device,
    stays_on_device,
)
from dp_flash_attention.quantum.values import MAX_MAGNITUDE, Vector, unpack

_UNIT_ROUNDOFF = 2.0**-53
_REACH = int(MAX_MAGNITUDE)


class PostQuantumGaussian:
    """Releases numbers with discrete Gaussian noise whose every deviation from the ideal is in δ.

    Args:
        key: Secret of the noise; a fresh one from the operating system if None. Each release uses a subkey of its own,
            so a stored key that is loaded again, a copy and a forked process never repeat noise. (A ``TestKey`` does
            repeat, and is reported.)
        grid: γ, a power of two in the value's unit; None for one that rounding makes at most 1/64 worse. Whole numbers
            have γ = 1, and rounding costs nothing.
        l2_clip_norm: If given, the value is first projected onto the ball of this L2 norm, which moves no two values
            further apart; the sensitivity is then at most twice this.
        cipher: What turns the key into bits: ``"aes-256-ctr"`` (fastest on CPUs), ``"chacha20"``, which GPUs can run, or
            ``"shake256"``, which alone carries more than 128 bits against quantum search, from a ``WideSecretKey`` that has
            them. None chooses by the key's length, for a CPU.
        privacy_unit: What the sensitivity was derived for.

    Raises:
        InvalidInputError: If an argument is out of range.
        NoiseUnavailableError: If the operating system gives no secure entropy.

    Guarantees:
        * Neighbouring relation: that of the sensitivity passed in. Privacy unit: ``privacy_unit``.
        * Sensitivity: Δ + γ√d after rounding d coordinates to the grid (Δ for whole numbers on their own grid). Δ is
          that of values whose NaN counts as 0; ``release_sum`` does so row by row, so there it is derived and not assumed.
        * Every content is released, and none raises: each coordinate saturates at ±2^52·γ (whole numbers also at
          ±2^52), which moves no two values further apart.
        * Public: kind, shape, Δ, γ, budget, clip norm, σ. Secret: the key and the value.
        * Theorem: with ideal noise (ε, δ_ideal) by ``accounting.discrete_gaussian``. Real noise is within
          N·TV of it (the sampler's certificate), and its bits within the cipher's advantage of coins; replacing
          real by ideal noise on both neighbours costs (1+e^ε) times both: δ = δ_ideal + (1+e^ε)·(N·TV + advantage).
          Quantum post-processing of the result is post-processing.
        * Source: Canonne, Kamath & Steinke 2020; Mironov, Pandey, Reingold & Vadhan 2009 (computational DP).

    Example:
        >>> from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
        >>> counts = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
        >>> release = PostQuantumGaussian().release(1000, counts, PrivacyBudget(epsilon=1.0, delta=1e-6))
        >>> type(release.value).__name__, release.delta.total <= 1e-6, release.quantum_security_bits
        ('int', True, 128)
    """

    name = "PostQuantumGaussian"

    def __init__(
        self,
        *,
        key: NoiseKey | None = None,
        grid: float | None = None,
        l2_clip_norm: float | None = None,
        cipher: ExactCipher | None = None,
        privacy_unit: PrivacyUnit = PrivacyUnit.EXAMPLE,
    ) -> None:
        self._key = SecretKey.from_os() if key is None else key
        self._grid = grid
        self._clip = (
            None
            if l2_clip_norm is None
            else positive_finite("l2_clip_norm", l2_clip_norm, remedy="It is the largest norm kept.")
        )
        self._cipher = suitable_cipher(self._key, cipher)
        self._unit = privacy_unit
        self._step = 0
        self._lock = threading.Lock()

    def plan(
        self, *, dimension: int, sensitivity: Sensitivity, budget: PrivacyBudget, whole: bool = False
    ) -> GaussianPlan:
        """Returns what a release of ``dimension`` numbers would cost and add. Spends and draws nothing.

        Raises:
            InvalidInputError: As ``release``.
        """
        sensitivity, budget = checked_request(sensitivity, budget)
        bound = sensitivity.l2
        if self._clip is not None:
            whole = False  # a projected value is off the grid
            bound = min(bound, 2.0 * self._clip) + _projection_slack(self._clip, dimension)
        return plan_gaussian(
            dimension=dimension,
            whole=whole,
            l2_sensitivity=bound,
            budget=budget,
            grid=self._grid,
            advantage=self._advantage(dimension),
            layered=makes_layers(self._cipher),
        )

    def release(self, value: Any, sensitivity: Sensitivity, budget: PrivacyBudget) -> Release:
        """Returns ``value`` with noise, of the same kind, shape and dtype.

        Args:
            value: A number, NumPy array or tensor. Rounding to its dtype comes last and is post-processing. A float32,
                float64 or int64 CUDA tensor stays on its device if the cipher is ``"chacha20"``; any other is copied to the
                host and its result back.
            sensitivity: How far it moves between neighbours, in its own unit.
            budget: What all terms together may cost.

        Raises:
            InvalidInputError: If the value is of another kind or empty, the grid too coarse for the sensitivity, or the
                budget out of reach: all public facts. Nothing is released then.
        """
        if stays_on_device(value, self._cipher):
            return self._release_on_device(value, sensitivity, budget)
        unpacked = unpack(value)
        plan = self.plan(
            dimension=unpacked.flat.size, sensitivity=sensitivity, budget=budget, whole=unpacked.whole
        )
        flat = unpacked.flat if self._clip is None else _projected(unpacked.vector, self._clip)
        noisy = OnGrid(flat, plan.grid)
        self._add_noise(noisy, plan)
        return self._describe(unpacked.restore(noisy.out), plan, sensitivity.neighboring_relation)

    def _release_on_device(
        self, value: torch.Tensor, sensitivity: Sensitivity, budget: PrivacyBudget
    ) -> Release:
        found = checked_on_device(value)
        whole = not found.is_floating_point()
        plan = self.plan(dimension=found.numel(), sensitivity=sensitivity, budget=budget, whole=whole)
        if self._clip is not None:
            found = projected_on_device(found, self._clip)
        step, key = self._next()
        generator = self._sampler(plan).generator(key, cipher=self._cipher)
        noisy = add_on_device(found, generator, plan.grid, step=step, dtype=value.dtype)
        return self._describe(noisy, plan, sensitivity.neighboring_relation)

    def release_sum(
        self,
        rows: Any,
        l2_clip_norm: float,
        budget: PrivacyBudget,
        *,
        neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> Release:
        """Returns the noisy sum of rows, one row a unit, each clipped and rounded on its own.

        The sum is one of whole numbers, so no rounding of floating-point sums is left out of the guarantee.

        Args:
            rows: float array or tensor [n, d], one row for each unit; n may be 0, for n is private under add/remove. In
                each row NaN becomes 0 and infinity ±2^464 before it is clipped, so any row moves the sum by at most C.
            l2_clip_norm: C; a longer row is scaled down to it.
            budget: What all terms together may cost.
            neighboring_relation: Replace-one has twice the sensitivity of add/remove.

        Raises:
            InvalidInputError: As ``release``; or if ``rows`` is no matrix.
        """
        shape: tuple[int, ...] = tuple(getattr(rows, "shape", ()))
        if len(shape) != 2 or shape[1] == 0:
            raise InvalidInputError(
                "rows", type(rows).__name__, bound="a matrix [n, d]", remedy="One row a unit."
            )
        clip = positive_finite("l2_clip_norm", l2_clip_norm, remedy="It is the largest norm of one row.")
        # No row at all is a sum like any other: refusing it would tell that there was none.
        unpacked = unpack(rows) if shape[0] else None
        matrix = np.zeros(shape) if unpacked is None else unpacked.vector.reshape(shape)
        times = 2.0 if neighboring_relation is NeighboringRelation.REPLACE_ONE else 1.0
        # A clipped row is at most C long, and its rounding adds γ√d/2; ``plan`` adds γ√d for two rounded vectors, which
        # covers one row (add/remove) and both rows (replace).
        bound = Sensitivity(
            l2=times * (clip + _projection_slack(clip, matrix.shape[1])),
            neighboring_relation=neighboring_relation,
        )
        plan = plan_gaussian(
            dimension=matrix.shape[1],
            whole=False,
            l2_sensitivity=bound.l2,
            budget=checked_request(bound, budget)[1],
            grid=self._grid,
            advantage=self._advantage(matrix.shape[1]),
            layered=makes_layers(self._cipher),
        )
        total = np.zeros(matrix.shape[1], dtype=np.int64)
        for row in matrix:
            total += round_to_grid(_projected(row, clip), plan.grid)
            # Saturating after each row moves no two sums further apart, and nothing overflows.
            np.clip(total, -_REACH, _REACH, out=total)
        steps = OnGrid(total, 1.0)
        self._add_noise(steps, plan)
        noisy = steps.out.astype(np.float64) * plan.grid
        # A row's kind, shape and dtype, without its numbers.
        like = (
            rows.new_zeros(shape[1])
            if isinstance(rows, torch.Tensor)
            else np.zeros(shape[1], dtype=rows.dtype)
        )
        return self._describe(unpack(like).restore(noisy), plan, neighboring_relation)

    def _add_noise(self, target: OnGrid, plan: GaussianPlan) -> None:
        step, key = self._next()
        self._sampler(plan).stream(key, plan.dimension, target, step=step, cipher=self._cipher)

    def _sampler(self, plan: GaussianPlan) -> ExactNoise:
        return noise_for(plan.variance, layered=makes_layers(self._cipher))

    def _next(self) -> tuple[int, NoiseKey]:
        """Returns a step and a key that no other release has."""
        with self._lock:
            step, self._step = self._step, self._step + 1
        return step, fresh_subkey(self._key, "quantum.post_quantum_gaussian")

    def _advantage(self, dimension: int) -> float:
        return generator_advantage(dimension, searched_bits(self._key), self._cipher)

    def _describe(self, value: Any, plan: GaussianPlan, relation: NeighboringRelation) -> Release:
        return Release(
            value=value,
            mechanism=self.name,
            epsilon=plan.epsilon,
            delta=plan.delta,
            rho=plan.rho,
            noise_stddev=plan.noise_stddev,
            grid=plan.grid,
            guarantee=gaussian_guarantee(plan, relation, self._unit),
            quantum_security_bits=quantum_security_bits(secret_bits(self._key), self._cipher),
            certified=(
                f"({plan.epsilon:g}, {plan.delta.total:.3g})-DP, {plan.delta.sampler:.2g} of δ for the sampler's distance"
                f"{given_assumed_entropy(vouched_entropy(self._key))}",
                f"rounding {plan.dimension} coordinates to multiples of {plan.grid:g} is in the sensitivity",
            ),
            estimated=(),
            assumed=(
                "The sensitivity passed in holds for the value passed in, between values with NaN counted as 0.",
                *strength_assumptions(
                    secret_bits(self._key), self._cipher, vouched=vouched_entropy(self._key)
                ),
            ),
        )


def gaussian_guarantee(plan: GaussianPlan, relation: NeighboringRelation, unit: PrivacyUnit) -> Guarantee:
    """Returns the five statements of a planned release."""
    return Guarantee(
        neighboring_relation=relation,
        privacy_unit=unit,
        sensitivity=f"{plan.l2_sensitivity:g} in L2; {plan.grid_sensitivity * plan.grid:g} after rounding to the grid",
        public=(
            "kind and shape of the value",
            "sensitivity",
            "budget",
            "grid",
            "noise variance",
            f"numbers saturate at {plan.reach:g}, NaN counts as 0",
        ),
        theorem="discrete Gaussian mechanism; δ = δ_ideal + (1+e^ε)·(N·TV + generator advantage)",
        source="Canonne, Kamath & Steinke 2020, Theorems 7 and 14; Peikert 2010; Mironov et al. 2009",
    )


def _projection_slack(l2_clip_norm: float, dimension: int) -> float:
    """Returns how much rounding in ``_projected`` can add to the distance of two projected vectors.

    A norm of d terms, a quotient and a product, for each of the two; rounded up fourfold.
    """
    return 8.0 * (dimension + 8) * _UNIT_ROUNDOFF * l2_clip_norm


def _projected(vector: Vector, l2_clip_norm: float) -> Vector:
    norm = math.sqrt(float(np.dot(vector, vector)))
    return vector * (l2_clip_norm / norm) if norm > l2_clip_norm else vector
