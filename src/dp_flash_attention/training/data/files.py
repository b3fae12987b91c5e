"""Files of records: .csv, .jsonl and .parquet tables, with their columns and labels checked.

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

if TYPE_CHECKING:
    import pandas as pd

MAX_CLASSES = 100
"""A label with more different values is taken for a number or a name, not for a class."""

SHOWN_LINES = 5
"""Errors name this many lines of a file."""


# The csv module stops at 131,072 characters a cell; a record of text may well be longer.
_MAX_CELL_CHARACTERS = 2**31 - 1


def read_frame(path: Path) -> pd.DataFrame:
    """Reads a table of objects: texts as they stand in the file, numbers where its kind has them.

    Raises:
        DataError: If the file is missing, empty, of another kind, not UTF-8 or does not parse, or holds no
            records.
        DependencyMissingError: If pandas or pyarrow is not installed.
    """
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
        frame = kinds[path.suffix](path)
    except ImportError as error:
        raise DependencyMissingError(
            f"Reading {path.suffix} files needs {error.name}, which is not installed. "
            "Run: pip install 'dp-flash-attention[data]'"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}). Convert it to UTF-8.") from error
    if len(frame) == 0:
        raise DataError(f"{path} holds no records, but at least one is needed. Check the file.")
    return frame


def check_column(path: Path, name: str, columns: Sequence[str]) -> None:
    """Checks that a column is there.

    Raises:
        DataError: If not; the near name is suggested.
    """
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"It has: {', '.join(columns)}."
        raise DataError(f"{path} has no column '{name}'. {hint}")


def label_texts(path: Path, column: pd.Series) -> list[str]:
    """Returns the class of each record as a text.

    Raises:
        DataError: If a record has none, or there is one class or more than ``MAX_CLASSES``.
    """
    rows = [index + 1 for index, value in enumerate(column) if is_missing(value)]
    if rows:
        shown = ", ".join(map(str, rows[:SHOWN_LINES]))
        raise DataError(
            f"{len(rows)} records of {path} have no '{column.name}' (records {shown}), but each needs a label. "
            "Fill or remove them."
        )
    texts = [cell_text(value) for value in column]
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


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, or a text that stands for it."""
    return value is None or value != value or (isinstance(value, str) and value.strip() in MISSING_TEXTS)


def cell_text(value: Any) -> str:
    """Returns a cell as a text."""
    # A class is the same in every kind of file: 1, 1.0 and "1" are one.
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value).strip()


def _read_csv(path: Path) -> pd.DataFrame:
    import csv

    import pandas as pd

    kept, bad = [], []
    usual_limit = csv.field_size_limit(_MAX_CELL_CHARACTERS)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            for row in rows:
                if row and len(row) != len(header):
                    bad.append(rows.line_num)
                elif row:
                    kept.append(row)
    except csv.Error as error:
        raise DataError(f"{path} does not parse near line {rows.line_num}: {error}. Correct it.") from error
    finally:
        csv.field_size_limit(usual_limit)
    _refuse_bad_lines(path, bad, f"the header has {len(header)} columns and they have another number")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has columns named {repeated} twice. Rename one of each.")
    return pd.DataFrame(kept, columns=header, dtype=object)


def _read_jsonl(path: Path) -> pd.DataFrame:
    import json

    import pandas as pd

    records, bad = [], []
    # Not splitlines(): JSON texts may hold U+2028 and its like as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
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
        shown = ", ".join(map(str, lines[:SHOWN_LINES])) + (", ..." if len(lines) > SHOWN_LINES else "")
        raise DataError(
            f"{len(lines)} rows of {path} do not parse: {why} (lines {shown}). Correct or remove them."
        )
