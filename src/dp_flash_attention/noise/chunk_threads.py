"""Runs chunks of a long tensor on the caller's thread and on helpers, each with scratch of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

WorkerT = TypeVar("WorkerT")


class ChunkThreads(Generic[WorkerT]):
    """Threads and scratch that live as long as the generator that owns them.

    Args:
        make_worker: Makes the scratch of one thread.
        chunk: Numbers in a chunk.
    """

    def __init__(self, make_worker: Callable[[], WorkerT], chunk: int) -> None:
        self._make_worker = make_worker
        self._chunk = chunk
        self._helpers: ThreadPoolExecutor | None = None
        self._owner: tuple[int, int] | None = None
        self._idle: list[WorkerT] = []

    def run(self, write_chunk: Callable[[WorkerT, int], None], total: int, *, num_threads: int) -> None:
        """Calls ``write_chunk(worker, start)`` once for every chunk of ``total`` numbers."""
        starts = iter(range(0, total, self._chunk))
        lock = Lock()

        def drain() -> None:
            # Asking first whether there is one would race with the other threads.
            try:
                worker = self._idle.pop()
            except IndexError:
                worker = self._make_worker()
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    break
                write_chunk(worker, start)
            self._idle.append(worker)

        num_helpers = min(num_threads, -(-total // self._chunk)) - 1
        pending = [self._pool(num_threads).submit(drain) for _ in range(num_helpers)]
        drain()
        for helper in pending:
            helper.result()

    def _pool(self, num_threads: int) -> ThreadPoolExecutor:
        # A forked child inherits the object but not its threads, and would wait for them for ever.
        owner = (os.getpid(), num_threads)
        if self._helpers is None or self._owner != owner:
            self._helpers = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="dpfa-noise")
            self._owner = owner
        return self._helpers
