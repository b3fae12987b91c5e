"""Root-mean-square normalisation: torch's, and the copies of it in Hugging Face models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from dp_flash_attention.clipping.rules.broadcast import call_with_attributes, per_example_copies
from dp_flash_attention.clipping.tape import Tape


class RMSNormRule:
    """The gain, shape [D], is replaced by one copy for each example, shape [B, 1, D]."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is an RMSNorm with one gain vector and nothing else."""
        own = list(module.parameters(recurse=False))
        named = type(module) is nn.RMSNorm or type(module).__name__.endswith("RMSNorm")
        weight = getattr(module, "weight", None)
        return (
            named and len(own) == 1 and own[0] is weight and own[0].dim() == 1 and not list(module.children())
        )

    def recording_forward(
        self, module: nn.Module, *, name: str, parameters: dict[str, str], tape: Tape
    ) -> Callable[..., Tensor]:
        """See ``Rule.recording_forward``; inputs are [B, ..., D] or flattened [B·T, D]."""
        weight = cast(Tensor, module.weight)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x_BTD = tape.by_example(hidden_states, num_feature_dims=1, module=name)
            copies_B1D = per_example_copies(weight, name=parameters["weight"], tape=tape)[:, None]
            if isinstance(module, nn.RMSNorm):
                output = F.rms_norm(x_BTD, weight.shape, None, module.eps) * copies_B1D
            else:
                output = call_with_attributes(module, {"weight": copies_B1D}, (x_BTD, *args), kwargs)
            return output.view(hidden_states.shape)

        return forward
