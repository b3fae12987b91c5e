"""Random bytes of the processor's own generator, the instruction RDSEED of x86-64.

Python has no way to name an instruction, so a few bytes of machine code are written to a page of their own,
which is then made executable and no longer writable. Linux on x86-64 only; wherever one of the steps is refused
(another system, another processor, a kernel that forbids new executable pages) there is no such source, and whoever
asks for it is told.

    endbr64; rdseed rax; setc cl; mov [rdi], rax; movzx eax, cl; ret        System V calling convention
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dp_flash_attention.core.errors import NoiseUnavailableError

_CODE: Final = bytes.fromhex("f30f1efa480fc7f80f92c14889070fb6c1c3")
# Intel (Software Developer's Manual, 7.3.17.2) says RDSEED may run dry and be asked again.
_RETRIES: Final = 10_000
_WORD_BYTES: Final = 8
_FLAGS: Final = Path("/proc/cpuinfo")

Instruction = Callable[[], int | None]


def has_rdseed() -> bool:
    """Whether this is Linux on an x86-64 processor that says it has RDSEED."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        lines = _FLAGS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.startswith("flags") and " rdseed " in f"{line} " for line in lines)


def load_rdseed() -> Instruction:
    """Returns a function that executes RDSEED once: 64 random bits, or None if the generator ran dry.

    Raises:
        NoiseUnavailableError: If there is no such instruction or it may not be called.
    """
    if not has_rdseed():
        raise NoiseUnavailableError(
            "This machine offers no RDSEED (Linux on x86-64 with that flag), but the entropy source 'cpu' needs it. "
            "Use another second source: a key file or a hardware token."
        )
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        page.write(_CODE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        libc = ctypes.CDLL(None, use_errno=True)
        protect = libc.mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if protect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
            raise OSError(ctypes.get_errno(), "mprotect refused an executable page")
    except OSError as error:
        raise NoiseUnavailableError(
            f"The system allows no executable page ({error}), but the entropy source 'cpu' needs one. "
            "Use another second source: a key file or a hardware token."
        ) from error
    execute = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_uint64))(address)
    word = ctypes.c_uint64()

    def instruction(page: mmap.mmap = page) -> int | None:  # keeps the page alive
        return word.value if execute(ctypes.byref(word)) else None

    return instruction


def rdseed_bytes(instruction: Instruction, num_bytes: int) -> bytes:
    """Returns ``num_bytes`` bytes of ``instruction``.

    Raises:
        NoiseUnavailableError: If the generator stays dry.
    """
    collected = bytearray()
    dry = 0
    while len(collected) < num_bytes:
        word = instruction()
        if word is not None:
            collected += word.to_bytes(_WORD_BYTES, "little")
            dry = 0
        elif (dry := dry + 1) > _RETRIES:
            raise NoiseUnavailableError(
                f"RDSEED gave nothing {dry} times in a row, but it must deliver in the end. "
                "The processor's generator may be broken: use another second source."
            )
    return bytes(collected[:num_bytes])
