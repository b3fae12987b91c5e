"""Back ends by name, and the choice of one by measurement."""

from dp_flash_attention.attention.backends.registry import available_backends, choose_backend, get_backend

__all__ = ["available_backends", "choose_backend", "get_backend"]
