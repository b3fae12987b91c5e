"""One byte string for one query: the rules by which two queries are the same.

Every value is written as a tag, the length of what follows in 8 bytes, and the content:

    none   N   nothing                           text   T   UTF-8
    bool   B   00 or 01                          bytes  Y   as they are
    int    I   two's complement, shortest        list   L   the items' encodings (tuples too)
    float  F   IEEE 754 double, −0 as +0         dict   D   key, value, …, sorted by the keys' encodings

It is injective: tag and length say where each part ends, so different queries have different bytes (a list of two
texts is not one text, 1 is not 1.0 and not True). Types that carry more than their content (members of an enumeration,
named tuples, NumPy's scalars and other subclasses) are refused: two of them would share their bytes. Nothing is
normalised beyond that: "café" in two Unicode forms is two queries. Erring that way costs budget twice; erring the other
way would answer one query with another's noise.
"""

from __future__ import annotations

import math
import struct

from dp_flash_attention.core.errors import InvalidInputError

_MAX_DEPTH = 32
_PLAIN = (bool, int, float, str, bytes, list, tuple, dict)
_KINDS = "None, bool, int, float, str, bytes, list, tuple or dict with text keys"


def canonical_bytes(query: object) -> bytes:
    """Returns the encoding of ``query``.

    Raises:
        InvalidInputError: If it holds anything else, a NaN or infinity, or is nested deeper than 32.

    Example:
        >>> canonical_bytes(["a", "b"]) == canonical_bytes(("a", "b"))
        True
        >>> canonical_bytes({"a": 1, "b": 2}) == canonical_bytes({"b": 2, "a": 1})
        True
        >>> canonical_bytes(["ab"]) == canonical_bytes(["a", "b"])
        False
    """
    return _encode(query, _MAX_DEPTH)


def _encode(query: object, depth: int) -> bytes:
    if depth == 0:
        raise InvalidInputError("query", "nested", bound="at most 32 deep", remedy="Flatten it.")
    if query is not None and type(query) not in _PLAIN:
        raise InvalidInputError("query", type(query).__name__, bound=_KINDS, remedy="Convert it first.")
    match query:
        case None:
            return _tagged(b"N", b"")
        case bool():
            return _tagged(b"B", bytes([query]))
        case int():
            return _tagged(b"I", query.to_bytes(query.bit_length() // 8 + 1, "big", signed=True))
        case float():
            return _tagged(b"F", _double(query))
        case str():
            return _tagged(b"T", _utf8(query))
        case bytes():
            return _tagged(b"Y", query)
        case list() | tuple():
            return _tagged(b"L", b"".join(_encode(item, depth - 1) for item in query))
        case dict():
            if not all(isinstance(key, str) for key in query):
                raise InvalidInputError("query key", "not a text", bound="a text", remedy="Use text keys.")
            pairs = sorted((_encode(key, depth - 1), _encode(item, depth - 1)) for key, item in query.items())
            return _tagged(b"D", b"".join(key + item for key, item in pairs))
        case _:
            raise AssertionError("every plain type has its case")


def _tagged(tag: bytes, content: bytes) -> bytes:
    return tag + len(content).to_bytes(8, "big") + content


def _double(number: float) -> bytes:
    if not math.isfinite(number):
        raise InvalidInputError("query", number, bound="free of NaN and infinity", remedy="Use None instead.")
    return struct.pack(">d", number + 0.0)  # −0.0 + 0.0 is +0.0


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            "query", "text with a lone surrogate", bound="valid Unicode", remedy="Repair the text."
        ) from error
