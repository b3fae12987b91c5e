"""Chunks: each one once, scratch never shared, and idle scratch used again."""

import os
import threading
import time

import pytest

from dp_flash_attention.noise.chunk_threads import ChunkThreads


class Worker:
    """Scratch that notices two users."""

    def __init__(self, made):
        made.append(self)
        self.busy = threading.Lock()


def run(threads, total, num_threads, pause=0.0):
    starts, lock = [], threading.Lock()

    def write_chunk(worker, start):
        assert worker.busy.acquire(blocking=False), "two threads share scratch"
        time.sleep(pause)
        with lock:
            starts.append(start)
        worker.busy.release()

    threads.run(write_chunk, total, num_threads=num_threads)
    return sorted(starts)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("total", [1, 10, 11, 95])
def test_every_chunk_is_written_once(num_threads, total):
    made = []
    threads = ChunkThreads(lambda: Worker(made), chunk=10)
    assert run(threads, total, num_threads) == list(range(0, total, 10))
    assert len(made) <= min(num_threads, -(-total // 10))


def test_scratch_is_used_again_and_never_shared():
    made = []
    threads = ChunkThreads(lambda: Worker(made), chunk=1)
    for _ in range(20):
        run(threads, 12, 4, pause=0.001)
    assert 1 <= len(made) <= 4


def test_several_callers_at_once_have_scratch_of_their_own():
    made, results = [], []
    threads = ChunkThreads(lambda: Worker(made), chunk=1)
    callers = [
        threading.Thread(target=lambda: results.append(run(threads, 30, 2, pause=0.0005))) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [list(range(30))] * 4


def test_an_error_in_a_helper_reaches_the_caller():
    threads = ChunkThreads(object, chunk=1)
    main = threading.get_ident()

    def write_chunk(worker, start):
        time.sleep(0.001)
        if threading.get_ident() != main:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        threads.run(write_chunk, 200, num_threads=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_starts_helpers_of_its_own():
    made = []
    threads = ChunkThreads(lambda: Worker(made), chunk=1)
    run(threads, 10, 2)
    threads._owner = (os.getpid() + 1, 2)  # what a child finds: helpers of another process
    before = threads._helpers
    run(threads, 10, 2)
    assert threads._helpers is not before
