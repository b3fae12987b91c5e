"""``dpfa train`` as a process of its own: killed with SIGKILL again and again, and resumed to the end."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest


def start(*arguments):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from dp_flash_attention.cli.main import main; main()",
            "train",
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def wait_for(condition, process):
    """Waits until the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.01)


@pytest.mark.parametrize(("noise", "wanted"), [("secure", 4), ("exact", 2)])
def test_killed_and_resumed_until_it_ends(small_table, tmp_path, noise, wanted):
    out = tmp_path / "run"
    draw = random.Random(7)
    process = start(
        "--data", small_table(), "--label", "kind", "--out", out, "--dataset-size", 300,
        "--steps", 60, "--expected-batch-size", 64, "--noise", noise, *(["--twin"] if noise == "secure" else []),
    )  # fmt: skip
    checkpoints = out / "checkpoints"
    deaths = 0
    for _ in range(wanted):
        seen = len(list(checkpoints.glob("*"))) if checkpoints.exists() else 0
        before = max((path.name for path in checkpoints.glob("*")), default="") if seen else ""
        wait_for(lambda b=before: max((p.name for p in checkpoints.glob("step-*")), default="") > b, process)
        time.sleep(draw.uniform(0.0, 0.05))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        deaths += 1
        assert not (out / "certificate.json").exists()
        process = start("--resume", "--out", out)
    code, _, err = finish(process)
    assert (code, err) == (0, "")
    assert deaths >= 2
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["claim"]["holds"] is True
    assert ("finite_precision" in certificate["certified"]) is (noise == "exact")
    assert (out / "report.html").exists()
    assert not (out / ".secrets").exists()
    steps = [
        json.loads(line)["step"]
        for line in (out / "diagnostics" / "steps.jsonl").read_text().splitlines()[1:]
    ]
    assert steps == list(range(60))


def test_ctrl_c_saves_and_says_how_to_go_on(small_table, tmp_path):
    out = tmp_path / "run"
    process = start(
        "--data", small_table(), "--label", "kind", "--out", out, "--dataset-size", 300,
        "--steps", 2000, "--expected-batch-size", 64,
    )  # fmt: skip
    # The first checkpoint comes before the first step; a line of diagnostics comes after it.
    steps = out / "diagnostics" / "steps.jsonl"
    wait_for(lambda: steps.exists() and steps.read_text().count("\n") > 1, process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err.count("\n") == 1
    assert err.startswith("dpfa: stopped")
    assert f"dpfa train --resume --out {out}" in err
    assert json.loads((out / "run.json").read_text())["status"] == "running"


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs a directory that even root cannot write"
)
def test_an_unwritable_directory_is_refused(small_table, tmp_path):
    code, _, err = finish(start("--data", small_table(), "--label", "kind", "--out", "/proc/nothing/here"))
    assert code == 2
    assert err.startswith("dpfa: error: ")
    assert err.count("\n") == 1
