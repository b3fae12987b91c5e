"""One training step of each kind on the same model, data and optimizer: non-private, ours, the peers'.

The private ones clip each example to norm 1 and add Gaussian noise once, as a session does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from _models import Shape, build_model, losses_of
from dp_flash_attention.clipping import ClippedGradientAccumulator
from dp_flash_attention.clipping.compiled import CompiledClipping
from dp_flash_attention.clipping.strategies import Strategy
from dp_flash_attention.noise import NormalGenerator, SecretKey, make_generator

CLIP_NORM, NOISE_MULTIPLIER = 1.0, 1.0

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and in which precision a step runs.

    Attributes:
        device: The device.
        bf16: Whether the forward pass runs under bfloat16 autocast. Parameters, norms, sums and noise stay float32.
        tied: Whether embedding and head share their weight.
    """

    device: torch.device
    bf16: bool = False
    tied: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the context of a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    @property
    def noise(self) -> str:
        """Which noise ours adds: secure where it can be made, and said where not."""
        if find_spec("cryptography") is None:
            return "fast: cryptography is not installed"
        return "secure (chacha20)" if self.device.type == "cuda" else "secure"

    def generator(self) -> NormalGenerator:
        """Returns the generator of ``noise``."""
        key = SecretKey.from_os()
        if find_spec("cryptography") is None:
            return make_generator("fast", key)
        return make_generator("secure", key, cipher="chacha20" if self.device.type == "cuda" else None)


def _built(shape: Shape, place: Place) -> tuple[nn.Module, torch.optim.AdamW, Tensor]:
    model, data = build_model(shape, tied=place.tied, device=place.device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), data


def non_private(shape: Shape, place: Place, *, compiled: bool = False) -> Step:
    """Forward, backward, AdamW."""
    model, optimizer, data = _built(shape, place)
    forward: Callable[..., Tensor] = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with place.autocast():
            loss = losses_of(forward(data), data).mean()
        loss.backward()
        optimizer.step()

    return step


def ours(shape: Shape, place: Place, *, compiled: bool = False, strategy: Strategy = "bookkeeping") -> Step:
    """The same with clipping and noise."""
    model, optimizer, data = _built(shape, place)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=CLIP_NORM, strategy=strategy)
    clipping = CompiledClipping(accumulator, model) if compiled else None
    generator = place.generator()
    num_steps = 0

    def losses(model: nn.Module, data: Tensor) -> Tensor:
        with place.autocast():
            return losses_of(model(data), data)

    def step() -> None:
        nonlocal num_steps
        accumulator.reset()
        if clipping is None:
            accumulator.add(lambda: losses(model, data), batch_size=len(data))
        else:
            clipping.add(losses, data, batch_size=len(data))
        sums = accumulator.sums
        # As a session does: all noise before torch's threads, which go on spinning, divide the first sum.
        for stream, total in enumerate(sums.values()):
            generator.add_normal_(total, stddev=NOISE_MULTIPLIER * CLIP_NORM, step=num_steps, stream=stream)
        for name, parameter in accumulator.parameters.items():
            parameter.grad = sums[name].div_(shape.batch_size)
        optimizer.step()
        num_steps += 1

    return step


def opacus_per_sample(shape: Shape, place: Place) -> Step:
    """Opacus with each example's gradient in memory."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, optimizer, data = _built(shape, place)
    module = GradSampleModule(model, loss_reduction="mean")
    private = DPOptimizer(
        optimizer,
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=shape.batch_size,
    )

    def step() -> None:
        private.zero_grad(set_to_none=True)
        with place.autocast():
            loss = losses_of(module(data), data).mean()
        loss.backward()
        private.step()

    return step


def opacus_ghost(shape: Shape, place: Place) -> Step:
    """Opacus with ghost norms and a second backward pass."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    model, optimizer, data = _built(shape, place)
    module = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=CLIP_NORM, use_ghost_clipping=True, loss_reduction="mean"
    )
    private = DPOptimizerFastGradientClipping(
        optimizer,
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=shape.batch_size,
    )

    def step() -> None:
        private.zero_grad(set_to_none=True)
        with place.autocast():
            losses = losses_of(module(data), data)
        DPTensorFastGradientClipping(module, private, losses).backward()
        private.step()

    return step


MODES: dict[str, Callable[[Shape, Place], Step]] = {
    "non-private eager": non_private,
    "non-private compiled": lambda shape, place: non_private(shape, place, compiled=True),
    "ours": ours,
    "ours compiled": lambda shape, place: ours(shape, place, compiled=True),
    "ours two_pass": lambda shape, place: ours(shape, place, strategy="two_pass"),
    "opacus per-sample": opacus_per_sample,
    "opacus ghost": opacus_ghost,
}
OPACUS = ("opacus per-sample", "opacus ghost")


def modes_for(shape: Shape, place: Place) -> list[str]:
    """Returns which modes can run: ours, and peers that are installed and have a rule."""
    left_out: set[str] = {"ours two_pass"}
    # Opacus has no rule for tied weights, nor for torch's RMSNorm.
    if place.tied or shape.family != "gpt" or find_spec("opacus") is None:
        left_out |= set(OPACUS)
    return [mode for mode in MODES if mode not in left_out]
