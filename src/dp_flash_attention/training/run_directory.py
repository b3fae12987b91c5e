"""A run's directory: one process at a time, one state, secrets apart, nothing written over.

<out>/run.json       state, plan and settings of the run; public
<out>/.lock          held while a process works here
<out>/.secrets/      the run's key (see ``secrets``); gone when the run is finished
<out>/checkpoints/   (see ``checkpoint``)
<out>/diagnostics/   private data, see ``diagnostics``
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from dp_flash_attention.core.durable import remove_temporaries, write_atomically
from dp_flash_attention.core.errors import InvalidInputError, RunStateError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training.secrets import (
    SECRETS_DIRECTORY,
    RunKeys,
    destroy_secrets,
    read_secrets,
    write_secrets,
)

RunStatus = Literal["preparing", "running", "finished"]

_LOCK_FILE = ".lock"
RECORD_FILE = "run.json"
_SCAFFOLDING = {_LOCK_FILE, SECRETS_DIRECTORY, f".tmp-{RECORD_FILE}"}
# Beside the checkpoints: the released model, diagnostics, certificate and report.
_SPARE_BYTES = 16 << 20


class RunDirectory:
    """An open, locked run directory. Build one with ``open``; use it as a context manager.

    Attributes:
        path: The directory.
        keys: The run's secrets; None once the run is finished.
        resumed: Whether the run was there before.
    """

    def __init__(
        self, path: Path, lock: int, record: dict[str, Any], keys: RunKeys | None, *, resumed: bool
    ) -> None:
        self.path, self.keys, self.resumed = path, keys, resumed
        self._lock, self._record = lock, record

    @classmethod
    def open(cls, path: str | Path, *, resume: bool = False, test_key: TestKey | None = None) -> RunDirectory:
        """Starts a run in a new or empty directory, or takes up the one that is there.

        Args:
            path: The directory.
            resume: Whether a run is there to be taken up.
            test_key: Makes a new run reproducible, and not private. For tests only.

        Raises:
            InvalidInputError: If the directory cannot be made or written, or is not empty without ``resume``.
            RunStateError: If there is no run to resume, its secrets are missing, or another process works
                on it.
        """
        directory = Path(path)
        _prepare(directory, resume=resume)
        lock = _locked(directory)
        try:
            return cls._open_locked(directory, lock, resume=resume, test_key=test_key)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def _open_locked(cls, path: Path, lock: int, *, resume: bool, test_key: TestKey | None) -> RunDirectory:
        remove_temporaries(path)
        record = _read_record(path)
        if record is not None and not resume:  # another process was quicker
            raise _not_empty(path)
        if record is None:
            # Without a record nothing was computed yet, so a key that is there has never been used.
            destroy_secrets(path)
            keys = RunKeys.from_os() if test_key is None else RunKeys(test_key)
            _refusing_disk_errors(path, lambda: write_secrets(path, keys))
            record = {"format": 1, "run_id": os.urandom(8).hex(), "status": "preparing", "facts": {}}
            run = cls(path, lock, record, keys, resumed=False)
            run._write()
            return run
        if record["status"] == "finished":
            destroy_secrets(path)  # in case the process died between the two
            return cls(path, lock, record, None, resumed=True)
        return cls(path, lock, record, read_secrets(path), resumed=True)

    @property
    def run_id(self) -> str:
        """A public random name of the run."""
        return str(self._record["run_id"])

    @property
    def status(self) -> RunStatus:
        """``"preparing"`` until a step may be computed, ``"finished"`` once the secrets are destroyed."""
        status: RunStatus = self._record["status"]
        return status

    @property
    def settings(self) -> Mapping[str, Any]:
        """What training was started with, as JSON values; empty while preparing."""
        return dict(self._record.get("settings", {}))

    @property
    def facts(self) -> Mapping[str, Any]:
        """What ``remember`` kept."""
        return dict(self._record["facts"])

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    @property
    def diagnostics(self) -> Path:
        """Where private diagnostics are."""
        return self.path / "diagnostics"

    def remember(self, name: str, value: Any) -> None:
        """Keeps a public or differentially private JSON value for the resumed run, durably.

        Raises:
            RunStateError: If the name has another value already: a second release would need its own budget.
        """
        known = self._record["facts"]
        if name in known and known[name] != value:
            raise RunStateError(
                f"{name} is recorded as {known[name]!r} in {self.path / RECORD_FILE}, but now it is "
                f"{value!r}. Use the recorded value."
            )
        known[name] = value
        self._write()

    def mark_running(self, settings: Mapping[str, Any]) -> None:
        """Records what training starts with; from now on steps may be computed."""
        self._record |= {"status": "running", "settings": dict(settings)}
        self._write()

    def finish(self) -> None:
        """Marks the run as finished and destroys its secrets, on disk and in memory."""
        self._record["status"] = "finished"
        self._write()
        destroy_secrets(self.path)
        if self.keys is not None:
            self.keys.destroy()
            self.keys = None

    def discard(self) -> None:
        """Removes a run that computed no step: its secrets, its record, and the directory if nothing else is there.

        Raises:
            RunStateError: If training has begun.
        """
        if self.status != "preparing":
            raise RunStateError(f"{self.path} holds a run that has begun, but only an unused one is removed.")
        destroy_secrets(self.path)
        if self.keys is not None:
            self.keys.destroy()
            self.keys = None
        for name in (RECORD_FILE, _LOCK_FILE):
            (self.path / name).unlink(missing_ok=True)
        self.close()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def check_space(self, checkpoint_bytes: int) -> None:
        """Checks that two checkpoints, one being written, and the results fit on the disk.

        Raises:
            InvalidInputError: If they do not.
        """
        needed = 4 * checkpoint_bytes + _SPARE_BYTES
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise InvalidInputError(
                "out_dir",
                str(self.path),
                bound=f"on a disk with {needed >> 20} MiB free, and it has {free >> 20} MiB",
                remedy="Free space or choose a directory on another disk.",
            )

    def close(self) -> None:
        """Releases the lock; calling it again does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Releases the lock."""
        self.close()

    def _write(self) -> None:
        data = json.dumps(self._record, indent=2, sort_keys=True).encode()
        _refusing_disk_errors(self.path, lambda: write_atomically(self.path / RECORD_FILE, data))


def _prepare(directory: Path, *, resume: bool) -> None:
    """Makes the directory, or refuses it before anything in it is touched."""
    present: set[str] = set()
    if directory.is_dir():
        present = {entry.name for entry in directory.iterdir()}
    if resume:
        # A process that died within its first moments leaves scaffolding without a record: that is a run too.
        if RECORD_FILE not in present and not (_LOCK_FILE in present and present <= _SCAFFOLDING):
            raise RunStateError(
                f"{directory} holds no run to resume. Check the directory's name, or start a run without "
                "resuming."
            )
        return
    if present:
        raise _not_empty(directory)

    def make() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".tmp-{RECORD_FILE}"
        probe.write_bytes(bytes(4096))
        probe.unlink()

    _refusing_disk_errors(directory, make)


def _not_empty(directory: Path) -> InvalidInputError:
    return InvalidInputError(
        "out_dir",
        str(directory),
        bound="a new or empty directory, because nothing is written over",
        remedy="Choose another directory, or resume the run that is there.",
    )


def _refusing_disk_errors(directory: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise InvalidInputError(
            "out_dir",
            str(directory),
            bound=f"a directory that can be written ({error.strerror})",
            remedy="Free disk space, repair its permissions, or choose another directory.",
        ) from error


def _locked(directory: Path) -> int:
    try:
        import fcntl
    except ImportError as error:
        raise RunStateError(
            "This system has no fcntl.flock, but a lock must keep two processes from drawing the same "
            "noise twice. Use Linux or macOS."
        ) from error
    try:
        descriptor = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidInputError(
            "out_dir",
            str(directory),
            bound=f"a directory that can be written ({error.strerror})",
            remedy="Choose another.",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RunStateError(
            f"another process works on {directory}, but two would draw the same noise. Wait for it to end, "
            "or choose another directory."
        ) from None
    return descriptor


def _read_record(directory: Path) -> dict[str, Any] | None:
    path = directory / RECORD_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        record = {}
    if record.get("format") != 1 or record.get("status") not in ("preparing", "running", "finished"):
        raise RunStateError(
            f"{path} cannot be read, but it says what the run was started with. Restore it, or start a new "
            "run in another directory."
        )
    return record
