"""The statistical checks hold for our noise and reject wrong laws, at a tenth of the samples they usually take."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from dp_flash_attention.noise import DiscreteGaussianGenerator, TestKey
from dp_flash_attention.quantum.checks import statistics
from dp_flash_attention.quantum.evidence import run_checks

NUM = 1_000_000


def exact(num, step):
    generator = DiscreteGaussianGenerator(TestKey("verify"), stddev=4)
    return statistics.draw_integers(generator, num, step).copy()


def shared_with_neighbour(num, step):
    """Two samples have one sign bit."""
    values = np.abs(exact(num, step))
    return values * np.repeat(np.sign(exact(num, step + 1))[::2], 2)


def shared_with_magnitude(num, step):
    """The sign is the lowest bit of the word that made the magnitude: rare magnitudes have one sign only."""
    values = np.abs(exact(num, step))
    return np.where(values >= 17, values, np.sign(exact(num, step + 1)) * values)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def failing(draw, stddev=4, num=NUM):
    return [row.name.partition(": ")[2] for row in statistics.integer_law(draw, stddev, num) if not row.holds]


def test_exact_noise_holds():
    assert failing(exact) == []


@pytest.mark.parametrize(
    ("draw", "found"),
    [
        (shared_with_neighbour, "signs"),
        (shared_with_magnitude, "χ²"),
        (lambda num, step: np.abs(exact(num, step)), "signs"),
        (lambda num, step: np.clip(exact(num, step), -14, 14), "χ²"),
        (lambda num, step: exact(num, step) + (np.arange(num) % 20 == 0), "χ²"),
    ],
    ids=[
        "sign shared with the neighbour",
        "sign shared with the magnitude",
        "no sign",
        "cut tail",
        "shifted",
    ],
)
def test_a_wrong_law_is_found(draw, found):
    assert any(name.startswith(found) for name in failing(draw))


def test_a_wrong_standard_deviation_is_found():
    generator = DiscreteGaussianGenerator(TestKey("verify"), variance=Fraction(163, 10))
    names = failing(lambda num, step: statistics.draw_integers(generator, num, step))
    assert any(name.startswith("χ²") for name in names)


@pytest.mark.parametrize("name", statistics.NORMALS)
def test_normals_hold(name):
    assert all(row.holds for row in statistics.normal_law(name, NUM))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda z: z * 0.98, "χ²"),
        (lambda z: z.clamp(-3, 3), "tail"),
        (lambda z: z * (1 + (z.abs() > 4)), "tail"),
    ],
    ids=["two per cent too small", "clamped", "heavy"],
)
def test_normals_of_a_wrong_law_are_found(monkeypatch, change, found):
    class Wrong:
        def fill_normal_(self, out, *, step, stream):
            out.normal_()
            return change(out)

    monkeypatch.setattr(statistics, "make_generator", lambda name, key: Wrong())
    rows = statistics.normal_law("secure", 10 * NUM)
    assert any(found in row.name for row in rows if not row.holds)


def test_a_transform_that_clamps_is_found(monkeypatch):
    (row,) = statistics.normal_reach()
    assert row.holds

    class Clamping(statistics.Float32Transform):
        def write(self, words, refine, two_variance, out):
            super().write(np.maximum(words, 430), refine, two_variance, out)

    monkeypatch.setattr(statistics, "Float32Transform", Clamping)
    (row,) = statistics.normal_reach()
    assert not row.holds


def test_the_subject_lists_what_it_checks(monkeypatch):
    monkeypatch.setattr(statistics.shutil, "which", lambda name: None)
    names = [name for name, _ in statistics.statistics_checks(deep=True)]
    assert names == [
        "exact noise at σ = 4",
        "exact noise at σ = 32",
        "secure normals",
        "fast normals",
        "the normals' reach",
    ]
    monkeypatch.setattr(statistics, "_NUM", 50_000)
    assert all(result.holds for result in run_checks(statistics.statistics_checks()))


@pytest.mark.parametrize(
    ("verdict", "holds"), [("PASSED", True), ("WEAK", True), ("FAILED", False), ("", False)]
)
def test_dieharders_verdict_decides(monkeypatch, tmp_path, verdict, holds):
    """A stand-in for the program, because it is rarely installed: what counts is its last line."""
    program = tmp_path / "dieharder"
    program.write_text(f"#!/bin/sh\ncat >/dev/null\necho 'diehard_birthdays,0,100,100,0.5,{verdict}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(statistics, "_DIEHARDER_PARTS", 1)
    checks = dict(statistics.statistics_checks(deep=True))
    rows = list(checks["dieharder on AES-256-CTR"]())
    assert len(rows) == 6
    assert all(row.holds == holds for row in rows)
