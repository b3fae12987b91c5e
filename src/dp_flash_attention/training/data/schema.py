"""The public description of a table: which columns, of which kind, on which knots and categories.

A schema is part of what is public. One from a file, or built in, was fixed before the data was seen.
One inferred from the data is only *assumed* public, and everything downstream says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from dp_flash_attention.core.errors import DataError, InvalidInputError
from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.training.data.encoding import default_knots

DEFAULT_NUM_BUCKETS = 128
"""Hash buckets of a categorical column of which nothing is known. 128 rows of a narrow embedding are
few enough to learn under noise; a column with more categories than that shares rows."""


class SchemaOrigin(StrEnum):
    """Where a schema comes from, and so whether it being public is a fact or an assumption."""

    BUILT_IN = "built in"
    PUBLIC_FILE = "public file"
    ASSUMED_PUBLIC = "assumed public"


@dataclass(frozen=True, kw_only=True)
class NumericField:
    """A column of numbers, encoded between public knots.

    Attributes:
        name: Column name.
        knots: Strictly increasing finite numbers, at least two.

    Raises:
        InvalidInputError: If the knots are not that.
    """

    name: str
    knots: tuple[float, ...] = default_knots()

    def __post_init__(self) -> None:
        increasing = all(low < high for low, high in zip(self.knots, self.knots[1:], strict=False))
        if len(self.knots) < 2 or not increasing or not all(math.isfinite(knot) for knot in self.knots):
            raise InvalidInputError(
                f"knots of column '{self.name}'",
                self.knots,
                bound="at least two strictly increasing finite numbers",
                remedy="List public round numbers that cover the column's plausible range.",
            )

    @property
    def num_ids(self) -> int:
        """Tokens of the field: missing, then one for each knot."""
        return 1 + len(self.knots)


@dataclass(frozen=True, kw_only=True)
class CategoricalField:
    """A column of categories: a public list, and hash buckets for everything else.

    Attributes:
        name: Column name.
        categories: Public list; may be empty.
        num_buckets: Public hash buckets that share all other values.

    Raises:
        InvalidInputError: If a category is listed twice or there is no bucket.
    """

    name: str
    categories: tuple[str, ...] = ()
    num_buckets: int = DEFAULT_NUM_BUCKETS

    def __post_init__(self) -> None:
        positive_int(f"buckets of column '{self.name}'", self.num_buckets, remedy="Use 1 for 'any other'.")
        if len(set(self.categories)) != len(self.categories):
            twice = next(c for c in self.categories if self.categories.count(c) > 1)
            raise InvalidInputError(
                f"categories of column '{self.name}'",
                twice,
                bound="listed once each",
                remedy="Remove the repetition.",
            )

    @property
    def num_ids(self) -> int:
        """Tokens of the field: missing, the list, the buckets."""
        return 1 + len(self.categories) + self.num_buckets


Field = NumericField | CategoricalField


@dataclass(frozen=True, kw_only=True)
class Label:
    """The column to predict and its public list of classes.

    Attributes:
        name: Column name.
        classes: Every class, as text, in the order of the model's outputs; at least two. Of two, the
            second is the positive one.

    Raises:
        InvalidInputError: If there are fewer than two classes or one is listed twice.
    """

    name: str
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise InvalidInputError(
                f"classes of label '{self.name}'",
                self.classes,
                bound="at least two different classes",
                remedy="List every class that the label can take.",
            )


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Fields, label and origin. The single embedding table has id 0 for CLS, then each field's ids.

    Raises:
        InvalidInputError: If there is no field, or a name appears twice.
    """

    fields: tuple[Field, ...]
    label: Label
    origin: SchemaOrigin

    def __post_init__(self) -> None:
        names = [field.name for field in self.fields] + [self.label.name]
        if not self.fields or len(set(names)) != len(names):
            raise InvalidInputError(
                "schema columns",
                names,
                bound="at least one field, and every name once, the label included",
                remedy="Remove the repetition; the label is not a field.",
            )

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First id of each field in the shared table."""
        starts = [1]
        for field in self.fields[:-1]:
            starts.append(starts[-1] + field.num_ids)
        return tuple(starts)

    @property
    def vocab_size(self) -> int:
        """Rows of the shared embedding table, CLS included."""
        return 1 + sum(field.num_ids for field in self.fields)

    def public_statement(self) -> str:
        """Returns the sentence on the schema that a certificate prints."""
        columns = ", ".join(
            f"{f.name} ({'numeric' if isinstance(f, NumericField) else 'categorical'})" for f in self.fields
        )
        return (
            f"Column names, kinds, knots, categories and the classes {list(self.label.classes)} of "
            f"'{self.label.name}' are public ({self.origin.value}): {columns}."
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the schema in the form that ``load_schema`` reads."""
        return {
            "fields": [
                {"name": f.name, "kind": "numeric", "knots": list(f.knots)}
                if isinstance(f, NumericField)
                else {
                    "name": f.name,
                    "kind": "categorical",
                    "categories": list(f.categories),
                    "buckets": f.num_buckets,
                }
                for f in self.fields
            ],
            "label": {"name": self.label.name, "classes": list(self.label.classes)},
        }


def load_schema(path: Path | str) -> Schema:
    """Reads a public schema file.

    The file is JSON: ``{"fields": [{"name", "kind": "numeric", "knots"?}, {"name", "kind":
    "categorical", "categories"?, "buckets"?}], "label": {"name", "classes"}}``.

    Raises:
        DataError: If the file cannot be read, is not such JSON, or holds an unknown key.
        InvalidInputError: If a value lies outside its bound.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"Schema file {path} cannot be read as JSON ({error}). Check the path and the syntax."
        ) from error
    try:
        label = content["label"]
        return Schema(
            fields=tuple(_parse_field(entry) for entry in content["fields"]),
            label=Label(name=str(label["name"]), classes=tuple(str(c) for c in label["classes"])),
            origin=SchemaOrigin.PUBLIC_FILE,
        )
    except InvalidInputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"Schema file {path} has a wrong or missing entry ({type(error).__name__}: {error}). It needs 'fields' "
            "(each with 'name' and 'kind': numeric or categorical) and 'label' (with 'name' and 'classes')."
        ) from error


def _parse_field(entry: dict[str, Any]) -> Field:
    known = {"numeric": {"name", "kind", "knots"}, "categorical": {"name", "kind", "categories", "buckets"}}
    kind = entry["kind"]
    if kind not in known:
        raise ValueError(f"kind {kind!r} is neither 'numeric' nor 'categorical'")
    unknown = set(entry) - known[kind]
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)} in column {entry['name']!r}")
    name = str(entry["name"])
    if kind == "numeric":
        return NumericField(
            name=name, knots=tuple(float(knot) for knot in entry.get("knots", default_knots()))
        )
    return CategoricalField(
        name=name,
        categories=tuple(str(category) for category in entry.get("categories", ())),
        num_buckets=entry.get("buckets", DEFAULT_NUM_BUCKETS if not entry.get("categories") else 1),
    )
