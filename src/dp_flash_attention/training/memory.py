"""How the process keeps memory between steps."""

from __future__ import annotations

import ctypes
import platform

# malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets this process keep large freed blocks for the next allocation, instead of giving them back.

    A training step frees and asks for the same tensors over and over. By default the GNU C library returns each
    block above 32 MiB, and the end of its heap, to the operating system at once, and the next step pays for every
    page anew: 5 % of a non-private step and 7 % of a private one at (vocabulary, T, d, layers, batch) =
    (4096, 128, 256, 4, 16) on an AMD EPYC, one thread. It is a setting of the whole process, so it belongs to
    whoever owns the process: the command line and the benchmarks call it, the library never does.

    Returns:
        Whether it took effect; False with another C library, which is left as it is.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
