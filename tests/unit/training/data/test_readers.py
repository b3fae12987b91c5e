"""Tables from files: three kinds, one result, and every way in which a file can be wrong."""

import json

import pandas as pd
import pytest
import torch

from dp_flash_attention.core.errors import DataError, InvalidInputError
from dp_flash_attention.training.data.readers import read_table
from dp_flash_attention.training.data.schema import CategoricalField, NumericField, SchemaOrigin, load_schema

ROWS = [
    {"age": 31, "town": "Ulm", "ill": "yes"},
    {"age": None, "town": "Bonn", "ill": "no"},
    {"age": 47.5, "town": None, "ill": "no"},
]


def write(path, rows=ROWS):
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def same(first, second):
    rows = torch.arange(len(first))
    return all(
        torch.equal(first.take(rows)[name], second.take(rows)[name]) for name in ("ids", "mix", "label")
    )


def test_the_kinds_of_file_hold_the_same_table(tmp_path):
    tables = [read_table(write(tmp_path / f"t.{kind}"), label="ill") for kind in ("csv", "jsonl", "parquet")]
    assert [len(table) for table in tables] == [3, 3, 3]
    assert all(same(tables[0], table) for table in tables[1:])
    schema = tables[0].schema
    assert [type(field) for field in schema.fields] == [NumericField, CategoricalField]
    assert schema.label.classes == ("no", "yes")
    assert schema.origin is SchemaOrigin.ASSUMED_PUBLIC
    assert tables[0].labels.tolist() == [1, 0, 0]


def test_a_label_of_numbers_is_the_same_in_every_kind(tmp_path):
    rows = [{"x": 1.0, "y": 0}, {"x": 2.0, "y": 1}]
    classes = {
        read_table(write(tmp_path / f"t.{kind}", rows), label="y").schema.label.classes
        for kind in ("csv", "jsonl", "parquet")
    }
    assert classes == {("0", "1")}


def test_a_schema_chooses_columns_and_keeps_its_classes(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(
        json.dumps(
            {
                "fields": [{"name": "town", "kind": "categorical", "categories": ["Ulm", "Bonn"]}],
                "label": {"name": "ill", "classes": ["yes", "no", "unknown"]},
            }
        )
    )
    table = read_table(write(tmp_path / "t.csv"), label="ill", schema=load_schema(path))
    assert table.labels.tolist() == [0, 1, 1]
    assert [field.name for field in table.schema.fields] == ["town"]


def test_a_marked_and_quoted_csv_is_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('x,y\n"1","a, b"\n\n2,"line\nbreak"\n', encoding="utf-8-sig")
    assert read_table(path, label="y").schema.label.classes == ("a, b", "line\nbreak")


@pytest.mark.parametrize(
    ("name", "content", "label", "said"),
    [
        ("t.csv", "", "y", "is empty"),
        ("t.csv", "x,y\n", "y", "no records"),
        ("t.csv", "\n\n", "y", "no records|no column"),
        ("t.csv", "x,y\n1,a\n2,b\n", "why", "no column 'why'"),
        ("t.csv", "x,years\n1,a\n2,b\n", "year", "Did you mean 'years'"),
        ("t.csv", "x,y\n1,a\n2\n3,b,c\n4,b\n", "y", r"2 rows of .* \(lines 3, 4\)"),
        ("t.csv", "x,y\n" + "1\n" * 9, "y", r"9 rows of .* \(lines 2, 3, 4, 5, 6, \.\.\.\)"),
        ("t.csv", "x,x,y\n1,2,a\n1,2,b\n", "y", r"columns named \['x'\] twice"),
        ("t.csv", "x,y\n1,a\n2,a\n", "y", "All labels .* are 'a'"),
        ("t.csv", "x,y\n1,a\n2,\n3,NA\n", "y", r"2 records of .* have no 'y' \(records 2, 3\)"),
        ("t.csv", "y\na\nb\n", "y", "no column besides"),
        ("t.csv", "x,y\n" + "".join(f"1,{k}\n" for k in range(150)), "y", "150 different values"),
        ("t.csv", "x,y\n1,a\0\n2,b\n", "y", ""),
        ("t.jsonl", '{"x": 1, "y": "a"}\n[1]\nnope\n', "y", r"2 rows of .* \(lines 2, 3\)"),
        ("t.jsonl", "{}\n{}\n", "y", "no column 'y'"),
        ("t.parquet", "not parquet", "y", "is not a parquet file"),
        ("t.xlsx", "x", "y", "'.xlsx'"),
        ("t", "x", "y", "kind ''"),
    ],
)
def test_what_cannot_be_used_is_an_error_of_one_line(tmp_path, name, content, label, said):
    path = tmp_path / name
    path.write_text(content)
    if said == "":  # a null byte is a character like any other
        assert len(read_table(path, label=label)) == 2
        return
    with pytest.raises(DataError, match=said) as caught:
        read_table(path, label=label)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(DataError, match="not a file"):
        read_table(tmp_path / "missing.csv", label="y")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="not a file"):
        read_table(tmp_path / "folder.csv", label="y")
    (tmp_path / "latin.csv").write_bytes("x,y\n1,größe\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_table(tmp_path / "latin.csv", label="y")


def test_a_cell_of_any_length_is_read(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("x,y\n" + "a" * 200_000 + ",p\nb,q\n")
    assert len(read_table(path, label="y")) == 2


def test_a_csv_file_that_breaks_off_inside_quotes_is_refused(tmp_path):
    path = tmp_path / "broken.csv"
    path.write_text('x,y\n1,p\n"2,q\n')
    with pytest.raises(DataError, match=r"do(es)? not parse"):
        read_table(path, label="y")


def test_a_json_text_may_hold_unicode_line_separators(tmp_path):
    path = tmp_path / "separators.jsonl"
    rows = [{"x": "a\u2028b", "y": "p"}, {"x": "c\x85", "y": "q"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert len(read_table(path, label="y")) == 2


def test_text_in_a_column_of_numbers_and_a_class_beyond_the_schema_are_named(tmp_path):
    path = tmp_path / "schema.json"
    content = {"fields": [{"name": "x", "kind": "numeric"}], "label": {"name": "y", "classes": ["a", "b"]}}
    path.write_text(json.dumps(content))
    (tmp_path / "t.csv").write_text("x,y\n1,a\nmany,b\n")
    with pytest.raises(DataError, match=r"1 records of .* no number .*'x' \(records 2\)"):
        read_table(tmp_path / "t.csv", label="y", schema=load_schema(path))
    (tmp_path / "u.csv").write_text("x,y\n1,a\n2,c\n")
    with pytest.raises(DataError, match=r"holds \['c'\]"):
        read_table(tmp_path / "u.csv", label="y", schema=load_schema(path))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"fields": [], "label": {"name": "y", "classes": ["a", "b"]}}',
        '{"fields": [{"name": "x", "kind": "odd"}], "label": {"name": "y", "classes": ["a", "b"]}}',
        '{"fields": [{"name": "x", "kind": "numeric", "knot": [1]}], "label": {"name": "y", "classes": ["a", "b"]}}',
        '{"fields": [{"name": "x", "kind": "numeric", "knots": [2, 1]}], "label": {"name": "y", "classes": ["a", "b"]}}',
        '{"fields": [{"name": "x", "kind": "numeric"}], "label": {"name": "x", "classes": ["a", "b"]}}',
        '{"fields": [{"name": "x", "kind": "numeric"}], "label": {"name": "y", "classes": ["a"]}}',
    ],
)
def test_a_wrong_schema_is_refused(tmp_path, content):
    path = tmp_path / "schema.json"
    path.write_text(content)
    with pytest.raises((DataError, InvalidInputError)):
        load_schema(path)
