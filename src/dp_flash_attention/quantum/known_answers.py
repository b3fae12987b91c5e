"""Known answers that lie in ``checks`` as JSON, and the row that says how many of them came out."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from dp_flash_attention.quantum.evidence import Evidence


def read_vectors(name: str) -> Any:
    """Returns what the file ``name`` of ``quantum.checks`` holds."""
    folder = files("dp_flash_attention.quantum.checks")
    return json.loads(folder.joinpath(name).read_text(encoding="utf-8"))


def from_base64(text: str) -> bytes:
    """Returns the bytes that a vector spells."""
    return base64.b64decode(text)


def sha3_256(data: bytes) -> str:
    """Returns the digest by which a vector names a long answer."""
    return hashlib.sha3_256(data).hexdigest()


def counted(name: str, claim: str, good: int, total: int) -> Evidence:
    """Returns the row of ``total`` cases, which holds if all are good and there is one at all."""
    return Evidence(
        name=name,
        claim=claim,
        measured=f"{good} of {total} cases",
        bound=f"{total} of {total}, at least 1",
        holds=good == total >= 1,
        basis="computed",
    )
