"""Back ends by name, and the choice of one by measurement."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dp_flash_attention.attention.backends.flash_attn_package import FlashAttnPackage
from dp_flash_attention.attention.backends.flex import FlexKernel
from dp_flash_attention.attention.backends.kernel import FlashKernel
from dp_flash_attention.attention.backends.plain import PlainBackend
from dp_flash_attention.attention.backends.torch_kernels import CpuFlash, MathKernel
from dp_flash_attention.attention.backends.torch_kernels_cuda import CudaCudnn, CudaEfficient, CudaFlash
from dp_flash_attention.attention.calls import CallNoise
from dp_flash_attention.attention.interface import AttentionBackend, AttentionCall, Rounding, RowNorms
from dp_flash_attention.core.errors import DependencyMissingError, InvalidInputError
from dp_flash_attention.noise import TestKey

# Kernels hold no state: one object of each serves everyone.
_KERNELS: dict[str, tuple[FlashKernel, ...]] = {
    "flash": (CpuFlash(), CudaFlash()),
    "cudnn": (CudaCudnn(),),
    "efficient": (CudaEfficient(),),
    "flash_attn": (FlashAttnPackage(),),
    "flex": (FlexKernel(),),
    "math": (MathKernel(),),
}
BACKEND_NAMES = (*_KERNELS, "triton")

# Never chosen on their own: `math` holds all scores in memory, `flex` compiles for half a minute first.
_AUTOMATIC = ("triton", "flash", "cudnn", "efficient", "flash_attn")


def get_backend(name: str, device: torch.device) -> AttentionBackend:
    """Returns the back end called ``name`` for a device.

    Raises:
        InvalidInputError: If there is no such name, or none of that name for the device.
        DependencyMissingError: If what it needs is not installed. There is no fallback.
    """
    if name not in BACKEND_NAMES:
        raise InvalidInputError(
            "backend", name, bound=f"'auto' or one of {', '.join(BACKEND_NAMES)}", remedy="Use 'auto'."
        )
    if name == "triton":
        return _triton()
    kernels = _KERNELS[name]
    fitting = [kernel for kernel in kernels if device.type in kernel.devices]
    if not fitting:
        raise InvalidInputError(
            "backend",
            name,
            bound=f"a back end for device {device.type}",
            remedy=f"{name} runs on {', '.join(sorted({d for kernel in kernels for d in kernel.devices}))}; use 'auto'.",
        )
    fitting[0].check_installed()
    return PlainBackend(fitting[0])


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Returns the names that ``get_backend`` accepts for a device on this machine."""
    found = []
    for name in BACKEND_NAMES:
        try:
            get_backend(name, torch.device(device))
        except (InvalidInputError, DependencyMissingError):
            continue
        found.append(name)
    return tuple(found)


def choose_backend(name: str, call: AttentionCall, *, rounding: Rounding | None) -> AttentionBackend:
    """Returns the back end for a call: the one asked for, or with ``"auto"`` the fastest that was measured.

    Args:
        name: A name, or ``"auto"``.
        call: The call; its noise may be missing.
        rounding: The model that the sensitivity was charged for; None takes any.

    Raises:
        InvalidInputError: If the back end asked for refuses the call, or ``"auto"`` finds none that takes it.
        DependencyMissingError: If the back end asked for is not installed.
    """
    device = call.query.device
    needs_grad = torch.is_grad_enabled() and any(
        rows.requires_grad for rows in (call.query, call.key, call.value)
    )
    if name != "auto":
        backend = get_backend(name, device)
        reason = _refusal(backend, call, rounding, needs_grad)
        if reason is not None:
            raise InvalidInputError(
                "backend", name, bound=f"one that takes this call, but {reason}", remedy="Use 'auto'."
            )
        return backend
    takers, reasons = [], []
    for each in available_backends(device):
        if each not in _AUTOMATIC:
            continue
        backend = get_backend(each, device)
        reason = _refusal(backend, call, rounding, needs_grad)
        if reason is None:
            takers.append(backend)
        else:
            reasons.append(f"{each}: {reason}")
    if not takers:
        raise InvalidInputError(
            "backend",
            "auto",
            bound=f"able to run this call ({'; '.join(reasons) or 'none is installed'})",
            remedy="Ask for 'math' by name; it takes every call and holds all scores in memory.",
        )
    if len(takers) == 1:
        return takers[0]
    shape = CallShape.of(call, needs_grad=needs_grad)
    return min(takers, key=lambda backend: measured_seconds(backend.name, shape))


@dataclass(frozen=True, kw_only=True)
class CallShape:
    """What a back end's time depends on."""

    device: str
    dtype: torch.dtype
    query: tuple[int, ...]
    key: tuple[int, ...]
    value_width: int
    causal: bool
    hides: bool
    null_rows: bool
    needs_grad: bool = False

    @classmethod
    def of(cls, call: AttentionCall, *, needs_grad: bool = False) -> CallShape:
        """Returns a call's shape."""
        return cls(
            device=str(call.query.device),
            dtype=call.query.dtype,
            query=tuple(call.query.shape),
            key=tuple(call.key.shape),
            value_width=call.value.shape[3],
            causal=call.causal,
            hides=call.hidden is not None,
            null_rows=call.null_rows > 0.0,
            needs_grad=needs_grad,
        )

    def example(self) -> AttentionCall:
        """Returns a call of this shape over made-up rows, with noise of a test key: to be timed and thrown away."""

        def rows(*shape: int) -> Tensor:
            return torch.ones(shape, dtype=self.dtype, device=self.device, requires_grad=self.needs_grad)

        batch, heads, queries, _ = self.query
        return AttentionCall(
            query=rows(*self.query),
            key=rows(*self.key),
            value=rows(*self.key[:3], self.value_width),
            norms=RowNorms(query=1.0, key=1.0, value=1.0),
            scale=1.0,
            score_bound=1.0,
            causal=self.causal,
            hidden=torch.zeros(batch, self.key[2], dtype=torch.bool, device=self.device)
            if self.hides
            else None,
            null_rows=1.0 if self.null_rows else 0.0,
            stddev=torch.ones(()).expand(batch, heads, queries),
            noise=CallNoise(TestKey("timing"), cipher="chacha20").claim(),
            out_dtype=torch.float32 if self.dtype is torch.float64 else self.dtype,
        )


@lru_cache(maxsize=256)
def measured_seconds(name: str, shape: CallShape) -> float:
    """Returns the shortest of three timed runs of a back end on a shape; remembered for the process.

    A run is a forward pass, and a backward pass where the call needs gradients.
    """
    backend, call = get_backend(name, torch.device(shape.device)), shape.example()

    def run() -> float:
        began = time.perf_counter()
        with torch.set_grad_enabled(shape.needs_grad):
            output = backend.release(call)
        if shape.needs_grad:
            torch.autograd.grad(output, (call.query, call.key, call.value), torch.ones_like(output))
        if torch.device(shape.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run()  # compiles, loads, allocates
    return min(run() for _ in range(3))


def _refusal(
    backend: AttentionBackend, call: AttentionCall, rounding: Rounding | None, needs_grad: bool
) -> str | None:
    if rounding is not None and rounding not in backend.roundings:
        return f"its arithmetic does not obey '{rounding.value}'"
    if call.noise is not None and call.noise.name not in backend.noises:
        made = " and ".join(repr(name) for name in backend.noises)
        return f"it adds noise by itself, {made}, and cannot make {call.noise.name!r}"
    return backend.refusal(call, needs_grad=needs_grad)


def _triton() -> AttentionBackend:
    found = _load_triton()
    if isinstance(found, ImportError):
        raise DependencyMissingError(
            f"Back end 'triton' cannot be loaded ({found}). Use 'auto', or install triton."
        ) from found
    return found


@lru_cache(maxsize=1)
def _load_triton() -> AttentionBackend | ImportError:
    """Returns the kernels' back end or why there is none; looked for once, as looking takes 0.2 ms."""
    try:
        module = importlib.import_module("dp_flash_attention.attention.kernels.backend")
        backend: AttentionBackend = module.make_backend()
    except ImportError as error:
        return error
    return backend
