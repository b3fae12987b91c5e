"""What goes wrong with keys, signatures, sealed files and channels."""

from __future__ import annotations

from dp_flash_attention.core.errors import DPFlashAttentionError


class AuthenticationError(DPFlashAttentionError, ValueError):
    """Bytes are not what the holder of the expected key made; nothing of them was used."""


class UnlistedFilesError(AuthenticationError):
    """Beside what was signed lie files that the signature does not list.

    Args:
        message: What to tell the user.
        names: Names of those files.
    """

    def __init__(self, message: str, *, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


class KeyFileError(DPFlashAttentionError, ValueError):
    """A key, trust or succession file is foreign, damaged, open to others, or does not open."""


class ChannelError(DPFlashAttentionError, RuntimeError):
    """A channel is closed, broken or exhausted, and will not carry what was asked."""
