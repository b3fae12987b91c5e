"""A key of its own for every release, whatever happened to the object that releases."""

from __future__ import annotations

from dp_flash_attention.noise import NoiseKey
from dp_flash_attention.noise.entropy import os_entropy

_NONCE_BYTES = 32


def fresh_subkey(key: NoiseKey, purpose: str) -> NoiseKey:
    """Returns a subkey that no other call returns: the purpose carries 256 fresh bits of the operating system.

    A counter would not do: a forked process, a copied object and a key that is loaded again all count on from
    where the other one stood, and equal noise under two values shows their exact difference. (A ``TestKey`` gives the same
    subkey every time.)

    Raises:
        NoiseUnavailableError: If the operating system gives no secure entropy.
    """
    nonce = "test" if key.is_test_key else os_entropy(_NONCE_BYTES).hex()
    return key.derive(f"{purpose}.{nonce}")
