"""In which form a linear map's per-example norm is computed: by a formula, or as it was measured.

| form | what is kept of a microbatch | norm | weighted gradient |
|---|---|---|---|
| ``gram`` | inputs and output gradients | ``Σ_{t,s} ⟨x_t, x_s⟩⟨g_t, g_s⟩`` | one product |
| ``outer`` | the same | ``‖gᵀx‖²``, piece by piece | the same product once more |
| ``formed`` | each example's gradient, where it is no larger than the others | its square | one pass over it |

**The choice cannot change privacy.** All three compute the norm of the same recorded gradient, exactly up to the
rounding of float32, and what is clipped stays what is released. The choice is made from shapes, types and clock
readings on synthetic tensors, never from records. What it does change is the order of additions, so a resumed run
must use the forms that it was started with; ``training.trainer`` keeps them in the run's record.

A table travels by context to the ``Tape`` of each microbatch, on the thread that makes it, and from there with each
record: a backward pass on a thread of the accelerator's finds the same forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dp_flash_attention.clipping.norms import accumulation_dtype, gram_is_cheaper
from dp_flash_attention.core.errors import InvalidInputError

NormForm = Literal["gram", "outer", "formed"]


@dataclass(frozen=True, kw_only=True, order=True)
class NormShape:
    """What the cost of a linear map's norm depends on, beside the machine.

    Attributes:
        num_rows: T, rows of an example.
        num_inputs: D.
        num_outputs: P.
        input_dtype: The inputs' type, as ``"float32"``.
        grad_dtype: The output gradients' type.
    """

    num_rows: int
    num_inputs: int
    num_outputs: int
    input_dtype: str = "float32"
    grad_dtype: str = "float32"

    @classmethod
    def of(cls, x_BTD: Tensor, g_BTP: Tensor) -> NormShape:
        """Returns the shape of one record."""
        return cls(
            num_rows=x_BTD.shape[1],
            num_inputs=x_BTD.shape[2],
            num_outputs=g_BTP.shape[2],
            input_dtype=str(x_BTD.dtype).removeprefix("torch."),
            grad_dtype=str(g_BTP.dtype).removeprefix("torch."),
        )

    @property
    def can_be_formed(self) -> bool:
        """Whether an example's gradient takes no more bytes than its inputs and output gradients together."""
        x, g = (torch.empty(0, dtype=getattr(torch, name)) for name in (self.input_dtype, self.grad_dtype))
        gradient_bytes = self.num_inputs * self.num_outputs * accumulation_dtype(x, g).itemsize
        return gradient_bytes <= self.num_rows * (
            self.num_inputs * x.itemsize + self.num_outputs * g.itemsize
        )

    @property
    def candidates(self) -> tuple[NormForm, ...]:
        """The forms that may be chosen: no choice makes a record larger than inputs and output gradients."""
        return ("gram", "outer", "formed") if self.can_be_formed else ("gram", "outer")


def form_by_formula(shape: NormShape) -> NormForm:
    """Returns the form that a count of products and bytes prefers.

    A gradient no larger than what it is made of is formed: the outer form would form it for the norm and the weighted
    gradient once more. At (B, T, D, P) = (8, 512, 256, 1024) that is 26 ms instead of 50 (one core of an AMD EPYC).
    """
    if shape.can_be_formed:
        return "formed"
    return "gram" if gram_is_cheaper(shape.num_rows, shape.num_inputs, shape.num_outputs) else "outer"


class NormForms:
    """The forms that were chosen for some shapes; every other shape's is the formula's, and is noted.

    Args:
        chosen: Forms by shape.

    Raises:
        InvalidInputError: If a form is not one of the shape's candidates.
    """

    def __init__(self, chosen: Mapping[NormShape, NormForm] | None = None) -> None:
        self._chosen: dict[NormShape, NormForm] = dict(chosen or {})
        self._fallbacks: dict[NormShape, NormForm] = {}
        for shape, form in self._chosen.items():
            if form not in shape.candidates:
                raise InvalidInputError(
                    "form",
                    f"{form!r} for {shape}",
                    bound=f"one of {', '.join(shape.candidates)}",
                    remedy="Measure the forms anew, or leave the shape to the formula.",
                )

    def form_of(self, shape: NormShape) -> NormForm:
        """Returns the form to use; notes the shape if it was never chosen for."""
        chosen = self._chosen.get(shape)
        if chosen is not None:
            return chosen
        return self._fallbacks.setdefault(shape, form_by_formula(shape))

    @property
    def chosen(self) -> dict[NormShape, NormForm]:
        """What was chosen, by shape."""
        return dict(self._chosen)

    @property
    def fallbacks(self) -> dict[NormShape, NormForm]:
        """The shapes met so far that nothing was chosen for, with the formula's form."""
        return dict(self._fallbacks)

    def to_json(self) -> list[dict[str, Any]]:
        """Returns what was chosen as JSON values, in one order whatever the order of measuring."""
        return [asdict(shape) | {"form": form} for shape, form in sorted(self._chosen.items())]

    @classmethod
    def from_json(cls, entries: Iterable[Mapping[str, Any]]) -> NormForms:
        """Returns the table that ``to_json`` wrote.

        Raises:
            InvalidInputError: If an entry is not of that form.
        """
        chosen: dict[NormShape, NormForm] = {}
        for entry in entries:
            sizes = {name: value for name, value in entry.items() if name != "form"}
            try:
                shape = NormShape(**sizes)
                [form] = [known for known in shape.candidates if known == entry.get("form")]
            except (TypeError, AttributeError, ValueError):
                raise InvalidInputError(
                    "norm_forms",
                    dict(entry),
                    bound="a shape with one of its forms, as NormForms.to_json() writes it",
                    remedy="Restore the run's record.",
                ) from None
            chosen[shape] = form
        return cls(chosen)


_current: ContextVar[NormForms | None] = ContextVar("norm forms", default=None)


@contextmanager
def using(forms: NormForms) -> Iterator[NormForms]:
    """Computes the norms of every microbatch that is recorded inside by the forms of a table."""
    token = _current.set(forms)
    try:
        yield forms
    finally:
        _current.reset(token)


def forms_in_use() -> NormForms:
    """Returns the table of the context, or an empty one, which is the formula."""
    current = _current.get()
    return NormForms() if current is None else current
