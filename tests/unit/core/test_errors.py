from __future__ import annotations

import pickle

import pytest

from dp_flash_attention.core import errors

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.DPFlashAttentionError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_one_of_ours_and_a_built_in_kind(kind: type[Exception]) -> None:
    built_in = (ValueError, RuntimeError, ImportError)
    assert kind is errors.DPFlashAttentionError or issubclass(kind, built_in)


def test_bad_input_says_name_value_bound_and_remedy_on_one_line() -> None:
    error = errors.InvalidInputError("delta", 2.5, bound="strictly between 0 and 1", remedy="Use 1e-6.")
    assert str(error) == "delta is 2.5, but it must be strictly between 0 and 1. Use 1e-6."
    assert (error.name, error.value, error.bound) == ("delta", 2.5, "strictly between 0 and 1")
    assert "\n" not in str(errors.InvalidInputError("name", "two\nlines", bound="one line", remedy="Join."))


def test_errors_survive_being_sent_to_another_process() -> None:
    error = errors.RunStateError("checkpoint is gone")
    assert str(pickle.loads(pickle.dumps(error))) == "checkpoint is gone"
