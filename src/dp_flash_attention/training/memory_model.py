"""How much memory a step of the built-in transformer takes beyond its parameters, in closed form.

One block saves 16·D numbers a token for its backward pass: its input and the first normalised one (2), queries, keys
and values (3), the mixed values (1), the second residual and normalised one (2), the hidden layer before and after its
activation (4 + 4 at an MLP ratio of 4). Of these, 7·D are the inputs of its four linear maps, whose output gradients
have 9·D numbers: **a record is as large as what the backward pass frees for it**, so a book-kept step ends its
backward pass with what the non-private step begins it with, and the peaks are almost one.

Three moments can be the peak: the start of the backward pass (everything saved, and the logits three times: log
probabilities and two gradients of theirs), the last block's backward, and the end (gradients or sums of all
parameters). The formulas are in float32, without activation checkpointing; what the allocator or the operating system
adds is not in them. They are compared with the allocator's own count by a test, to a tenth.

Shape letters: B examples, T tokens, D width, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dp_flash_attention.clipping.norms import SCRATCH_BYTES
from dp_flash_attention.clipping.strategies import Strategy
from dp_flash_attention.clipping.vocabulary_tiles import SCRATCH_BYTES as HEAD_SCRATCH_BYTES
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.training.models import TextTransformerConfig

_FLOAT_BYTES = 4
_STRIP_ROWS = 64
# What lives for a moment inside a block's backward: the gradient of the residual, of the hidden layer before and
# after its activation; counted with the allocator's events.
_MOMENTARY = 7


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one forward and backward pass of a ``TextTransformer`` language model.

    Attributes:
        config: The model's sizes.
        batch_size: B.
        num_tokens: T.
        fused_head: Whether the head is a ``LinearCrossEntropy``, which holds a bounded piece of the logits.
        head_scratch_bytes: Its ``scratch_bytes``.
    """

    config: TextTransformerConfig
    batch_size: int
    num_tokens: int
    fused_head: bool = False
    head_scratch_bytes: int = HEAD_SCRATCH_BYTES

    def __post_init__(self) -> None:
        positive_int("batch_size", self.batch_size, remedy="Pass the microbatch's number of rows.")
        positive_int("num_tokens", self.num_tokens, remedy="Pass the length of a sequence.")
        if self.config.num_classes is not None:
            raise InvalidInputError(
                "num_classes",
                self.config.num_classes,
                bound="None: the formulas are a language model's",
                remedy="Measure the step with live_memory.peak_live_bytes.",
            )

    @property
    def parameters_of_a_block(self) -> int:
        """Numbers of one block's weights, biases and gains."""
        d, hidden = self.config.d_model, self.config.mlp_ratio * self.config.d_model
        return 4 * d * d + 2 * d * hidden + 9 * d + hidden

    @property
    def num_parameters(self) -> int:
        """Numbers of all parameters, a tied table once."""
        c = self.config
        tables = (1 if c.tie_head else 2) * c.vocab_size + c.seq_len
        return (tables + 2) * c.d_model + c.num_layers * self.parameters_of_a_block

    @property
    def saved_bytes(self) -> int:
        """What one block keeps for its backward pass."""
        return self._tokens * (8 + 2 * self.config.mlp_ratio) * self.config.d_model

    @property
    def block_record_bytes(self) -> int:
        """What book-keeping keeps of one block: of each linear map the smaller of its two records."""
        d, hidden = self.config.d_model, self.config.mlp_ratio * self.config.d_model
        return sum(self._record(*sizes) for sizes in ((d, 3 * d), (d, d), (d, hidden), (hidden, d)))

    @property
    def head_record_bytes(self) -> int:
        """What book-keeping keeps of the head: input and gradient of the logits, or two numbers a token."""
        if self.fused_head:
            return self._tokens * (self.config.d_model + 2)
        return self._record(self.config.d_model, self.config.vocab_size)

    @property
    def loss_bytes(self) -> int:
        """What head and loss hold where the backward pass begins: a fused head a piece of the logits and its gradient."""
        logits = 3 * self._tokens * self.config.vocab_size
        return min(logits, 2 * self.head_scratch_bytes) if self.fused_head else logits

    @property
    def norm_scratch_bytes(self) -> int:
        """Two strips of gram matrices for as many examples as fit."""
        strips = 2 * _FLOAT_BYTES * min(_STRIP_ROWS, self.num_tokens) * self.num_tokens
        return max(strips, min(strips * self.batch_size, SCRATCH_BYTES))

    def peak_bytes(self, strategy: Strategy | Literal["non_private"]) -> int:
        """Returns the most that one step holds beyond parameters and the optimizer's state.

        Args:
            strategy: One of ``clipping``'s, or the step without privacy.

        Raises:
            InvalidInputError: If there is no formula for the strategy.
        """
        c = self.config
        width = self._tokens * c.d_model
        gradients = _FLOAT_BYTES * self.num_parameters
        all_saved = c.num_layers * self.saved_bytes
        head_gradient = _FLOAT_BYTES * c.vocab_size * c.d_model
        hidden_gradient = _FLOAT_BYTES * c.mlp_ratio * c.d_model**2
        hidden_record = self._record(c.mlp_ratio * c.d_model, c.d_model)
        start = all_saved + 2 * width + self.loss_bytes
        last_block = all_saved + _MOMENTARY * width
        # While the first block is gone through, its own gradients and those of the input tables are still to come.
        tables = _FLOAT_BYTES * (c.seq_len + (0 if c.tie_head else c.vocab_size)) * c.d_model
        before_end = gradients - tables - _FLOAT_BYTES * self.parameters_of_a_block + hidden_gradient
        end = max(gradients + 2 * width, before_end + self.saved_bytes + _MOMENTARY * width)
        if strategy == "non_private":
            return max(start, last_block + head_gradient + hidden_gradient, end)
        if strategy == "two_pass":
            one_record = hidden_record + self.norm_scratch_bytes
            return max(start, last_block + one_record + head_gradient, end)
        if strategy == "bookkeeping":
            records = self.head_record_bytes + c.num_layers * self.block_record_bytes
            first_block = self.saved_bytes + _MOMENTARY * width + records - self.block_record_bytes
            return max(
                start,
                # The record is made while what it is made of still lives.
                last_block + self.head_record_bytes + hidden_record,
                first_block + hidden_record,
                records + self.norm_scratch_bytes,
                # Sums appear as records go; the first is the embedding table's, the head's record goes last.
                records + head_gradient,
                gradients + self.head_record_bytes + (self.loss_bytes if self.fused_head else 0),
            )
        raise InvalidInputError(
            "strategy",
            strategy,
            bound="'non_private', 'bookkeeping' or 'two_pass'",
            remedy="Measure the step with live_memory.peak_live_bytes.",
        )

    @property
    def _tokens(self) -> int:
        return _FLOAT_BYTES * self.batch_size * self.num_tokens

    def _record(self, num_inputs: int, num_outputs: int) -> int:
        recorded = self._tokens * (num_inputs + num_outputs)
        return min(recorded, _FLOAT_BYTES * self.batch_size * num_inputs * num_outputs)
