"""Durable files, under the name by which this room knows them; see ``core.durable``."""

from __future__ import annotations

from dp_flash_attention.core.durable import (
    is_disk_error,
    remove_temporaries,
    replaced_atomically,
    sync_directory,
    write_atomically,
    write_new_file,
)

__all__ = [
    "is_disk_error",
    "remove_temporaries",
    "replaced_atomically",
    "sync_directory",
    "write_atomically",
    "write_new_file",
]
