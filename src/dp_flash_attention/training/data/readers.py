"""Reads a table from a file: .csv, .jsonl or .parquet, one record a row.

Error messages speak of the file's content. They are for its owner and are not covered by any guarantee.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dp_flash_attention.core.errors import DataError
from dp_flash_attention.training.data.files import (
    SHOWN_LINES,
    cell_text,
    check_column,
    is_missing,
    label_texts,
    read_frame,
)
from dp_flash_attention.training.data.schema import (
    CategoricalField,
    Field,
    Label,
    NumericField,
    Schema,
    SchemaOrigin,
)
from dp_flash_attention.training.data.tabular import TabularDataset

if TYPE_CHECKING:
    import pandas as pd


def read_table(path: Path | str, *, label: str, schema: Schema | None = None) -> TabularDataset:
    """Reads and encodes a table.

    Args:
        path: A .csv file with a header, a .jsonl file with one object a line, or a .parquet file.
        label: The column to predict.
        schema: Public description of the columns. None takes all columns but the label, a column of numbers as
            numeric and any other as categorical, on public knots and buckets; names, kinds and classes are then
            *assumed* public.

    Raises:
        DataError: If the file is missing, empty, of another kind or does not parse, a column is missing, or the
            label is missing in a row, has one class or more than ``MAX_CLASSES``.
        DependencyMissingError: If pandas or pyarrow is not installed.
    """
    path = Path(path)
    frame = read_frame(path)
    wanted = [label] if schema is None else [label, *(field.name for field in schema.fields)]
    for name in wanted:
        check_column(path, name, [str(column) for column in frame.columns])
    texts = label_texts(path, frame[label])
    if schema is None:
        schema = _inferred(path, frame, label, texts)
    classes = schema.label.classes
    unknown = sorted(set(texts) - set(classes))
    if unknown:
        raise DataError(
            f"Column '{label}' of {path} holds {unknown[:3]}, but the schema's classes are {list(classes)}. Add the "
            "class to the schema or correct the rows."
        )
    columns = {field.name: _values(path, frame[field.name], field) for field in schema.fields}
    number = {name: index for index, name in enumerate(classes)}
    return TabularDataset.from_columns(schema, columns, np.array([number[text] for text in texts]))


def _inferred(path: Path, frame: pd.DataFrame, label: str, texts: list[str]) -> Schema:
    names = [str(name) for name in frame.columns if name != label]
    if not names:
        raise DataError(f"{path} has no column besides '{label}' to predict it from. Add columns.")
    fields = tuple(
        NumericField(name=name) if _is_numeric(frame[name]) else CategoricalField(name=name) for name in names
    )
    return Schema(
        fields=fields,
        label=Label(name=label, classes=tuple(sorted(set(texts)))),
        origin=SchemaOrigin.ASSUMED_PUBLIC,
    )


def _is_numeric(column: pd.Series) -> bool:
    return all(is_missing(value) or _number(value) is not None for value in column)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _values(path: Path, column: pd.Series, field: Field) -> Any:
    if isinstance(field, CategoricalField):
        return np.array([None if is_missing(value) else cell_text(value) for value in column], dtype=object)
    numbers = [np.nan if is_missing(value) else _number(value) for value in column]
    bad = [index + 1 for index, number in enumerate(numbers) if number is None]
    if bad:
        shown = ", ".join(map(str, bad[:SHOWN_LINES]))
        raise DataError(
            f"{len(bad)} records of {path} hold no number in the numeric column '{field.name}' (records {shown}). "
            "Correct them, or call the column categorical in the schema."
        )
    return np.array(numbers, dtype=np.float64)
