"""Freed memory stays with the process: counted in page faults, which do not depend on the machine's speed."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from dp_flash_attention.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(2):
    torch.ones(16 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    torch.ones(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of the GNU C library")
def test_a_block_that_was_freed_is_not_paged_in_again():
    # 64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB; sixteen times over. Some systems page a kept block in once more.
    assert page_faults("keep") * 4 < page_faults("default")
