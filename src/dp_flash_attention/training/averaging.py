"""Exponential averaging of parameters: post-processing of released steps, free of privacy cost."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dp_flash_attention.core.validation import open_unit


class ParameterAverage:
    """A running average of a model's trainable parameters, in float32 or better.

    After update n (from 1) the decay is ``min(decay, (1 + n) / (10 + n))``, so that the average forgets the
    initial parameters quickly.

    Args:
        parameters: By name, each once.
        decay: Share of the old average that each update keeps, in (0, 1).

    Raises:
        InvalidInputError: If ``decay`` is out of range.

    Guarantees:
        A function of released parameters alone, so their (ε, δ) holds for the average (post-processing,
        Dwork & Roth 2014, Proposition 2.1). The averaging itself: De et al. 2022, section 3.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float) -> None:
        self.decay = open_unit("ema_decay", decay, remedy="Common values lie between 0.9 and 0.9999.")
        self._parameters = dict(parameters)
        self._num_updates = 0
        self._averages = {
            name: _wide(parameter.detach()).clone() for name, parameter in self._parameters.items()
        }

    def update(self) -> None:
        """Takes in the parameters of a finished step."""
        self._num_updates += 1
        keep = min(self.decay, (1 + self._num_updates) / (10 + self._num_updates))
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                average = self._averages[name]
                average.lerp_(parameter.detach().to(average.dtype), 1.0 - keep)

    def copy_to_model(self) -> None:
        """Overwrites the model's parameters with their averages."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._averages[name])

    def state_dict(self) -> dict[str, object]:
        """Returns the averages and their number of updates."""
        return {"num_updates": self._num_updates, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restores what ``state_dict`` returned."""
        averages, num_updates = state["averages"], state["num_updates"]
        assert isinstance(averages, dict)
        assert isinstance(num_updates, int)
        self._num_updates = num_updates
        for name, average in self._averages.items():
            average.copy_(averages[name])


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()
