"""Two runs of one microbatch draw the same dropout masks."""

from __future__ import annotations

import torch


class RandomState:
    """PyTorch's generators of the CPU and of one device, as they stand now.

    Args:
        device: The model's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind(self) -> None:
        """Puts the generators back to where they stood."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
