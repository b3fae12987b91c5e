"""A run that is killed at any moment ends as an unbroken one, and no noise meets two different sums."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("kill_and_resume.py")
NUM_STEPS, NUM_PARAMETERS = 9, 3
# Durable writes of an unbroken run: 3 for the secrets, 2 for each of run.json (preparing, running, finished),
# 4 checkpoints and the model, 2 for the data's fingerprint, 4 for destroying the secrets.
WRITES_OF_A_RUN = 3 + 2 * (3 + 4 + 1) + 2 + 4
# A process that takes over after step 5 writes 2 checkpoints (steps 6 and 9), the model, "finished", and destroys.
WRITES_AFTER_RESUMING = 2 * (2 + 1 + 1) + 4
NUM_PLACES = 6


def each(runs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for group, members in runs.items():
        if group not in ("unbroken", "modes"):
            yield from ((f"{group}, {name}", run) for name, run in members.items())


def check_a_process_died_at_each_chosen_write_and_each_place(runs: dict[str, Any], stride: int) -> None:
    assert runs["unbroken"]["endings"] == [f"done after {WRITES_OF_A_RUN} writes"]
    assert [int(name.split()[1]) for name in runs["fresh"]] == [*range(1, WRITES_OF_A_RUN + 1, stride)]
    assert [int(name.split()[1]) for name in runs["resumed"]] == [
        *range(1, WRITES_AFTER_RESUMING + 1, stride)
    ]
    assert len(runs["places"]) == NUM_PLACES
    for name, run in each(runs):
        *before, last = run["endings"]
        assert last.startswith("done"), name
        if not name.startswith("random"):  # a process may be quicker than its killer
            assert before == ["killed"], name


def check_steps_whose_noise_was_drawn_and_not_kept_were_repeated(runs: dict[str, Any]) -> None:
    draws = {name: run["draws"] for name, run in runs["places"].items()}
    whole = NUM_STEPS * NUM_PARAMETERS
    # Resumed from the checkpoint after step 2: what was drawn in steps 3, 4 and 5 is drawn again.
    assert draws == {
        "noise 0 of step 4": whole + 3 + 1,
        "noise 2 of step 4": whole + 3 + 3,
        "end of step 4": whole + 6,
        "noise 0 of step 5": whole + 6 + 1,
        "noise 2 of step 5": whole + 6 + 3,
        "end of step 5": whole + 9,
    }


def check_killed_runs_end_with_the_parameters_of_the_unbroken_one(runs: dict[str, Any]) -> None:
    for name, run in each(runs):
        assert run["model"] == runs["unbroken"]["model"], name


def check_no_noise_is_added_to_two_different_sums(runs: dict[str, Any]) -> None:
    for name, run in [("unbroken", runs["unbroken"]), *each(runs)]:
        assert run["positions"] == NUM_STEPS * NUM_PARAMETERS, name
        assert run["reused"] == 0, name


def check_every_way_to_clip_ends_as_its_unbroken_run_and_differs_from_the_others(
    runs: dict[str, Any],
) -> None:
    models = {"flat": runs["unbroken"]["model"]}
    for mode, found in runs["modes"].items():
        *deaths, last = found["broken"]["endings"]
        assert deaths == ["killed"] * 3, mode
        assert last.startswith("done"), mode
        assert found["broken"]["model"] == found["whole"]["model"], mode
        assert found["broken"]["reused"] == 0, mode
        assert found["broken"]["positions"] == NUM_STEPS * NUM_PARAMETERS, mode
        models[mode] = found["whole"]["model"]
    assert len(runs["modes"]) == 4
    # Two passes add the uses of a tied weight in another order; the rest clips, or draws its masks, differently.
    assert len(set(models.values())) == len(models)


def check_nothing_is_left_over(runs: dict[str, Any]) -> None:
    for name, run in [("unbroken", runs["unbroken"]), *each(runs)]:
        assert run["secrets_left"] is False, name
        assert run["temporaries"] == [], name


# One test and not one a property: the workers that tests are spread over would each kill all the runs anew. Writes come in
# pairs, a file and its directory, and a stride of 3 meets both.
@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["thirds", "all"])
def test_killed_runs_end_as_the_unbroken_one(tmp_path: Path, stride: int) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path), "7", str(stride)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    runs: dict[str, Any] = json.loads(done.stdout)
    check_a_process_died_at_each_chosen_write_and_each_place(runs, stride)
    check_steps_whose_noise_was_drawn_and_not_kept_were_repeated(runs)
    check_killed_runs_end_with_the_parameters_of_the_unbroken_one(runs)
    check_no_noise_is_added_to_two_different_sums(runs)
    check_every_way_to_clip_ends_as_its_unbroken_run_and_differs_from_the_others(runs)
    check_nothing_is_left_over(runs)
