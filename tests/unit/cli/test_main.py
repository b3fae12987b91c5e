import errno
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from dp_flash_attention import accounting
from dp_flash_attention.cli.main import main
from dp_flash_attention.core.errors import RunStateError

QUESTION = [
    "account",
    "--noise-multiplier",
    "1.1",
    "--steps",
    "10",
    "--sampling-prob",
    "0.01",
    "--delta",
    "1e-6",
]


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def assert_one_line(err):
    assert err.startswith("dpfa: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1


def test_the_version_is_printed(capsys):
    assert call(capsys, "--version") == (0, f"dpfa {version('dp-flash-attention')}\n", "")


def test_the_help_names_the_sub_commands(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert "account" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing"], "nothing"),
        (["--unknown"], "--unknown"),
        (["account", "--epsilon", "much"], "--epsilon"),
        (["account", "--epsilon", "0", "--steps", "1", "--sampling-prob", "1", "--delta", "1e-6"], "epsilon"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two(capsys, arguments, named):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert named in err
    assert_one_line(err)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RunStateError("the run\nis finished. Choose another directory."), 2, "the run is finished"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/model"), 2, "No space left"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs"), 2, "Permission denied"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "data.csv"), 2, "data.csv"),
        (OSError("disk went away"), 2, "disk went away"),
        (ZeroDivisionError("division by zero"), 70, "ZeroDivisionError: division by zero"),
    ],
)
def test_every_failure_is_one_line(capsys, monkeypatch, error, code, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(accounting, "epsilon", fail)
    found, out, err = call(capsys, *QUESTION)
    assert (found, out) == (code, "")
    assert words in err
    assert "Traceback" not in err
    assert_one_line(err)


def test_an_interrupt_ends_with_the_usual_code_and_no_traceback(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(accounting, "epsilon", interrupt)
    assert call(capsys, *QUESTION) == (130, "", "")


def test_the_traceback_is_shown_on_request(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(accounting, "epsilon", fail)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        main(["--traceback", *QUESTION])


def test_a_reader_that_goes_away_is_no_error():
    code = "import sys; from dp_flash_attention.cli.main import main; main(['--help'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert err == ""


def test_a_mistyped_command_is_one_sentence_and_a_suggestion(capsys):
    with pytest.raises(SystemExit) as end:
        main(["certificate", "chek", "x"])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert "Did you mean 'check'? Run `dpfa --help`" in err
