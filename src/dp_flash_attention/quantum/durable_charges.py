"""A charge book in a file: it survives restarts, crashes and power failures, and several processes share it.

One SQLite file in WAL mode with ``synchronous=FULL``, written in two steps for each new query, each a transaction that is on
the disk before the caller goes on:

    charge   the price joins the sums if both stay within their limits, and the query is paid for
    bind     a keyed digest of the answer joins the query, before the answer is released

A crash before the first step spends nothing and releases nothing. A crash after it has spent and released nothing: the query
is then answered for nothing, for the first time. A crash after the second may have released, and only that same answer
can be released again. No order of events releases what was not paid for, and nothing refunds.
"""

from __future__ import annotations

import hmac
import os
import secrets
import sqlite3
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dp_flash_attention.core.durable import sync_directory, write_new_file
from dp_flash_attention.core.errors import BudgetExhaustedError, InvalidInputError, RunStateError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.noise import NoiseKey
from dp_flash_attention.quantum.charges import (
    DISTANCE_UNITS,
    MICRO,
    Prices,
    checked_relation,
    never_charged,
)
from dp_flash_attention.quantum.prf import keyed_shake256

_APPLICATION_ID = 0x64706662  # "dpfb"
_SCHEMA_VERSION = 1
_WAIT_S = 60.0
_MAX_EPSILON = 500.0
_FINGERPRINT_BYTES = 32
_NAME = "charge book file"
_SCHEMA = f"""
    CREATE TABLE book (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        fingerprint BLOB NOT NULL,
        epsilon REAL NOT NULL,
        delta REAL NOT NULL,
        limit_micro_rho INTEGER NOT NULL,
        micro_rho INTEGER NOT NULL CHECK (typeof(micro_rho) = 'integer' AND micro_rho BETWEEN 0 AND limit_micro_rho),
        distance INTEGER NOT NULL CHECK (typeof(distance) = 'integer' AND distance BETWEEN 0 AND {DISTANCE_UNITS}),
        relation TEXT
    );
    CREATE TABLE paid (
        query BLOB PRIMARY KEY NOT NULL,
        micro_rho INTEGER NOT NULL CHECK (typeof(micro_rho) = 'integer' AND micro_rho > 0),
        distance INTEGER NOT NULL CHECK (typeof(distance) = 'integer' AND distance >= 0),
        answer BLOB
    ) WITHOUT ROWID;
"""


class DurableChargeBook:
    """An (ε, δ) for everything released about one data set, in a file. Make one with ``create``, go on with ``open``.

    Guarantees:
        * Neighbouring relation, unit, sensitivity, theorem, source: those of ``ConcentratedBudget``.
        * Public: every price. The file shows how many queries were paid for and what they cost; queries and answers are in
          it as digests by the memo key only.
        * Processes and threads that share the file never spend more than the total together: the sums are whole
          numbers that one conditional statement raises.
        * A charge is on the disk before the data are looked at, and an answer's digest before it is released.
        * A book belongs to one memo key and one total; with another key, or changed, it is refused.

    The file must be the only book of its data. A copy, or a backup that is restored, would refund what was spent since.
    """

    assumption = "The charge book's file is the only one for these data and is never replaced by an older copy of itself."

    def __init__(self, path: Path, *, key: NoiseKey) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._inherited: list[sqlite3.Connection] = []
        self._process = os.getpid()
        self._connection = _connected(path)
        try:
            with self._reading() as connection:
                self.total = _checked_total(connection, path, key)
                self._prices = Prices(self.total)
                _check_sums(connection, path, self._prices)
        except BaseException:
            self._connection.close()
            raise

    @classmethod
    def create(cls, path: Path, *, key: NoiseKey, total: PrivacyBudget) -> DurableChargeBook:
        """Makes a book of ``total`` for the answers that ``key`` gives. Never overwrites.

        Args:
            path: A local file; network file systems often lack the locks.
            key: The memo key.
            total: What everything released about the data may cost, in all processes and for all time.

        Raises:
            FileExistsError: If ``path`` exists: a second book would be a second budget.
            InvalidInputError: If ε is above 500.
            RunStateError: If the file cannot be written.
        """
        if total.epsilon > _MAX_EPSILON:
            raise InvalidInputError(
                "epsilon",
                total.epsilon,
                bound=f"at most {_MAX_EPSILON:g}",
                remedy="Common values lie below 20.",
            )
        write_new_file(path, b"", mode=0o600)
        connection = _connected(path, fresh=True)
        try:
            with _explained(path):
                connection.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA.split(";")[:-1]:
                    connection.execute(statement)
                connection.execute(
                    "INSERT INTO book VALUES (1, ?, ?, ?, ?, 0, 0, NULL)",
                    (
                        _fingerprint(key, total),
                        total.epsilon,
                        total.delta,
                        Prices(total).limit_micro_rho,
                    ),
                )
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                connection.execute("COMMIT")
        finally:
            connection.close()
        sync_directory(path.parent)
        return cls(path, key=key)

    @classmethod
    def open(cls, path: Path, *, key: NoiseKey) -> DurableChargeBook:
        """Returns the book that ``create`` made, with everything that was spent.

        Raises:
            FileNotFoundError: If there is none. A new one would have the whole budget again, so none is made.
            InvalidInputError: If the file is no charge book, is damaged, belongs to another key, is a link, or can be
                written by other users.
            RunStateError: If it cannot be read.
        """
        return cls(path, key=key)

    @property
    def spent_rho(self) -> float:
        """Σρ so far, by all processes."""
        with self._lock, self._reading() as connection:
            return int(connection.execute("SELECT micro_rho FROM book").fetchone()[0]) / MICRO

    @property
    def limit_rho(self) -> float:
        """The largest Σρ that keeps to the total."""
        return self._prices.limit_micro_rho / MICRO

    def charge(
        self,
        *,
        rho: float,
        distance: float,
        query: bytes | None = None,
        relation: NeighboringRelation | None = None,
    ) -> None:
        """Books one release durably, or refuses it and books nothing; a query that was booked before costs nothing.

        Raises:
            BudgetExhaustedError: If Σρ or Σdistance would exceed what the total allows.
            InvalidInputError: If ``rho`` is not a finite number above 0, ``distance`` is negative or none, or the relation
                is another than before.
            RunStateError: If the file cannot be written. Nothing may be released then.
        """
        price = self._prices.price(rho=rho, distance=distance)
        paid_for = secrets.token_bytes(_FINGERPRINT_BYTES) if query is None else query
        with self._lock, self._writing() as connection:
            if connection.execute("SELECT 1 FROM paid WHERE query = ?", (paid_for,)).fetchone():
                return
            micro_rho, units, before = connection.execute(
                "SELECT micro_rho, distance, relation FROM book"
            ).fetchone()
            known = checked_relation(relation, before)
            refused = self._prices.refusal(price, spent_micro_rho=micro_rho, spent_distance=units)
            if refused is not None:
                raise refused
            # The condition repeats what was just found, so that no mistake above can overspend.
            raised = connection.execute(
                "UPDATE book SET micro_rho = micro_rho + :rho, distance = distance + :units, relation = :relation "
                "WHERE micro_rho + :rho <= limit_micro_rho AND distance + :units <= :all_units",
                {
                    "rho": price.micro_rho,
                    "units": price.distance,
                    "relation": known,
                    "all_units": DISTANCE_UNITS,
                },
            )
            if raised.rowcount != 1:
                raise BudgetExhaustedError(
                    f"The charge book {str(self._path)!r} has less left than this query costs. Stop; nothing was computed or "
                    "spent."
                )
            connection.execute(
                "INSERT INTO paid VALUES (?, ?, ?, NULL)", (paid_for, price.micro_rho, price.distance)
            )

    def bind(self, *, query: bytes, answer: bytes) -> bool:
        """Records durably what a booked query is answered with; see ``ChargeBook``.

        Raises:
            InvalidInputError: If ``query`` was never charged.
            RunStateError: If the file cannot be written. Nothing may be released then.
        """
        with self._lock, self._writing() as connection:
            row = connection.execute("SELECT answer FROM paid WHERE query = ?", (query,)).fetchone()
            if row is None:
                raise never_charged()
            if row[0] is None:
                connection.execute("UPDATE paid SET answer = ? WHERE query = ?", (answer, query))
                return True
            return hmac.compare_digest(row[0], answer)

    def close(self) -> None:
        """Closes the file. Everything is in it already."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        connection = self._own_connection()
        with _explained(self._path):
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _own_connection(self) -> sqlite3.Connection:
        # SQLite's connections do not survive a fork. The parent's is kept, for closing it would drop the parent's locks.
        if os.getpid() != self._process:
            self._inherited.append(self._connection)
            self._connection = _connected(self._path)
            self._process = os.getpid()
        return self._connection


def _connected(path: Path, *, fresh: bool = False) -> sqlite3.Connection:
    # By name and not by descriptor: closing a second descriptor of the file would drop the locks of the first.
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        raise _unusable(path, "a regular file and no link")
    if os.name == "posix" and mode & 0o022:
        raise InvalidInputError(
            _NAME, str(path), bound="writable by its owner alone", remedy=f"Run: chmod 600 {path}"
        )
    with _explained(path):
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=_WAIT_S,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            if not fresh:
                found = [
                    connection.execute(f"PRAGMA {what}").fetchone()[0]
                    for what in ("application_id", "user_version")
                ]
                if found != [_APPLICATION_ID, _SCHEMA_VERSION]:
                    raise _unusable(path, "a charge book of this version")
            if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise RunStateError(
                    f"The file system of {str(path)!r} has no write-ahead log, but a charge book needs one. "
                    "Put it on a local disk."
                )
            for setting in ("synchronous = FULL", "fullfsync = 1", "trusted_schema = OFF"):
                connection.execute(f"PRAGMA {setting}")
        except BaseException:
            connection.close()
            raise
    return connection


def _checked_total(connection: sqlite3.Connection, path: Path, key: NoiseKey) -> PrivacyBudget:
    if connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
        raise _unusable(path, "undamaged")
    row = connection.execute("SELECT epsilon, delta, fingerprint FROM book").fetchone()
    if row is None:
        raise _unusable(path, "a book with a budget")
    try:
        total, fingerprint = PrivacyBudget(epsilon=row[0], delta=row[1]), bytes(row[2])
    except (InvalidInputError, TypeError) as error:
        raise _unusable(path, "a book with a budget") from error
    if not hmac.compare_digest(_fingerprint(key, total), fingerprint):
        raise InvalidInputError(
            _NAME,
            str(path),
            bound="the book of this memo key, with the total it was made with",
            remedy="Load the memo key it was made with.",
        )
    return total


def _check_sums(connection: sqlite3.Connection, path: Path, prices: Prices) -> None:
    stated = connection.execute("SELECT micro_rho, distance, limit_micro_rho FROM book").fetchone()
    rows = connection.execute("SELECT micro_rho, distance FROM paid").fetchall()
    found = (sum(row[0] for row in rows), sum(row[1] for row in rows), prices.limit_micro_rho)
    if found != tuple(stated):
        raise _unusable(path, "a book whose prices add up to what it says was spent")


def _fingerprint(key: NoiseKey, total: PrivacyBudget) -> bytes:
    return keyed_shake256(
        key.derive("quantum.durable_charges").export(),
        struct.pack(">dd", total.epsilon, total.delta),
        domain=b"dpfa.charges.fingerprint.v1",
        num_bytes=_FINGERPRINT_BYTES,
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Says in one line what SQLite's errors mean here."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise RunStateError(
            f"The charge book {str(path)!r} cannot be used ({error}), so nothing was released. Free the disk, end the "
            "process that holds it, or restore the file."
        ) from error
    except sqlite3.DatabaseError as error:
        raise _unusable(path, f"an undamaged charge book ({error})") from error


def _unusable(path: Path, bound: str) -> InvalidInputError:
    return InvalidInputError(
        _NAME,
        str(path),
        bound=bound,
        remedy="A new book would have the whole budget again: make one only if nothing was ever released.",
    )
