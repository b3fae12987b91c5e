"""``NoisyAdamW``: AdamW on a GPU whose update makes the step's noise itself.

Noise, division and update are one pass over the sums and the optimizer's state, 28 bytes a parameter where three passes
move 44; neither noise nor noisy gradients are written to memory. On a CPU the noise takes most of the time and fits no pass
of torch's: ``torch.optim.AdamW(fused=True)`` is as fast there (benchmarks/optimizer_update.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from dp_flash_attention.core.errors import InvalidInputError, RunStateError
from dp_flash_attention.noise.device import KernelKey, require_triton
from dp_flash_attention.noise.targets import checked_stddev, float32_two_variance
from dp_flash_attention.noise.writer import CounterNormalGenerator

_REMEDY: Final = "Use torch.optim.AdamW, with fused=True on a CPU."


@dataclass(frozen=True, kw_only=True)
class _Release:
    """What ``step`` takes next: the sums by parameter, in the order of their streams, and how to make them noisy."""

    sums: Mapping[nn.Parameter, Tensor]
    stddev: float
    divisor: float
    key: KernelKey


class NoisyAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` for ``make_private`` on a CUDA device, with the noise made inside its update.

    The state is AdamW's own: state dicts and checkpoints of the two load into each other. A plan's ``"secure"`` noise comes
    from ChaCha20, as there is no kernel for AES. Never timed: no GPU was at hand.

    Args:
        params: float32 parameters on a CUDA device, contiguous, or groups of them.
        lr: Learning rate.
        betas: Memories of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.

    Raises:
        InvalidInputError: If a parameter is none of those.
        DependencyMissingError: If triton is missing.

    Guarantees:
        neighbouring relation, privacy unit, sensitivity: those of the session whose sums it takes.
        public: parameters and state after each step. Secret: the noise's key; the sums, which it does not change.
        theorem: the update is a function of ``(sums + N(0, stddev²))/B̄`` and of what was public before, so it is
            post-processing of the session's release; the noise is that of the generator at (step, parameter).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        require_triton("NoisyAdamW")
        for group in self.param_groups:
            for parameter in group["params"]:
                _check_tensor("a parameter", parameter)
        self._release: _Release | None = None

    def stage(
        self,
        sums: Mapping[nn.Parameter, Tensor],
        generator: object,
        *,
        stddev: float,
        divisor: float,
        step: int,
    ) -> None:
        """Takes a step's sums; the next ``step()`` adds their noise, once, and moves the parameters.

        Nothing is drawn before. A session calls this.

        Args:
            sums: Of clipped gradients, by parameter; their order numbers the noise's streams.
            generator: ``secure`` on ChaCha20, or ``fast``.
            stddev: Standard deviation of the noise, of a sum.
            divisor: B̄.
            step: Logical step.

        Raises:
            InvalidInputError: If a sum does not fit, or the parameters are not all of the optimizer's.
            NoiseUnavailableError: If no kernel makes the generator's noise, or it fails its check on this device.
            NoiseReuseError: If a CUDA graph is being captured.
        """
        from dp_flash_attention.noise.kernels.writer import refuse_graph_capture
        from dp_flash_attention.training.kernels import require_agreement

        if not isinstance(generator, CounterNormalGenerator):
            raise InvalidInputError(
                "generator", type(generator).__name__, bound="'secure' or 'fast' noise", remedy=_REMEDY
            )
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        if {id(parameter) for parameter in held} != {id(parameter) for parameter in sums}:
            raise InvalidInputError(
                "sums", len(sums), bound=f"one for each of the {len(held)} parameters", remedy=_REMEDY
            )
        key = generator.kernel_key(step)
        # Whatever can be refused is refused before the first parameter moves.
        for parameter, total in sums.items():
            _check_tensor("a parameter", parameter)
            _check_tensor("a sum", total)
            refuse_graph_capture(total)
            require_agreement(total, key.cipher)
        for group in self.param_groups:
            _check_group(group)
        self._release = _Release(sums=sums, stddev=stddev, divisor=divisor, key=key)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Adds the noise of the staged sums and takes AdamW's step, in one pass.

        A failure in the middle leaves some parameters moved. The noise is used up then: the session refuses to apply the
        step again, and the last checkpoint is where to go on.

        Raises:
            RunStateError: If nothing is staged, or a closure is given.
        """
        release, self._release = self._release, None
        if release is None or closure is not None:
            raise RunStateError(
                "NoisyAdamW.step() has no sums of clipped gradients to take, and never takes raw ones. Make the model private "
                "with make_private(model, optimizer, plan) and call session.apply(step)."
            )
        streams = {id(parameter): stream for stream, parameter in enumerate(release.sums)}
        for group in self.param_groups:
            for parameter in group["params"]:
                self._update(parameter, group, release, streams[id(parameter)])

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], release: _Release, stream: int) -> None:
        from dp_flash_attention.training.kernels import Moments, noisy_adamw_

        state = self.state[parameter]
        if len(state) == 0:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        if parameter.numel() == 0:
            return
        noisy_adamw_(
            parameter.detach(),
            release.sums[parameter],
            state["exp_avg"],
            state["exp_avg_sq"],
            two_variance=float32_two_variance(checked_stddev(release.stddev, torch.float32)),
            divisor=release.divisor,
            moments=Moments(
                learning_rate=float(group["lr"]),
                betas=(float(group["betas"][0]), float(group["betas"][1])),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                num_steps=float(state["step"]),
            ),
            key=release.key,
            stream=stream,
        )
        # The kernel wrote behind autograd's back: what saved the old values must notice.
        torch.autograd.graph.increment_version(parameter)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not (_is_on_gpu(tensor) and tensor.dtype is torch.float32 and tensor.is_contiguous()):
        raise InvalidInputError(
            f"{name} of NoisyAdamW",
            f"{tensor.dtype} on {str(tensor.device)!r} with strides {tensor.stride()}",
            bound="float32, contiguous, on a CUDA device",
            remedy=_REMEDY,
        )


def _check_group(group: Mapping[str, Any]) -> None:
    """Refuses settings of AdamW that the kernel does not carry out; a loaded state dict may bring them."""
    for name in ("amsgrad", "maximize", "capturable", "differentiable", "fused"):
        if group.get(name):
            raise InvalidInputError(name, group[name], bound="False for NoisyAdamW", remedy=_REMEDY)
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        raise InvalidInputError("decoupled_weight_decay", False, bound="True for NoisyAdamW", remedy=_REMEDY)


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
