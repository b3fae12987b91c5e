"""Texts as data sets: one record is one text, cut to a public length and padded to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dp_flash_attention.core.errors import DataError
from dp_flash_attention.training.data.files import check_column, is_missing, label_texts, read_frame
from dp_flash_attention.training.losses import IGNORE_INDEX

if TYPE_CHECKING:
    import pandas as pd

_DEFAULT_COLUMN = "text"


class Tokenizer(Protocol):
    """Turns texts into token ids by a public rule that no record influences."""

    @property
    def vocab_size(self) -> int:
        """Number of different ids."""

    @property
    def pad_id(self) -> int:
        """Id that fills up short texts."""

    def encode(self, text: str, max_length: int) -> list[int]:
        """Returns between 1 and ``max_length`` ids."""


class ByteTokenizer:
    """The bytes of the text's UTF-8 form as ids 3 to 258, between a begin and an end token.

    Nothing is learnt, so nothing is leaked: a vocabulary fitted to private texts would itself be a release.
    """

    vocab_size = 259
    pad_id = 0
    _BEGIN, _END, _FIRST_BYTE = 1, 2, 3

    def encode(self, text: str, max_length: int) -> list[int]:
        """Returns begin, bytes and end, cut to ``max_length``."""
        # A character is at least one byte, so no more of a long text can count.
        data = text[:max_length].encode()
        return [self._BEGIN, *(byte + self._FIRST_BYTE for byte in data), self._END][:max_length]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids without special tokens; broken characters are replaced."""
        data = bytes(token - self._FIRST_BYTE for token in ids if token >= self._FIRST_BYTE)
        return data.decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts as they stand in a file.

    Attributes:
        texts: One for each record.
        classes: Names of the classes, sorted; empty without labels.
        labels: Class index of each record; empty without labels.
    """

    texts: Sequence[str]
    classes: tuple[str, ...] = ()
    labels: Sequence[int] = ()


class TextDataset:
    """Encoded texts in memory, four bytes for each token.

    Args:
        texts: The records.
        tokenizer: A public tokenizer.
        max_length: T; public. Longer texts are cut, so a record is one row whatever its length.
    """

    def __init__(self, texts: Texts, tokenizer: Tokenizer, *, max_length: int) -> None:
        self.max_length = max_length
        self._ids = torch.full((len(texts.texts), max_length), tokenizer.pad_id, dtype=torch.int32)
        self._lengths = torch.zeros(len(texts.texts), dtype=torch.int64)
        for row, text in enumerate(texts.texts):
            ids = tokenizer.encode(text, max_length)
            self._ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self._lengths[row] = len(ids)
        self._labels = torch.tensor(texts.labels, dtype=torch.int64) if texts.classes else None

    def __len__(self) -> int:
        """Returns N, the number of records, which is private under add-or-remove."""
        return len(self._ids)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Returns the records at ``indices``, shape [B].

        Returns:
            ``input_ids`` and ``attention_mask`` [B, T] long; ``label`` [B] long with classes, otherwise
            ``labels`` [B, T] long, the ids with ``IGNORE_INDEX`` on padding.
        """
        ids_BT = self._ids[indices].long()
        mask_BT = (torch.arange(self.max_length) < self._lengths[indices].unsqueeze(1)).long()
        row = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if self._labels is not None:
            return row | {"label": self._labels[indices]}
        return row | {"labels": ids_BT.masked_fill(mask_BT == 0, IGNORE_INDEX)}


def read_texts(path: Path | str, *, text: str | None = None, label: str | None = None) -> Texts:
    """Reads texts.

    Args:
        path: A .txt file, where each line that is not blank is one record, or a table (see ``read_table``).
        text: The table's column of texts; None takes the one named "text", or the only one.
        label: The table's column of classes; None reads no labels.

    Raises:
        DataError: If the file cannot be used: missing, empty, not UTF-8, does not parse, a column is missing, a
            record has no text or no label, or the labels are not classes.
        DependencyMissingError: If pandas or pyarrow is not installed.
    """
    path = Path(path)
    if path.suffix == ".txt":
        for name, value in (("text", text), ("label", label)):
            if value is not None:
                raise DataError(
                    f"{path} has no columns, but --{name} names one ('{value}'). Leave it out, or use a table."
                )
        return Texts(texts=_lines(path))
    frame = read_frame(path)
    columns = [str(column) for column in frame.columns]
    if label is not None:
        check_column(path, label, columns)
    column = _text_column(path, columns, text, label)
    texts = _texts(path, frame[column])
    if label is None:
        return Texts(texts=texts)
    names = label_texts(path, frame[label])
    classes = tuple(sorted(set(names)))
    number = {name: index for index, name in enumerate(classes)}
    return Texts(texts=texts, classes=classes, labels=[number[name] for name in names])


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path} is not a file. Check the path.")
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}). Convert it to UTF-8.") from error
    if not lines:
        raise DataError(f"{path} is empty, but at least one line is needed. Check the file.")
    return lines


def _text_column(path: Path, columns: list[str], text: str | None, label: str | None) -> str:
    if text is not None:
        check_column(path, text, columns)
        if text == label:
            raise DataError(f"Column '{text}' of {path} cannot be both texts and labels. Choose another.")
        return text
    others = [column for column in columns if column != label]
    if _DEFAULT_COLUMN in others:
        return _DEFAULT_COLUMN
    if len(others) != 1:
        raise DataError(
            f"{path} has the columns {', '.join(columns)}, but which of them holds the texts is not said. Add --text COLUMN, "
            "or --label COLUMN to predict a column from the others."
        )
    return others[0]


def _texts(path: Path, column: pd.Series) -> list[str]:
    bad = [index + 1 for index, value in enumerate(column) if is_missing(value) or not isinstance(value, str)]
    if bad:
        shown = ", ".join(map(str, bad[:5]))
        raise DataError(
            f"{len(bad)} records of {path} hold no text in '{column.name}' (records {shown}). Fill or remove them."
        )
    return [str(value) for value in column]
