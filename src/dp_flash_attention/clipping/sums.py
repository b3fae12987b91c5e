"""The clipped sums of a step, and whether they hold whole microbatches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.norms import accumulation_dtype
from dp_flash_attention.core.errors import RunStateError


class ClippedSums:
    """One sum for each parameter, float32 or better.

    Args:
        parameters: By name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._sums: dict[str, Tensor] = {}
        self._partly_added = False

    def all(self) -> dict[str, Tensor]:
        """Returns every parameter's sum; zero where nothing was added.

        Raises:
            RunStateError: If a microbatch is in them in part.
        """
        self.check_whole()
        for name in self._parameters.keys() - self._sums.keys():
            self._sums[name] = self.empty(name).zero_()
        return {name: self._sums[name] for name in self._parameters}

    def of(self, name: str) -> tuple[Tensor, bool]:
        """Returns a parameter's sum, made where there is none, and whether it holds nothing yet."""
        fresh = name not in self._sums
        if fresh:
            self._sums[name] = self.empty(name)
        return self._sums[name], fresh

    def begin(self) -> None:
        """Says that a microbatch is going in; until ``end`` the sums are not whole.

        Adding it again after running out of memory half-way would count an example twice.
        """
        self._partly_added = True

    def end(self) -> None:
        """Says that all of the microbatch is in."""
        self._partly_added = False

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Adds a whole microbatch's sums, which belong to this object from now on."""
        self.check_whole()
        self.begin()
        for name, total in sums.items():
            self._sums[name] = self._sums[name].add_(total) if name in self._sums else total
        self.end()

    def reset(self) -> None:
        """Sets the sums to zero."""
        self._sums.clear()
        self._partly_added = False

    def check_whole(self) -> None:
        """Checks that no microbatch is in the sums in part.

        Raises:
            RunStateError: If one is.
        """
        if self._partly_added:
            raise RunStateError(
                "an earlier add() broke off while it was adding, so the sums hold a part of a microbatch and adding it "
                "again would count an example twice. Call reset() and begin the step anew (in a session: ask steps() "
                "again)."
            )

    def empty(self, name: str) -> Tensor:
        """Returns uninitialised, row-major memory for a sum; the first contribution overwrites it."""
        parameter = self._parameters[name]
        return torch.empty(parameter.shape, dtype=accumulation_dtype(parameter), device=parameter.device)
