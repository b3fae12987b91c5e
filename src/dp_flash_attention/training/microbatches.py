"""From sampled indices to microbatches of one static shape.

The last microbatch of a step is filled up with copies of its own first row, of weight 0: shapes never
change, so nothing is recompiled, and the copies contribute exactly nothing to the clipped sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate

from dp_flash_attention.core.errors import InvalidInputError

CollateFn = Callable[[list[Any]], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Microbatch:
    """Some rows of a step's sample. Private data.

    Attributes:
        step: Number of the logical step that it belongs to.
        position: Its number within the step.
        inputs: A tree of tensors, each with ``microbatch_size`` rows.
        weights: Shape [microbatch_size], 1 for a sampled record and 0 for padding.
    """

    step: int
    position: int
    inputs: Any
    weights: Tensor


class RecordSource:
    """Fetches records by index from a map-style data set.

    A data set with a method ``take(indices: LongTensor)`` that returns a tree of tensors is asked for all
    rows at once; a tensor is indexed; of any other, ``[dataset[i] for i in indices]`` is collated.

    Args:
        dataset: A map-style data set: ``__len__``, and ``__getitem__`` or ``take``.
        collate_fn: Makes a tree of tensors of a list of records; None means PyTorch's ``default_collate``.

    Raises:
        InvalidInputError: If ``dataset`` is a loader, a sampler, an iterable or a mapping, or empty.
            Whoever draws the batches decides the privacy; batches drawn by anything but the plan cannot be
            accounted for.
    """

    def __init__(self, dataset: object, *, collate_fn: CollateFn | None = None) -> None:
        self._take = _take_method(dataset)
        _check_map_style(dataset, has_take=self._take is not None)
        self._dataset: Any = dataset
        self._collate_fn = default_collate if collate_fn is None else collate_fn
        if len(self) == 0:
            raise InvalidInputError(
                "dataset", "empty", bound="at least one record", remedy="Pass a data set with records."
            )

    def __len__(self) -> int:
        """The number of records; private data."""
        return len(self._dataset)

    def holds(self, dataset: object) -> bool:
        """Whether this is the source of that very object."""
        return self._dataset is dataset

    def fetch(self, indices: Tensor) -> Any:
        """Returns the records at ``indices``, int64 [n], as a tree whose tensors have n rows.

        Raises:
            InvalidInputError: If the data set returns anything else.
        """
        if self._take is not None:
            inputs = self._take(indices)
        elif isinstance(self._dataset, Tensor):
            inputs = self._dataset[indices]
        else:
            inputs = self._collate_fn([self._dataset[i] for i in indices.tolist()])
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if not leaves or any(leaf.dim() == 0 or leaf.shape[0] != len(indices) for leaf in leaves):
            raise InvalidInputError(
                "records",
                [tuple(leaf.shape) for leaf in leaves],
                bound=f"tensors with one row for each of the {len(indices)} records asked for",
                remedy="Return such tensors from take(indices) or collate_fn.",
            )
        return inputs


class LogicalStep:
    """One step's Poisson sample, cut into microbatches; iterate to get them. Private data.

    Attributes:
        index: Number of the step, from 0.
        num_microbatches: 0 for an empty sample, which is a step like any other.
    """

    def __init__(
        self, index: int, source: RecordSource, chunks: list[tuple[Tensor, Tensor]], device: torch.device
    ) -> None:
        self.index = index
        self.num_microbatches = len(chunks)
        self._source, self._chunks, self._device = source, chunks, device

    def __iter__(self) -> Iterator[Microbatch]:
        """Yields the microbatches in order, each fetched when it is its turn."""
        for position, (indices, weights) in enumerate(self._chunks):
            inputs = pytree.tree_map_only(
                Tensor, lambda leaf: leaf.to(self._device), self._source.fetch(indices)
            )
            yield Microbatch(
                step=self.index, position=position, inputs=inputs, weights=weights.to(self._device)
            )


def static_chunks(indices: Tensor, microbatch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Splits indices into chunks of one size.

    Args:
        indices: int64 [n]; n may be 0, which gives no chunk.
        microbatch_size: Size of every chunk.

    Yields:
        Indices and weights, both [microbatch_size]; weight 0 marks padding.
    """
    for start in range(0, len(indices), microbatch_size):
        chunk = indices[start : start + microbatch_size]
        weights = torch.zeros(microbatch_size)
        weights[: len(chunk)] = 1.0
        padding = chunk[:1].expand(microbatch_size - len(chunk))
        yield torch.cat([chunk, padding]), weights


def _check_map_style(dataset: object, *, has_take: bool) -> None:
    drawn_elsewhere = isinstance(dataset, DataLoader | Sampler | IterableDataset | Iterator) or hasattr(
        dataset, "batch_sampler"
    )
    map_style = isinstance(dataset, Sized) and (has_take or hasattr(dataset, "__getitem__"))
    if drawn_elsewhere or not map_style or isinstance(dataset, Mapping | str | bytes):
        raise InvalidInputError(
            "dataset",
            type(dataset).__name__,
            bound="a map-style data set (__len__ and __getitem__ by number) that the plan itself draws "
            "from, because batches drawn elsewhere, such as by a shuffling loader, cannot be accounted as "
            "Poisson samples",
            remedy="Pass the data set itself, for a loader its .dataset.",
        )


def _take_method(dataset: object) -> Callable[[Tensor], Any] | None:
    """Finds ``take(indices)``; with another parameter it means something else, as in Hugging Face's."""
    method = getattr(dataset, "take", None)
    if method is None or isinstance(dataset, Tensor):
        return None
    try:
        names = list(inspect.signature(method).parameters)
    except (TypeError, ValueError):  # methods of extension types have no signature
        return None
    return method if names[:1] == ["indices"] else None
