"""The measured choice: a planted clock makes any form win, and a shape is timed once in a process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dp_flash_attention.clipping import norm_timing
from dp_flash_attention.clipping.norm_forms import NormForm, NormShape

SHAPE = NormShape(num_rows=9, num_inputs=6, num_outputs=5)
CPU = torch.device("cpu")


def planted(*seconds: float) -> tuple[Callable[[Callable[[], object]], float], list[float]]:
    """A clock that gives the candidates these times, in their order, and lists what it gave."""
    given: list[float] = []

    def timer(call: Callable[[], object]) -> float:
        call()  # every trial has to run
        given.append(seconds[len(given)])
        return given[-1]

    return timer, given


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [((1.0, 2.0, 3.0), "gram"), ((2.0, 1.0, 3.0), "outer"), ((3.0, 2.0, 1.0), "formed")],
)
def test_the_fastest_wins(seconds: tuple[float, ...], winner: NormForm) -> None:
    timer, _ = planted(*seconds)
    forms = norm_timing.measured_forms([SHAPE], device=CPU, batch_size=3, timer=timer)
    assert forms.form_of(SHAPE) == winner
    assert forms.fallbacks == {}


def test_a_draw_does_not_hang_on_the_clock() -> None:
    timer, _ = planted(1.04, 1.02, 1.0)
    assert norm_timing.measured_forms([SHAPE], device=CPU, batch_size=3, timer=timer).form_of(SHAPE) == "gram"


def test_a_shape_is_timed_once_and_anew_for_another_number_of_threads() -> None:
    timer, given = planted(*range(1, 7))
    before = torch.get_num_threads()
    for _ in range(2):
        norm_timing.measured_forms([SHAPE], device=CPU, batch_size=3, timer=timer)
    assert len(given) == 3
    try:
        torch.set_num_threads(before + 1)
        norm_timing.measured_forms([SHAPE], device=CPU, batch_size=3, timer=timer)
    finally:
        torch.set_num_threads(before)
    assert len(given) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_true_clock_gives_one_of_the_forms(dtype: str) -> None:
    shape = NormShape(num_rows=12, num_inputs=6, num_outputs=5, input_dtype=dtype, grad_dtype=dtype)
    forms = norm_timing.measured_forms([shape], device=CPU, batch_size=3)
    assert forms.chosen[shape] in shape.candidates


def test_the_clock_leaves_out_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 33.0])
    monkeypatch.setattr(norm_timing.time, "perf_counter", lambda: next(readings))
    assert norm_timing.least_seconds(lambda: None) == 1.0
