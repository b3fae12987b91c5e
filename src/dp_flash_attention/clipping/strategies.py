"""Ways to the same clipped sum, of different memory and time.

| strategy | passes | holds beside the non-private step | time |
|---|---|---|---|
| ``bookkeeping`` | one | inputs and output gradients of all layers of a group until its norm is known | the least |
| ``two_pass`` | two | records of parameters used more than once, until the end of a pass | about 1.7 times that |
| ``one_example`` | one an example | nothing | that of the ordinary step with batches of one |

Flat clipping has one group, all layers; per-layer clipping has one for each.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

from dp_flash_attention.clipping.clip_groups import Clipping
from dp_flash_attention.core.errors import InvalidInputError

Strategy = Literal["bookkeeping", "two_pass", "one_example"]


def checked_strategy(strategy: object, *, compile: bool = False, clipping: Clipping = "flat") -> Strategy:
    """Returns the strategy.

    Args:
        strategy: Its name.
        compile: Whether the step is to be one compiled graph, which is book-keeping's.
        clipping: What is clipped together.

    Raises:
        InvalidInputError: If there is none of that name, it cannot be compiled, or two passes are asked to clip groups.
    """
    refused: tuple[str, str] | None = None
    if strategy not in get_args(Strategy):
        refused = " or ".join(map(repr, get_args(Strategy))), "Use 'two_pass' where memory is short."
    elif compile and strategy != "bookkeeping":
        refused = "'bookkeeping' with compile, whose graph is one pass", "Leave one of the two out."
    elif clipping == "per_layer" and strategy == "two_pass":
        refused = (
            "'bookkeeping' or 'one_example' with clipping 'per_layer'",
            "'bookkeeping' frees each group's record in its one pass already.",
        )
    if refused is not None:
        raise InvalidInputError("strategy", strategy, bound=refused[0], remedy=refused[1])
    return cast(Strategy, strategy)
