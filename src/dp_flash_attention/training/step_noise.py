"""How a step's noise meets its sums: float normals tensor by tensor, or whole numbers on the plan's grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError, RunStateError
from dp_flash_attention.noise import NoiseKey, NormalGenerator, make_generator
from dp_flash_attention.noise.rounded_gaussian import RoundedGaussian
from dp_flash_attention.training.finite_precision import MAX_SAMPLER_DISTANCE
from dp_flash_attention.training.plan import PrivacyPlan

# Tensors are drawn for together until they hold that many numbers: the sampler proposes at least 24,576, which small
# tensors would waste, and 2^20 numbers are 8 MiB.
GROUP_NUMBERS = 1 << 20
# Sums beyond this many steps of the grid are cut off, which moves no two further apart. With the noise, at most 2^50, all
# whole numbers then stay exact in float64.
MAX_STEPS = 2**51


class AddsNormals(Protocol):
    """What ``add_normals`` needs of a generator."""

    def add_normal_(self, out: Tensor, *, stddev: float, step: int, stream: int) -> Tensor:
        """Adds N(0, stddev²) numbers in place."""


def add_normals(generator: AddsNormals, total: Tensor, *, stddev: float, step: int, stream: int) -> Tensor:
    """Returns ``total`` with the normals of (step, stream) added, on its device."""
    if total.device.type == "cpu":
        return generator.add_normal_(total, stddev=stddev, step=step, stream=stream)
    # The generators write to the CPU; the sum crosses over and back.
    noisy = generator.add_normal_(total.cpu(), stddev=stddev, step=step, stream=stream)
    return noisy.to(total.device)


class GridNoise:
    """Rounds a step's sums to the plan's grid and adds rounded Gaussian noise, by (key, step).

    Args:
        plan: A plan with noise ``"exact"``.
        key: Secret of the noise.
        num_parameters: Number of trainable coordinates there really are.

    Raises:
        InvalidInputError: If the plan is for another number of coordinates.
        NoiseUnavailableError: If the cipher cannot be used.

    Guarantees:
        neighbouring relation, privacy unit: the plan's.
        sensitivity: that of ``finite_precision``, if the sums passed in move by at most C.
        public: the plan, the shapes of the tensors. Secret: the key.
        theorem: see ``finite_precision``. What is returned is γ·(round(sum/γ) + noise), a float64 without rounding error.
    """

    def __init__(self, plan: PrivacyPlan, key: NoiseKey, *, num_parameters: int) -> None:
        if num_parameters != plan.num_parameters:
            raise InvalidInputError(
                "num_parameters",
                plan.num_parameters,
                bound=f"{num_parameters}, the number of trainable coordinates of this model",
                remedy="Make the plan with it: the grid and delta depend on it.",
            )
        precision = plan.finite_precision
        assert precision is not None, "plans with exact noise have a grid"
        self._grid, self._key = precision.grid, key
        self._noise = RoundedGaussian(precision.stddev)
        table = self._noise.total_variation * num_parameters * plan.num_steps
        assert table <= precision.distance, f"128-bit tables are within {MAX_SAMPLER_DISTANCE}"
        if self._noise.largest >= MAX_STEPS // 2:
            raise InvalidInputError(
                "noise_multiplier",
                plan.noise_multiplier,
                bound="small enough that noise stays below 2^50 steps of the grid",
                remedy="Use less noise, or noise 'secure'.",
            )
        # Fails now and not at the end of the first step, if the cipher is not there.
        self._noise.draw(key.derive("probe"), 1, step=0, stream=0)

    def add(self, sums: Mapping[str, Tensor], *, step: int) -> Iterator[tuple[str, Tensor]]:
        """Yields each name with its noisy sum, float64 on the sum's device. A step is for one release only.

        Raises:
            RunStateError: If a sum is not finite, which clipped sums never are; nothing was drawn then.
        """
        for name, total in sums.items():
            if not bool(torch.isfinite(total).all()):
                raise RunStateError(
                    f"the sum of clipped gradients of {name} is not finite, so it has no place on the grid. Test the "
                    "model's backward pass in float32; nothing of this step was released."
                )
        for stream, names in enumerate(_groups(sums)):
            drawn = torch.from_numpy(
                self._noise.draw(
                    self._key, sum(sums[name].numel() for name in names), step=step, stream=stream
                )
            )
            start = 0
            for name in names:
                total = sums[name]
                noise = drawn[start : start + total.numel()].view(total.shape)
                start += total.numel()
                yield name, self._on_grid(total, noise)

    def _on_grid(self, total: Tensor, noise: Tensor) -> Tensor:
        counts = round_to_steps(total.cpu(), self._grid)
        # Both are whole numbers below 2^52, so their sum and its multiple of a power of two are exact.
        return counts.add_(noise).mul_(self._grid).to(total.device)


def noisy_sums(
    generator: NormalGenerator | GridNoise, sums: Mapping[str, Tensor], *, stddev: float, step: int
) -> Iterable[tuple[str, Tensor]]:
    """Returns each name with its noisy sum. A step is for one release only.

    Raises:
        RunStateError: As ``GridNoise.add``.
    """
    if isinstance(generator, GridNoise):
        return generator.add(sums, step=step)
    # All before the caller's division of the first: torch's threads go on spinning on the cores that the noise needs.
    return [
        (name, add_normals(generator, total, stddev=stddev, step=step, stream=stream))
        for stream, (name, total) in enumerate(sums.items())
    ]


def round_to_steps(total: Tensor, grid: float) -> Tensor:
    """Returns the nearest whole numbers of steps, float64, cut off at ±2^51."""
    # Dividing by a power of two is exact.
    return total.to(torch.float64, copy=True).div_(grid).round_().clamp_(-MAX_STEPS, MAX_STEPS)


def make_step_noise(
    plan: PrivacyPlan, key: NoiseKey, *, num_parameters: int, in_update: bool = False
) -> NormalGenerator | GridNoise:
    """Returns what makes the noise of a plan's steps.

    Args:
        plan: The plan.
        key: Secret of the noise.
        num_parameters: Number of trainable coordinates.
        in_update: Whether a kernel makes the noise in the optimizer's update, which needs ChaCha20 for ``"secure"``.

    Raises:
        InvalidInputError: If the plan is for another number of parameters, or exact noise is to be made in an update.
        NoiseUnavailableError: If the plan's noise cannot be made here.
    """
    if plan.noise == "exact":
        if in_update:
            raise InvalidInputError(
                "noise",
                plan.noise,
                bound="'secure' or 'fast' with NoisyAdamW",
                remedy="Use torch.optim.AdamW with exact noise.",
            )
        return GridNoise(plan, key, num_parameters=num_parameters)
    return make_generator(
        plan.noise, key, cipher="chacha20" if in_update and plan.noise == "secure" else None
    )


def _groups(sums: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yields runs of names, in order, each of at least ``GROUP_NUMBERS`` numbers but the last."""
    names: list[str] = []
    count = 0
    for name, total in sums.items():
        names.append(name)
        count += total.numel()
        if count >= GROUP_NUMBERS:
            yield names
            names, count = [], 0
    if names:
        yield names
