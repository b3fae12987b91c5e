"""``dpfa verify``: what it prints, and that every planted fault of the library ends in exit code 1."""

import json
import os
import time
from fractions import Fraction

import numpy as np
import pytest

from dp_flash_attention.cli.main import main
from dp_flash_attention.noise import (
    DiscreteGaussianGenerator,
    DiscreteGaussianTable,
    discrete_gaussian,
    discrete_gaussian_layers,
    secure,
)
from dp_flash_attention.noise.discrete_gaussian_scan import TableScan
from dp_flash_attention.noise.wide_sampler import WideSampler
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
    monkeypatch.setattr(timing, "_WIDE_CALLS", 200)
    monkeypatch.setattr(timing, "_PLANTED_CALLS", 200)
    assert run("--json", *only("statistics", "timing")) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert {check["name"].partition(":")[0] for check in found["checks"]} == {"statistics", "timing"}
    assert all(check["holds"] for check in found["checks"] if check["name"].startswith("statistics"))


def test_an_unknown_subject_is_one_line(capsys):
    assert run(*only("magic")) == 2
    assert "subject is 'magic'" in capsys.readouterr().err


def biased_table(monkeypatch):
    build = discrete_gaussian_layers.build_table

    def biased(variance):
        masses = list(build(variance).masses)
        masses[0], masses[1] = masses[0] - 2**60, masses[1] + 2**60
        return DiscreteGaussianTable(variance=variance, precision_bits=128, masses=tuple(masses))

    monkeypatch.setattr(discrete_gaussian_layers, "build_table", biased)


def table_of_32_bits(monkeypatch):
    build = discrete_gaussian_layers.build_table

    def coarse(variance):
        masses = tuple(mass << 96 for mass in build(variance, precision_bits=32).masses)
        return DiscreteGaussianTable(variance=variance, precision_bits=128, masses=masses)

    monkeypatch.setattr(discrete_gaussian_layers, "build_table", coarse)


def careless_convolution(monkeypatch):
    careless = discrete_gaussian_layers.Layers(variances=(Fraction(36), Fraction(36)), multiplier=8)
    monkeypatch.setattr(discrete_gaussian, "plan_layers", lambda variance, max_distance: careless)


def reused_nonce(monkeypatch):
    step_key = secure._step_key
    monkeypatch.setattr(secure, "_step_key", lambda key, step: step_key(key, 0))


def stuck_entropy(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda n: (b"ab" * n)[:n])


def shared_sign_bit(monkeypatch):
    draw = TableScan.draw

    def shared(self, tiles, num, read_overflow):
        values = draw(self, tiles, num, read_overflow)
        pairs = values[: num // 2 * 2]
        pairs[:] = np.abs(pairs) * np.repeat(np.where(pairs[::2] < 0, -1, 1), 2)
        return values

    monkeypatch.setattr(TableScan, "draw", shared)
    monkeypatch.setattr(statistics, "_NUM", 300_000)


def timing_leak(monkeypatch):
    fill = DiscreteGaussianGenerator.fill_

    def leaking(self, out, *, step, stream):
        fill(self, out, step=step, stream=stream)
        until = time.perf_counter_ns() + 100_000 * abs(int(out))
        while time.perf_counter_ns() < until:
            pass
        return out

    monkeypatch.setattr(DiscreteGaussianGenerator, "fill_", leaking)
    monkeypatch.setattr(timing, "_CALLS", 500)
    monkeypatch.setattr(timing, "_WIDE_CALLS", 200)
    monkeypatch.setattr(timing, "_PLANTED_CALLS", 200)


def wide_timing_leak(monkeypatch):
    numbers = WideSampler._numbers

    def leaking(self, worker, source, index, num):
        drawn = numbers(self, worker, source, index, num)
        until = time.perf_counter_ns() + abs(int(drawn[0])) // 2
        while time.perf_counter_ns() < until:
            pass
        return drawn

    monkeypatch.setattr(WideSampler, "_numbers", leaking)
    monkeypatch.setattr(timing, "_CALLS", 500)
    monkeypatch.setattr(timing, "_WIDE_CALLS", 400)


@pytest.mark.parametrize(
    ("plant", "subject", "row"),
    [
        (biased_table, "tables", "tables"),
        (table_of_32_bits, "tables", "tables"),
        (careless_convolution, "tables", "tables"),
        (reused_nonce, "ciphers", "no position repeats"),
        (stuck_entropy, "entropy", "source 'os'"),
        (shared_sign_bit, "statistics", "signs of neighbours"),
        (timing_leak, "timing", "σ = 4: time against magnitude"),
        (wide_timing_leak, "timing", "wide Gaussian: time against magnitude"),
        (wide_timing_leak, "timing", "wide Skellam: time against magnitude"),
    ],
)
def test_a_fault_in_the_library_ends_in_exit_code_1(monkeypatch, capsys, plant, subject, row):
    plant(monkeypatch)
    assert run(*only(subject)) == 1
    assert "FAILS" in capsys.readouterr().out
    assert run("--json", *only(subject)) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] is False
    failing = [line["name"] for check in found["checks"] for line in check["evidence"] if not line["holds"]]
    assert any(row in name for name in failing)
