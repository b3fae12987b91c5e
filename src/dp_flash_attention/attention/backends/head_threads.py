"""Runs heads side by side on a CPU, each by one thread from the clip to the noise.

A kernel that spreads one head over all threads makes them wait for each other at its end, and what is around it (clip,
merging, noise) runs on one thread or meets at the interpreter's lock. A thread that takes a whole head keeps its rows in
its own cache, and makes noise while the others are inside their kernels, where they hold no lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from threading import Barrier, Lock
from typing import Final

import torch
from torch import Tensor

Scratch = dict[str, Tensor]
Task = Callable[[Scratch], None]

MOST_THREADS: Final = 8
"""Beyond it threads would meet at the interpreter's lock after all: a head of 2,048 x 64 holds it for about a
twentieth of its time (40 operations of clip and merging, 40 of noise). Measured with 2."""


def num_head_threads() -> int:
    """Returns how many heads run side by side: as many as torch has threads, or 1 where those are too many."""
    threads = torch.get_num_threads()
    return threads if threads <= MOST_THREADS else 1


def run_tasks(tasks: Sequence[Task], num_threads: int) -> None:
    """Runs every task once, on ``num_threads`` threads in which torch is single-threaded and records no gradient.

    Returns when all have ended, and then raises what the first failing one raised. Modes and hooks of the calling thread are
    not active in the others.
    """
    inference = torch.is_inference_mode_enabled()
    waiting, lock = iter(tasks), Lock()

    def drain() -> None:
        scratch: Scratch = {}
        # What inference mode has allocated may only be written in it.
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                with lock:
                    task = next(waiting, None)
                if task is None:
                    return
                task(scratch)

    running = [_pool(os.getpid(), num_threads).submit(drain) for _ in range(num_threads)]
    wait(running)
    for each in running:
        each.result()


@lru_cache(maxsize=2)
def _pool(process: int, num_threads: int) -> ThreadPoolExecutor:
    """Returns the threads of this process: a forked child inherits the object but not its threads."""
    started = Barrier(num_threads + 1)
    pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="dpfa-heads")

    def start() -> None:
        torch.get_num_threads()  # a thread's first question sets its number to the last that any thread has set
        torch.set_num_threads(1)
        started.wait()

    for _ in range(num_threads):
        pool.submit(start)
    started.wait()
    # The number is each thread's own, but threads that are yet to start take the last one that was set.
    torch.set_num_threads(num_threads)
    return pool
