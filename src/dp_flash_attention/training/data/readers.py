"""Reads a table from a file: .csv, .jsonl or .parquet, one record a row.

Error messages speak of the file's content. They are for its owner and are not covered by any guarantee.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dp_flash_attention.core.errors import DataError, DependencyMissingError
from dp_flash_attention.training.data.encoding import MISSING_TEXTS
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

MAX_CLASSES = 100
"""A label with more different values is taken for a number or a name, not for a class."""

_SHOWN_LINES = 5


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
    frame = _frame(path)
    if len(frame) == 0:
        raise DataError(f"{path} holds no records, but at least one is needed. Check the file.")
    wanted = [label] if schema is None else [label, *(field.name for field in schema.fields)]
    for name in wanted:
        _check_column(path, name, [str(column) for column in frame.columns])
    texts = _label_texts(path, frame[label])
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


def _frame(path: Path) -> pd.DataFrame:
    kinds = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in kinds:
        raise DataError(
            f"{path} is of kind '{path.suffix}', but a table is one of {', '.join(kinds)}. Convert it."
        )
    if not path.is_file():
        raise DataError(f"{path} is not a file. Check the path.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty, but at least one record is needed. Check the file.")
    try:
        return kinds[path.suffix](path)
    except ImportError as error:
        raise DependencyMissingError(
            f"Reading {path.suffix} files needs {error.name}, which is not installed. "
            "Run: pip install 'dp-flash-attention[data]'"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}). Convert it to UTF-8.") from error


def _read_csv(path: Path) -> pd.DataFrame:
    import csv

    import pandas as pd

    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        kept, bad = [], []
        for row in rows:
            if row and len(row) != len(header):
                bad.append(rows.line_num)
            elif row:
                kept.append(row)
    _refuse_bad_lines(path, bad, f"the header has {len(header)} columns and they have another number")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has columns named {repeated} twice. Rename one of each.")
    return pd.DataFrame(kept, columns=header, dtype=object)


def _read_jsonl(path: Path) -> pd.DataFrame:
    import json

    import pandas as pd

    records, bad = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            bad.append(number)
    _refuse_bad_lines(path, bad, "they are not JSON objects")
    return pd.DataFrame(records, dtype=object)


def _read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa

    try:
        return pd.read_parquet(path).astype(object)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is not a parquet file ({str(error).splitlines()[0]}). Check the file."
        ) from error


def _refuse_bad_lines(path: Path, lines: Sequence[int], why: str) -> None:
    if lines:
        shown = ", ".join(map(str, lines[:_SHOWN_LINES])) + (", ..." if len(lines) > _SHOWN_LINES else "")
        raise DataError(
            f"{len(lines)} rows of {path} do not parse: {why} (lines {shown}). Correct or remove them."
        )


def _check_column(path: Path, name: str, columns: Sequence[str]) -> None:
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"It has: {', '.join(columns)}."
        raise DataError(f"{path} has no column '{name}'. {hint}")


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and value.strip() in MISSING_TEXTS)


def _text(value: Any) -> str:
    # A class is the same in every kind of file: 1, 1.0 and "1" are one.
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value).strip()


def _label_texts(path: Path, column: pd.Series) -> list[str]:
    rows = [index + 1 for index, value in enumerate(column) if _is_missing(value)]
    if rows:
        shown = ", ".join(map(str, rows[:_SHOWN_LINES]))
        raise DataError(
            f"{len(rows)} records of {path} have no '{column.name}' (records {shown}), but each needs a label. "
            "Fill or remove them."
        )
    texts = [_text(value) for value in column]
    distinct = len(set(texts))
    if distinct < 2:
        raise DataError(
            f"All labels in column '{column.name}' of {path} are {texts[0]!r}, but there must be at least two "
            "classes. Choose another label."
        )
    if distinct > MAX_CLASSES:
        raise DataError(
            f"Column '{column.name}' of {path} has {distinct} different values, but a label has at most "
            f"{MAX_CLASSES} classes. Choose another label, or group its values."
        )
    return texts


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
    return all(_is_missing(value) or _number(value) is not None for value in column)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _values(path: Path, column: pd.Series, field: Field) -> Any:
    if isinstance(field, CategoricalField):
        return np.array([None if _is_missing(value) else _text(value) for value in column], dtype=object)
    numbers = [np.nan if _is_missing(value) else _number(value) for value in column]
    bad = [index + 1 for index, number in enumerate(numbers) if number is None]
    if bad:
        shown = ", ".join(map(str, bad[:_SHOWN_LINES]))
        raise DataError(
            f"{len(bad)} records of {path} hold no number in the numeric column '{field.name}' (records {shown}). "
            "Correct them, or call the column categorical in the schema."
        )
    return np.array(numbers, dtype=np.float64)
