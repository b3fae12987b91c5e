import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_flash_attention.crypto import KeyFileError
from dp_flash_attention.crypto.documents import (
    canonical,
    from_text,
    parse,
    read_bytes,
    read_document,
    to_text,
    write_document,
)

WHERE = Path("some.file")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Surrogates have no UTF-8 form.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(JSON)
def test_the_canonical_form_is_a_fixed_point(value):
    form = canonical(value)
    assert canonical(parse(form)) == form


@given(JSON)
def test_layout_and_order_do_not_matter(value):
    text = json.dumps(value, indent=3, ensure_ascii=True, sort_keys=False).encode()
    assert canonical(parse(text)) == canonical(value)


@given(JSON, JSON)
def test_different_values_have_different_forms(first, second):
    # By JSON's own text, which tells 1 from 1.0 and 0.0 from -0.0.
    if json.dumps(first, sort_keys=True) != json.dumps(second, sort_keys=True):
        assert canonical(first) != canonical(second)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"a": 1} x',
        b"",
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_what_has_no_canonical_form_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 - which one is the caller's to say
        parse(text)


def read(data, kind="kind", fields=("a",)):
    return read_document(data, kind=kind, fields=frozenset(fields), where=WHERE)


def test_a_document_reads_back():
    assert read(write_document({"a": [1, "ε"]}, kind="kind")) == {"a": [1, "ε"]}


@settings(max_examples=200)
@given(st.data())
def test_any_altered_byte_is_noticed(data):
    document = bytearray(write_document({"a": {"b": [1, 2.5, "text"]}}, kind="kind"))
    document[data.draw(st.integers(0, len(document) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(KeyFileError):
        read(bytes(document))


def test_a_new_layout_of_the_same_values_is_noticed():
    document = write_document({"a": 1}, kind="kind")
    for altered in (json.dumps(json.loads(document)).encode(), document + b"\n", document[:-1]):
        with pytest.raises(KeyFileError, match="damaged"):
            read(altered)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a kind file"),
        (b"\x89PNG", "not a kind file"),
        (b"[1]", "not a kind file"),
        (b'{"a": 1}', "not a kind file"),
        (write_document({"a": 1}, kind="other"), "is a other file, but a kind file"),
        (write_document({"b": 1}, kind="kind"), "damaged"),
        (write_document({"a": 1, "b": 1}, kind="kind"), "damaged"),
        (write_document({"a": 1}, kind="kind").replace(b'"version": 1', b'"version": 2'), "version 2"),
    ],
)
def test_foreign_documents_are_told_from_damaged_ones(data, words):
    with pytest.raises(KeyFileError, match=words) as caught:
        read(data)
    assert str(caught.value).startswith("some.file")


def test_base64_is_strict():
    assert from_text(to_text(b"abc"), where=WHERE) == b"abc"
    for text in ("YWJj\n", "YWJ", "YW Jj", "YWJj====", "YWK=", None, 3):
        with pytest.raises(KeyFileError, match="base64"):
            from_text(text, where=WHERE)


def test_files_that_cannot_be_documents_are_refused(tmp_path):
    with pytest.raises(KeyFileError, match="cannot be read"):
        read_bytes(tmp_path / "missing")
    with pytest.raises(KeyFileError, match="cannot be read"):
        read_bytes(tmp_path)
    large = tmp_path / "large"
    large.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(KeyFileError, match="more than 1048576 bytes"):
        read_bytes(large)
