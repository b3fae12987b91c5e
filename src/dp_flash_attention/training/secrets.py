"""The secrets of a run: one key, from which sampling, noise and dropout are derived.

Whoever holds the key can subtract the noise. It therefore lives in one file of mode 600, apart from what is
shared, only as long as the run can still need it, and is destroyed when the run ends.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from dp_flash_attention.core.durable import sync_directory, write_new_file
from dp_flash_attention.core.errors import NoiseReuseError, RunStateError
from dp_flash_attention.core.private_files import read_private_file
from dp_flash_attention.noise import SecretKey
from dp_flash_attention.noise.entropy import NoiseKey

SECRETS_DIRECTORY = ".secrets"
_KEY_FILE = "run.key"
_FINGERPRINT_FILE = "dataset.fingerprint"
_MAX_KEY_FILE_BYTES = 1 << 12


class RunKeys:
    """The derived keys of one run. An object serves one session only.

    Args:
        master: A ``SecretKey``, or in tests a ``TestKey``.
        uses_test_key: Whether the bytes are public; nothing made with such a key is private.

    Guarantees:
        public: nothing. Theorem: subkeys of different purposes are computationally independent
        (``noise.SecretKey``), so the sample, the noise and the dropout masks are.
    """

    def __init__(self, master: NoiseKey, *, uses_test_key: bool | None = None) -> None:
        self._master = master
        self.uses_test_key = master.is_test_key if uses_test_key is None else uses_test_key
        self._claimed = False

    @classmethod
    def from_os(cls) -> RunKeys:
        """Returns fresh keys from the operating system.

        Raises:
            NoiseUnavailableError: If the system gives no secure entropy.
        """
        return cls(SecretKey.from_os())

    def derive(self, purpose: str) -> NoiseKey:
        """Returns the key for ``purpose``; the same purpose always gives the same key."""
        return self._master.derive(purpose)

    def claim(self) -> None:
        """Marks the keys as used by a session.

        Raises:
            NoiseReuseError: If a session already used them: its noise would be added to other gradients.
        """
        if self._claimed:
            raise NoiseReuseError(
                "These run keys already serve a session, but each noise may be used once. Make others "
                "with RunKeys.from_os()."
            )
        self._claimed = True

    def destroy(self) -> None:
        """Overwrites the key in memory; what generators derived from it lives until they are collected."""
        if isinstance(self._master, SecretKey):
            self._master.destroy()

    def __repr__(self) -> str:
        """Shows no bytes."""
        return f"RunKeys({'test key' if self.uses_test_key else 'secret key'})"

    def _export(self) -> bytes:
        kind = "test" if self.uses_test_key else "secret"
        return json.dumps({"format": 1, "kind": kind, "key": self._master.export().hex()}).encode()


def write_secrets(run_directory: Path, keys: RunKeys) -> None:
    """Stores the keys under ``<run>/.secrets`` (directory 700, files 600), durably.

    Raises:
        RunStateError: If secrets are there already.
        OSError: If the file system refuses.
    """
    directory = run_directory / SECRETS_DIRECTORY
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        raise RunStateError(
            f"{directory} exists, but a new run needs a place for its own secrets. Resume that run, or "
            "choose another directory."
        ) from None
    directory.chmod(0o700)  # whatever the umask
    write_new_file(directory / _KEY_FILE, keys._export(), mode=0o600)
    sync_directory(directory)
    sync_directory(run_directory)


def read_secrets(run_directory: Path) -> RunKeys:
    """Reads the keys back.

    Raises:
        RunStateError: If they are missing, damaged or readable by others.
    """
    path = run_directory / SECRETS_DIRECTORY / _KEY_FILE
    try:
        folder = path.parent.lstat().st_mode
        found = read_private_file(path, max_bytes=_MAX_KEY_FILE_BYTES, follow_links=False)
    except OSError:
        raise RunStateError(
            f"{path} cannot be read, but the run is unfinished and needs its secrets to go on. Put the "
            "file back, or start a new run in another directory: its budget adds to what this one has "
            "spent."
        ) from None
    if found.open_to_others or (os.name == "posix" and folder & 0o077):
        raise RunStateError(
            f"{path} is open to other users, but the run's secrets must have mode 600. Run: chmod -R go= "
            f"{path.parent}"
        )
    try:
        stored = json.loads(found.content)
        key = SecretKey.from_bytes(bytes.fromhex(stored["key"]))
        return RunKeys(key, uses_test_key=stored["kind"] != "secret")
    except (ValueError, KeyError, TypeError):
        raise RunStateError(
            f"{path} is damaged, but the run is unfinished and needs its secrets to go on. Put a copy "
            "back, or start a new run in another directory: its budget adds to what this one has spent."
        ) from None


def write_dataset_fingerprint(run_directory: Path, fingerprint: str) -> None:
    """Keeps the keyed fingerprint of the training data beside the key."""
    path = run_directory / SECRETS_DIRECTORY / _FINGERPRINT_FILE
    path.unlink(missing_ok=True)
    write_new_file(path, fingerprint.encode(), mode=0o600)
    sync_directory(path.parent)


def read_dataset_fingerprint(run_directory: Path) -> str:
    """Returns what ``write_dataset_fingerprint`` kept.

    Raises:
        RunStateError: If it is missing.
    """
    path = run_directory / SECRETS_DIRECTORY / _FINGERPRINT_FILE
    try:
        return read_private_file(path, max_bytes=_MAX_KEY_FILE_BYTES, follow_links=False).content.decode()
    except (OSError, ValueError):
        raise RunStateError(
            f"{path} cannot be read, but the run must be resumed with the data it was started with. Put "
            "the file back, or start a new run in another directory: its budget adds to what this one has "
            "spent."
        ) from None


def destroy_secrets(run_directory: Path) -> None:
    """Overwrites and removes ``<run>/.secrets``; does nothing if it is gone.

    Overwriting reaches the blocks of plain disks. On flash and copy-on-write storage old blocks may
    survive until the device reuses them; keep runs on an encrypted volume where that matters.
    """
    directory = run_directory / SECRETS_DIRECTORY
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        with open(path, "r+b", buffering=0) as file:
            file.write(bytes(os.fstat(file.fileno()).st_size))
            os.fsync(file.fileno())
        path.unlink()
    sync_directory(directory)
    directory.rmdir()
    sync_directory(run_directory)
