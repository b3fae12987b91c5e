"""The noise room's generators as Triton kernels. Needs triton; imported only where a kernel is launched.

``words.py`` makes the integers, ``transform.py`` the normals; both are device functions that other kernels use
too. ``writer.py`` writes normals into tensors.
"""

from dp_flash_attention.noise.kernels.writer import write_normals

__all__ = ["write_normals"]
