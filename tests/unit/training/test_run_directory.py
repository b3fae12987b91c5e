from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from dp_flash_attention.core.errors import InvalidInputError, RunStateError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import RunDirectory, run_directory


def started(path: Path, **options: Any) -> RunDirectory:
    return RunDirectory.open(path, **options)


def test_a_new_run_is_prepared_begun_and_finished(tmp_path: Path) -> None:
    with started(tmp_path / "a" / "run") as run:
        assert (run.status, run.resumed, dict(run.settings), dict(run.facts)) == ("preparing", False, {}, {})
        assert run.keys is not None
        run.mark_running({"plan": 1})
        assert run.status == "running"
        run.finish()
        assert run.keys is None
    record = json.loads((tmp_path / "a" / "run" / "run.json").read_text())
    assert (record["status"], record["settings"]) == ("finished", {"plan": 1})
    assert not (tmp_path / "a" / "run" / ".secrets").exists()


def test_two_runs_have_two_names_and_two_keys(tmp_path: Path) -> None:
    with started(tmp_path / "a") as first, started(tmp_path / "b") as second:
        assert first.run_id != second.run_id
        assert first.keys is not None
        assert second.keys is not None
        assert first.keys.derive("noise").export() != second.keys.derive("noise").export()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with started(tmp_path / "run"), pytest.raises(RunStateError, match="another process works on"):
        started(tmp_path / "run", resume=True)
    started(tmp_path / "run", resume=True).close()


@pytest.mark.parametrize("name", ["thesis.txt", ".lock", "run.json"])
def test_a_directory_that_is_not_empty_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidInputError, match="new or empty"):
        started(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InvalidInputError, match="out_dir"):
        started(tmp_path / "run")


def test_there_has_to_be_a_run_to_resume(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunStateError, match="no run to resume"):
            started(path, resume=True)


def test_a_process_that_died_before_its_record_left_keys_that_were_never_used(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    assert run.keys is not None
    old = run.keys.derive("noise").export()
    run.close()
    (tmp_path / "run" / "run.json").unlink()
    with started(tmp_path / "run", resume=True) as again:
        assert again.status == "preparing"
        assert again.keys is not None
        assert again.keys.derive("noise").export() != old


def test_a_run_that_was_stopped_goes_on_with_its_keys(tmp_path: Path) -> None:
    with started(tmp_path / "run", test_key=TestKey("x")) as run:
        run.mark_running({})
    with started(tmp_path / "run", resume=True) as again:
        assert again.resumed
        assert again.keys is not None
        assert again.keys.uses_test_key
        assert again.run_id == run.run_id


def test_secrets_that_survived_the_end_are_destroyed_later(tmp_path: Path, monkeypatch: Any) -> None:
    def dies(path: Path) -> None:
        raise KeyError

    run = started(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "destroy_secrets", dies)
        with pytest.raises(KeyError):
            run.finish()
    run.close()
    assert (tmp_path / "run" / ".secrets").exists()
    with started(tmp_path / "run", resume=True) as again:
        assert (again.status, again.keys) == ("finished", None)
    assert not (tmp_path / "run" / ".secrets").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "{}", '{"format": 1, "status": "odd"}', '{"format": 2, "status": "running"}']
)
def test_a_damaged_record_is_no_reason_to_begin_anew(tmp_path: Path, text: str) -> None:
    started(tmp_path / "run").close()
    key = (tmp_path / "run" / ".secrets" / "run.key").read_bytes()
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(RunStateError, match="cannot be read"):
        started(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / ".secrets" / "run.key").read_bytes() == key


def test_a_fact_is_remembered_once(tmp_path: Path) -> None:
    with started(tmp_path / "run") as run:
        run.remember("count", 7)
        run.remember("count", 7)
        with pytest.raises(RunStateError, match="recorded as 7"):
            run.remember("count", 8)
    with started(tmp_path / "run", resume=True) as again:
        assert dict(again.facts) == {"count": 7}


def test_only_an_unused_run_is_discarded_and_nothing_else_with_it(tmp_path: Path) -> None:
    started(tmp_path / "run").discard()
    assert not (tmp_path / "run").exists()
    run = started(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run.discard()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    begun = started(tmp_path / "begun")
    begun.mark_running({})
    with pytest.raises(RunStateError, match="has begun"):
        begun.discard()
    begun.close()


def test_a_disk_that_is_too_small_is_said_before_training(tmp_path: Path) -> None:
    with started(tmp_path / "run") as run:
        run.check_space(1000)
        with pytest.raises(InvalidInputError, match="MiB free"):
            run.check_space(1 << 60)


def test_a_record_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory, "write_atomically", full)
    with pytest.raises(InvalidInputError, match="No space left on device"):
        started(tmp_path / "run")


def test_the_lock_is_closed_to_others(tmp_path: Path) -> None:
    with started(tmp_path / "run"):
        assert stat.S_IMODE((tmp_path / "run" / ".lock").stat().st_mode) == 0o600
