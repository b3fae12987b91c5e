"""Texts: a public tokenizer, a public length, and every way in which a file can be wrong."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.core.errors import DataError
from dp_flash_attention.training.data.texts import ByteTokenizer, TextDataset, Texts, read_texts
from dp_flash_attention.training.losses import IGNORE_INDEX


@given(st.text(max_size=40))
def test_bytes_come_back_as_the_text(text):
    ids = ByteTokenizer().encode(text, max_length=200)
    assert ids[0] == 1
    assert ids[-1] == 2
    assert all(0 <= token < ByteTokenizer.vocab_size for token in ids)
    assert ByteTokenizer().decode(ids) == text


@given(st.text(max_size=40), st.integers(min_value=1, max_value=30))
def test_a_long_text_is_cut_and_nothing_else_changes(text, max_length):
    whole = ByteTokenizer().encode(text, max_length=1000)
    assert ByteTokenizer().encode(text, max_length=max_length) == whole[:max_length]


def test_rows_are_padded_and_padding_carries_no_loss():
    dataset = TextDataset(Texts(texts=["abc", "a" * 50]), ByteTokenizer(), max_length=8)
    rows = dataset.take(torch.tensor([0, 1]))
    assert rows["input_ids"].tolist() == [[1, 100, 101, 102, 2, 0, 0, 0], [1] + 7 * [100]]
    assert rows["attention_mask"].sum(dim=1).tolist() == [5, 8]
    assert rows["labels"][0].tolist() == [1, 100, 101, 102, 2, *[IGNORE_INDEX] * 3]
    assert "label" not in rows


def test_a_record_is_encoded_alike_in_any_company():
    texts = ["one", "two and more", "3"]
    alone = [TextDataset(Texts(texts=[text]), ByteTokenizer(), max_length=6) for text in texts]
    together = TextDataset(Texts(texts=texts), ByteTokenizer(), max_length=6)
    for row, dataset in enumerate(alone):
        for name, value in dataset.take(torch.tensor([0])).items():
            assert torch.equal(value, together.take(torch.tensor([row]))[name])


def test_labels_become_class_indices(small_texts):
    texts = read_texts(small_texts, label="mood")
    assert texts.classes == ("down", "up")
    rows = [json.loads(line) for line in small_texts.read_text().splitlines()]
    assert list(texts.labels) == [["down", "up"].index(row["mood"]) for row in rows]
    assert list(texts.texts) == [row["text"] for row in rows]
    taken = TextDataset(texts, ByteTokenizer(), max_length=8).take(torch.arange(5))
    assert taken["label"].tolist() == list(texts.labels[:5])
    assert "labels" not in taken


def test_a_line_of_a_text_file_is_a_record(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("first\n\n   \nsecond line\r\nthird", encoding="utf-8-sig")
    assert list(read_texts(path).texts) == ["first", "second line", "third"]


def test_the_column_of_texts_is_found_by_its_name_or_because_it_is_the_only_one(tmp_path):
    named, only = tmp_path / "named.csv", tmp_path / "only.csv"
    named.write_text("id,text\n1,hello\n")
    only.write_text("review,stars\ngood,5\nbad,1\n")
    assert list(read_texts(named).texts) == ["hello"]
    assert list(read_texts(only, label="stars").texts) == ["good", "bad"]


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("a.txt", "", {}, "empty"),
        ("a.txt", " \n \n", {}, "empty"),
        ("a.txt", "x", {"label": "kind"}, "no columns"),
        ("a.csv", "a,b\n1,2\n", {}, "Add --text COLUMN"),
        ("a.csv", "text,b\nx,2\n", {"text": "txt"}, "Did you mean 'text'"),
        ("a.csv", "text,mood\nx,up\ny,down\n", {"label": "mod"}, "Did you mean 'mood'"),
        ("a.csv", "text,mood\nx,up\ny,up\n", {"label": "mood"}, "at least two classes"),
        ("a.csv", "text\nx\n", {"label": "text"}, "Add --text COLUMN"),
        ("a.csv", "text\nx\n", {"label": "text", "text": "text"}, "both texts and labels"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n{"text": null}\n', {}, "2 records"),
        ("a.jsonl", '{"text": "x"}\nnot json\n', {}, "lines 2"),
        ("a.doc", "x", {}, "'.doc'"),
    ],
)
def test_what_cannot_be_used_is_an_error_of_one_line(tmp_path, name, content, options, said):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=said) as caught:
        read_texts(path, **options)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_broken_characters_are_named(tmp_path):
    with pytest.raises(DataError, match="not a file"):
        read_texts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_texts(tmp_path / "latin.txt")
