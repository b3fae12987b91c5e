"""Threads that take whole heads: every task once, failures passed on, the caller's settings untouched."""

import os
import threading

import pytest
import torch

from dp_flash_attention.attention.backends import head_threads
from dp_flash_attention.attention.backends.head_threads import num_head_threads, run_tasks


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("num_tasks", [0, 1, 2, 7])
def test_every_task_runs_once_with_torch_on_one_thread_and_no_gradient(num_threads, num_tasks):
    before, ran, lock = torch.get_num_threads(), [], threading.Lock()

    def make(index):
        def task(scratch):
            with lock:
                ran.append((index, torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()))

        return task

    run_tasks([make(index) for index in range(num_tasks)], num_threads)
    assert sorted(index for index, *_ in ran) == list(range(num_tasks))
    assert {(threads, grad) for _, threads, grad, _ in ran} <= {(1, False)}
    assert threading.get_ident() not in {who for *_, who in ran}
    assert torch.is_grad_enabled()
    if num_threads == before:
        assert torch.get_num_threads() == before


def test_a_failure_is_passed_on_when_the_others_have_ended():
    ended = []

    def fails(scratch):
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        run_tasks([fails, *[lambda scratch, index=index: ended.append(index) for index in range(5)]], 2)
    assert sorted(ended) == list(range(5))


def test_scratch_is_one_threads_own():
    owners, lock = {}, threading.Lock()

    def task(scratch):
        with lock:
            owners.setdefault(id(scratch), set()).add(threading.get_ident())
            kept.append(scratch)

    kept = []
    run_tasks([task] * 20, 2)
    assert all(len(threads) == 1 for threads in owners.values())


def test_a_forked_child_gets_threads_of_its_own(monkeypatch):
    run_tasks([lambda scratch: None], 2)
    first = head_threads._pool(os.getpid(), 2)
    assert head_threads._pool(os.getpid() + 1, 2) is not first


def test_many_threads_are_left_to_the_kernel(monkeypatch):
    for threads, expected in ((1, 1), (2, 2), (8, 8), (9, 1), (64, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert num_head_threads() == expected
