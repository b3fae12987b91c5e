from __future__ import annotations

from typing import Any

import pytest

from dp_flash_attention.training.certificate_rows import differences


@pytest.mark.parametrize(
    ("stated", "again", "where"),
    [
        ({"a": [1, {"b": "x"}]}, {"a": [1, {"b": "x"}]}, []),
        ({"a": [1, {"b": "x"}]}, {"a": [1, {"b": "y"}]}, ["a[1].b"]),
        ({"a": 1}, {"a": 1, "c": 2}, ["c"]),
        ({"a": 1, "c": None}, {"a": 1}, ["c"]),
        ({"a": [1, 2]}, {"a": [1]}, ["a"]),
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": 1.0}, {"a": 1.0 + 1e-9}, []),
        ({"a": 1.0}, {"a": 1.0 + 1e-5}, ["a"]),
        ({"a": True}, {"a": 1}, ["a"]),
        ({"a": "1"}, {"a": 1}, ["a"]),
        ({"a": None}, {"a": {}}, ["a"]),
    ],
)
def test_where_two_statements_differ(stated: Any, again: Any, where: list[str]) -> None:
    assert list(differences(stated, again, "")) == where
    assert list(differences(again, stated, "")) == where
