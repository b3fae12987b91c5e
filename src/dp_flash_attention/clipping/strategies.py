"""Ways to the same clipped sum, of different memory and time.

| strategy | passes | holds beside the non-private step | time |
|---|---|---|---|
| ``bookkeeping`` | one | every layer's inputs and output gradients until all norms are known | the least |
| ``two_pass`` | two | records of parameters used more than once, until the end of a pass | about 1.7 times that |
"""

from __future__ import annotations

from typing import Literal, get_args

from dp_flash_attention.core.errors import InvalidInputError

Strategy = Literal["bookkeeping", "two_pass"]


def checked_strategy(strategy: object, *, compile: bool = False) -> Strategy:
    """Returns the strategy.

    Args:
        strategy: Its name.
        compile: Whether the step is to be one compiled graph, which is book-keeping's.

    Raises:
        InvalidInputError: If there is none of that name, or it cannot be compiled.
    """
    if strategy == "bookkeeping":
        return "bookkeeping"
    if strategy == "two_pass" and not compile:
        return "two_pass"
    names = " or ".join(map(repr, get_args(Strategy)))
    raise InvalidInputError(
        "strategy",
        strategy,
        bound="'bookkeeping' with compile, whose graph is one pass" if compile else names,
        remedy="Leave one of the two out." if compile else "Use 'two_pass' where memory is short.",
    )
