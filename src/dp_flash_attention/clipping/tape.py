"""What one forward and backward pass over a microbatch records for each parameter.

The tape also decides which rows of a tensor belong to which example. Layouts that can be told from
shapes are accepted; everything else is refused, because rows credited to the wrong example would
be clipped with the wrong factor.
"""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from dp_flash_attention.clipping.contributions import Contribution
from dp_flash_attention.clipping.norm_forms import forms_in_use
from dp_flash_attention.core.errors import ExampleCouplingError


class Tape:
    """Contributions of one microbatch, by parameter name.

    Args:
        batch_size: Number of examples B, padding included.
        layouts: For each module name, whether an index tensor of shape [n] means one index an
            example (True) or positions shared by all examples (False); likewise for each argument
            of a fallback module. Filled where the shape tells, consulted where n equals B and it
            does not.
        probing: True while batches of different sizes are run to fill ``layouts``.

    Attributes:
        norm_forms: The forms of linear maps' norms that were in use when the tape was made.
    """

    def __init__(self, *, batch_size: int, layouts: dict[str, bool], probing: bool = False) -> None:
        self.batch_size = batch_size
        # Taken here and not where a layer records: a backward pass may run on another thread.
        self.norm_forms = forms_in_use()
        self.contributions: dict[str, list[Contribution]] = defaultdict(list)
        self._layouts = layouts
        self._probing = probing
        self._rows_per_example: set[int] = set()

    def record(self, parameter: str, contribution: Contribution) -> None:
        """Adds one use's contribution to a parameter's list."""
        self.contributions[parameter].append(contribution)

    def has_seen(self, parameter: str) -> bool:
        """Whether a use of the parameter was recorded."""
        return bool(self.contributions.get(parameter))

    def by_example(self, values: Tensor, *, num_feature_dims: int, module: str) -> Tensor:
        """Returns ``values`` as [B, T, features...], with T = 1 where an example has one row.

        Args:
            values: [B, features...], [B, rows..., features...] or, flattened example by example,
                [B·T, features...] for a T that this pass has seen unflattened.
            num_feature_dims: How many trailing dimensions are features.
            module: The module's name, for the error.

        Raises:
            ExampleCouplingError: If rows cannot be credited to examples.
        """
        features = values.shape[values.dim() - num_feature_dims :]
        num_row_dims = values.dim() - num_feature_dims - 1
        if num_row_dims >= 0 and values.shape[0] == self.batch_size:
            view = values.reshape(self.batch_size, -1, *features)
            if num_row_dims > 0:
                self._rows_per_example.add(view.shape[1])
            return view
        if num_row_dims == 0 and any(values.shape[0] == self.batch_size * t for t in self._rows_per_example):
            return values.reshape(self.batch_size, -1, *features)
        raise ExampleCouplingError(
            f"module {module!r} received a tensor of shape {tuple(values.shape)} in a microbatch of "
            f"{self.batch_size} examples: its rows cannot be credited to examples. Put the batch dimension "
            f"first, or list the enclosing module in fallback_modules."
        )

    def indices_by_example(self, ids: Tensor, *, module: str) -> tuple[Tensor, bool]:
        """Returns an embedding's indices as [B, T] and whether all examples share them.

        Shared indices (positions) come as [T] or [1, T]; they are expanded, so that every example
        has its own gradient.

        Raises:
            ExampleCouplingError: If [n] with n = B was met before any shape told what it means, or
                if rows cannot be credited to examples.
        """
        size = self.batch_size
        if ids.dim() == 1:
            per_example = self._one_dimensional_layout(ids.shape[0], module)
            if per_example:
                return ids[:, None], False
            self._rows_per_example.add(ids.shape[0])
            return ids[None, :].expand(size, -1), True
        if ids.dim() == 0:
            return ids.view(1, 1).expand(size, 1), True
        if ids.shape[0] == 1 and size > 1:
            return ids.reshape(1, -1).expand(size, -1), True
        return self.by_example(ids, num_feature_dims=0, module=module), False

    def splits_by_example(self, length: int, *, argument: str, module: str) -> bool:
        """Returns whether a fallback module's tensor argument has one entry an example, or is shared.

        A mask of shape [T, T] looks like a batch where T equals B; the batches of other sizes that
        are run first tell.

        Args:
            length: Its leading dimension.
            argument: What identifies the argument over calls.
            module: The module's name, for the error.

        Raises:
            ExampleCouplingError: If the argument followed the batch size before and does not now.
        """
        key = f"{module}({argument})"
        followed = self._layouts.get(key, True)
        if self._probing or key not in self._layouts:
            self._layouts[key] = followed and length == self.batch_size
        elif followed and length != self.batch_size:
            raise ExampleCouplingError(
                f"module {module!r} received an argument of leading dimension {length} in a microbatch of "
                f"{self.batch_size} examples, but one entry an example before. Give it the batch dimension first, or "
                f"run check_examples_independent first, which tells shared arguments apart."
            )
        return self._layouts[key]

    def _one_dimensional_layout(self, length: int, module: str) -> bool:
        if self._probing:
            # One an example only if the length followed every batch size that was tried.
            per_example = self._layouts.get(module, True) and length == self.batch_size
            self._layouts[module] = per_example
            return per_example
        if length != self.batch_size:
            if self._layouts.setdefault(module, False):
                raise ExampleCouplingError(
                    f"module {module!r} received {length} indices in a microbatch of {self.batch_size} examples, "
                    f"but one an example before. Give it indices of shape [batch, length]."
                )
            return False
        if module not in self._layouts:
            raise ExampleCouplingError(
                f"module {module!r} received {length} indices in a microbatch of {length} examples: they may be "
                f"one an example or positions shared by all. Give it indices of shape [batch, length], or run "
                f"check_examples_independent first, which tells the two apart."
            )
        return self._layouts[module]
