"""``dpfa verify``: what it prints, and that every planted fault of the library ends in exit code 1."""

import json
import os
from fractions import Fraction

import pytest

from dp_flash_attention.cli.main import main
from dp_flash_attention.noise import DiscreteGaussianTable, discrete_gaussian_layers, secure
from dp_flash_attention.quantum.checks import statistics, timing


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["verify", *arguments])
    return end.value.code


def only(*subjects):
    return [word for subject in subjects for word in ("--only", subject)]


def test_the_table_says_what_was_found(capsys):
    assert run(*only("tables", "entropy")) == 0
    shown = capsys.readouterr().out
    assert "FAILS" not in shown
    assert "evidence, not proof" in shown
    assert "rows hold" in shown


def test_json_is_one_object(capsys):
    assert run("--json", *only("ciphers")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] is True
    assert all(check["holds"] and check["evidence"] for check in found["checks"])


def test_statistics_and_timing_can_be_printed_as_json(monkeypatch, capsys):
    """Their figures come from NumPy, which has number types of its own; few samples, as the clock is no matter here."""
    monkeypatch.setattr(statistics, "_NUM", 100_000)
    monkeypatch.setattr(timing, "_CALLS", 200)
    monkeypatch.setattr(timing, "_CONTROL_CALLS", 200)
    assert run("--json", *only("statistics", "timing")) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert {check["name"].partition(":")[0] for check in found["checks"]} == {"statistics", "timing"}
    assert all(check["holds"] for check in found["checks"] if check["name"].startswith("statistics"))


def test_an_unknown_subject_is_one_line(capsys):
    assert run(*only("magic")) == 2
    assert "subject is 'magic'" in capsys.readouterr().err


def fault(monkeypatch, name):
    build = discrete_gaussian_layers.build_table
    if name == "biased table":

        def biased(variance):
            masses = list(build(variance).masses)
            masses[0], masses[1] = masses[0] - 2**60, masses[1] + 2**60
            return DiscreteGaussianTable(variance=variance, precision_bits=128, masses=tuple(masses))

        monkeypatch.setattr(discrete_gaussian_layers, "build_table", biased)
        return "tables"
    if name == "32-bit table":

        def coarse(variance):
            masses = tuple(mass << 96 for mass in build(variance, precision_bits=32).masses)
            return DiscreteGaussianTable(variance=variance, precision_bits=128, masses=masses)

        monkeypatch.setattr(discrete_gaussian_layers, "build_table", coarse)
        return "tables"
    if name == "k = 8 convolution":
        careless = discrete_gaussian_layers.Layers(variances=(Fraction(36), Fraction(36)), multiplier=8)
        monkeypatch.setattr(
            "dp_flash_attention.noise.discrete_gaussian.plan_layers", lambda variance, max_distance: careless
        )
        return "tables"
    if name == "reused nonce":
        step_key = secure._step_key
        monkeypatch.setattr(secure, "_step_key", lambda key, step: step_key(key, 0))
        return "ciphers"
    if name == "entropy source stuck":
        monkeypatch.setattr(os, "urandom", lambda n: (b"ab" * n)[:n])
        return "entropy"
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name", ["biased table", "32-bit table", "k = 8 convolution", "reused nonce", "entropy source stuck"]
)
def test_a_fault_in_the_library_ends_in_exit_code_1(monkeypatch, capsys, name):
    """Shared sign bits and value-dependent time are planted in the tests of their checks: they take samples."""
    subject = fault(monkeypatch, name)
    assert run(*only(subject)) == 1
    assert "FAILS" in capsys.readouterr().out
    assert run("--json", *only(subject)) == 1
    assert json.loads(capsys.readouterr().out)["holds"] is False
