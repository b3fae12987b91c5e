"""Trust and rotation: whose signatures count, and how one key hands over to the next.

A trust file lists verifying keys with a name and a state: ``active`` keys may appoint a successor, ``retired`` ones
are kept so that what they signed still verifies, ``revoked`` ones verify nothing. A succession is signed by the old
key and by the new one: the old key's holder wants it, and the new key's holder has it.

There is no trusted clock. A retired key that leaks later can sign with an earlier date; revoke it then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from dp_flash_attention.core.durable import write_atomically
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.documents import (
    canonical,
    from_text,
    now,
    read_bytes,
    read_document,
    to_text,
    write_document,
)
from dp_flash_attention.crypto.errors import AuthenticationError, KeyFileError
from dp_flash_attention.crypto.keys import SigningKey, VerifyingKey

TRUST_KIND = "dpfa-trust"
SUCCESSION_KIND = "dpfa-succession"
_CONTEXT = b"dpfa.succession.v1"
_SUCCESSION_FIELDS = frozenset({"old", "new", "created", "old_signature", "new_signature"})


class KeyState(StrEnum):
    """What a trusted key may still do."""

    ACTIVE = "active"
    RETIRED = "retired"
    REVOKED = "revoked"


@dataclass(frozen=True, kw_only=True)
class TrustedKey:
    """A key in a trust file.

    Attributes:
        key: The key.
        name: Who holds it, in the words of the file's owner.
        state: What it may do.
        successor: Id of the key that took over, if one did.
        added: When it came into the file.
    """

    key: VerifyingKey
    name: str
    state: KeyState
    successor: str | None
    added: str


def make_succession(old: SigningKey, new: SigningKey) -> bytes:
    """Returns the statement by which an old key hands over to a new one.

    Raises:
        InvalidInputError: If both are the same key.
    """
    if old.key_id == new.key_id:
        raise InvalidInputError(
            "new key", new.key_id, bound="another key than the old one", remedy="Generate it."
        )
    body = {"old": _described(old.public), "new": _described(new.public), "created": now()}
    signed = canonical(body)
    signatures = {
        "old_signature": to_text(old.sign(signed, context=_CONTEXT)),
        "new_signature": to_text(new.sign(signed, context=_CONTEXT)),
    }
    return write_document({**body, **signatures}, kind=SUCCESSION_KIND)


class TrustFile:
    """The keys of a trust file. Changes are kept with ``write``.

    Args:
        keys: The keys, by their ids.
    """

    def __init__(self, keys: Mapping[str, TrustedKey] | None = None) -> None:
        self._keys = dict({} if keys is None else keys)

    @classmethod
    def read(cls, path: Path) -> TrustFile:
        """Reads what ``write`` wrote.

        Raises:
            KeyFileError: If the file is missing, foreign or damaged.
        """
        stored = read_document(read_bytes(path), kind=TRUST_KIND, fields=frozenset({"keys"}), where=path)[
            "keys"
        ]
        try:
            return cls({entry["key"]["key_id"]: _entry(entry, path) for entry in stored})
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, KeyFileError):
                raise
            raise KeyFileError(f"{path} is damaged ({error}). Restore it from a copy.") from error

    def write(self, path: Path) -> None:
        """Replaces the file, durably: a crash leaves the old one or the new one.

        Raises:
            OSError: If the file system refuses.
        """
        keys = [{**asdict(entry), "key": _described(entry.key)} for entry in self._keys.values()]
        write_atomically(path, write_document({"keys": keys}, kind=TRUST_KIND))

    @property
    def keys(self) -> tuple[TrustedKey, ...]:
        """All keys, in the order in which they came."""
        return tuple(self._keys.values())

    def add(self, key: VerifyingKey, *, name: str) -> None:
        """Trusts a key from now on.

        Raises:
            InvalidInputError: If the file has it already, in whatever state.
        """
        if key.key_id in self._keys:
            raise InvalidInputError(
                "key",
                key.key_id,
                bound=f"a new one, but it is {self._keys[key.key_id].state} here",
                remedy="Nothing was changed.",
            )
        self._keys[key.key_id] = TrustedKey(
            key=key, name=name, state=KeyState.ACTIVE, successor=None, added=now()
        )

    def revoke(self, key_id: str) -> None:
        """Lets a key verify nothing from now on. Keys that it appointed stay; revoke them too if need be.

        Raises:
            InvalidInputError: If the file does not have it.
        """
        if key_id not in self._keys:
            raise InvalidInputError(
                "key", key_id, bound="in the trust file", remedy="Pass the whole id, 32 digits."
            )
        self._keys[key_id] = replace(self._keys[key_id], state=KeyState.REVOKED)

    def succeed(self, statement: bytes, *, where: Path) -> TrustedKey:
        """Takes up a succession: the old key retires, the new one is active under the same name.

        Raises:
            KeyFileError: If the statement is foreign or damaged.
            AuthenticationError: If the old key is unknown or may appoint nobody, if the new one is known
                already, or if a signature is not good.
        """
        fields = read_document(statement, kind=SUCCESSION_KIND, fields=_SUCCESSION_FIELDS, where=where)
        old, new = _key(fields["old"], where), _key(fields["new"], where)
        entry = self._keys.get(old.key_id)
        if entry is None or entry.key != old:
            raise AuthenticationError(
                f"{where} is signed by {old.key_id}, which is not in the trust file. Nothing was changed."
            )
        if entry.state is not KeyState.ACTIVE or new.key_id in self._keys:
            raise AuthenticationError(
                f"{where} appoints {new.key_id} in place of {old.key_id}, but that one is {entry.state} or the new "
                "one is known already. Nothing was changed."
            )
        signed = canonical({name: fields[name] for name in ("old", "new", "created")})
        old.verify(signed, from_text(fields["old_signature"], where=where), context=_CONTEXT)
        new.verify(signed, from_text(fields["new_signature"], where=where), context=_CONTEXT)
        self._keys[old.key_id] = replace(entry, state=KeyState.RETIRED, successor=new.key_id)
        self.add(new, name=entry.name)
        return self._keys[new.key_id]

    def find(self, key_id: str) -> TrustedKey:
        """Returns a key whose signatures count.

        Raises:
            AuthenticationError: If it is unknown or revoked.
        """
        entry = self._keys.get(key_id)
        if entry is None:
            raise AuthenticationError(
                f"it is signed by {key_id}, a key that is not trusted. Ask who holds it."
            )
        if entry.state is KeyState.REVOKED:
            raise AuthenticationError(f"it is signed by {key_id} ({entry.name}), a key that was revoked.")
        return entry


def _described(key: VerifyingKey) -> dict[str, str]:
    return {"algorithm": key.algorithm, "key_id": key.key_id, "public_key": to_text(key.public)}


def _key(described: Mapping[str, Any], where: Path) -> VerifyingKey:
    try:
        key = VerifyingKey(
            algorithm=described["algorithm"], public=from_text(described["public_key"], where=where)
        )
        if set(described) == {"algorithm", "key_id", "public_key"} and key.key_id == described["key_id"]:
            return key
    except (InvalidInputError, KeyError, TypeError):
        pass
    raise KeyFileError(f"{where} is damaged: a key in it is not whole. Restore it from a copy.")


def _entry(stored: Mapping[str, Any], where: Path) -> TrustedKey:
    return TrustedKey(
        key=_key(stored["key"], where),
        name=str(stored["name"]),
        state=KeyState(stored["state"]),
        successor=stored["successor"],
        added=str(stored["added"]),
    )
