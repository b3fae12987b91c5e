"""Where the backward pass of a norm layer runs: Triton's kernel, which gives each example's gain and bias beside it, or torch.

The kernel reads the input and the output gradients once for the input's gradient and for the per-example gradients of
gain and bias. In torch they are two passes, the second with a product of the input's size. What is recorded is the same
[B, D] rows either way; their norms and weighted sums touch nothing of the input's size again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from torch import Tensor

from dp_flash_attention.clipping.norms import kernels_take

if TYPE_CHECKING:
    from dp_flash_attention.clipping.kernels.norm_backward import NormGradients

# A program holds whole rows: at the widest 16 numbers of each of x, g, gain and the two sums a thread.
MAX_KERNEL_WIDTH: Final = 8192


def norm_layer_path(x: Tensor, *, width: int) -> Literal["triton", "torch"]:
    """Returns what the backward pass of a norm layer runs.

    To be asked during the forward pass: the backward pass may run on another thread, which does not know whether a graph
    is being made.

    Args:
        x: The layer's input.
        width: Numbers of a row that are normalised together.
    """
    return "triton" if 0 < width <= MAX_KERNEL_WIDTH and kernels_take(x) else "torch"


def kernel_norm_backward(
    x_BTD: Tensor,
    g_BTD: Tensor,
    *,
    mean_BT: Tensor | None,
    rstd_BT: Tensor,
    weight_D: Tensor,
    with_input: bool,
) -> NormGradients:
    """Returns the gradients by Triton's kernel; arguments are those of ``kernels.norm_backward``.

    Raises:
        KernelMismatchError: If the kernel disagrees with float64 at its first use here.
    """
    from dp_flash_attention.clipping import kernels

    kernels.require_norm_layer_agreement(x_BTD)
    return kernels.norm_backward(
        x_BTD, g_BTD, mean_BT=mean_BT, rstd_BT=rstd_BT, weight_D=weight_D, with_input=with_input
    )
