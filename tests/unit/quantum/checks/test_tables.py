"""The checks of tables hold for what is built, and fail for every planted fault."""

from fractions import Fraction
from types import SimpleNamespace

import pytest

from dp_flash_attention.noise import (
    DiscreteGaussianGenerator,
    DiscreteGaussianTable,
    Layers,
    TestKey,
    build_table,
)
from dp_flash_attention.quantum.checks import tables
from dp_flash_attention.quantum.evidence import run_checks


def with_table(table):
    """A generator that still shows the certificate of the sound table, as a broken build would."""
    sound = DiscreteGaussianGenerator(TestKey("x"), variance=table.variance)
    return SimpleNamespace(variance=sound.variance, certificate=sound.certificate, tables=(table,))


def coarse(bits):
    small = build_table(16, precision_bits=bits)
    return DiscreteGaussianTable(
        variance=Fraction(16), precision_bits=128, masses=tuple(m << (128 - bits) for m in small.masses)
    )


def changed(change):
    masses = list(build_table(16).masses)
    change(masses)
    masses[0] += 2**128 - sum(masses)
    return DiscreteGaussianTable(variance=Fraction(16), precision_bits=128, masses=tuple(masses))


def biased(masses):
    masses[3] += 1 << 90


def cut(masses):
    del masses[30:]


def failing(generator):
    return [row.name for row in tables.check_generator(generator) if not row.holds]


@pytest.mark.parametrize("deep", [False, True])
def test_what_is_built_holds(deep):
    assert all(result.holds for result in run_checks(tables.tables_checks(deep=deep)))


@pytest.mark.parametrize(
    ("table", "found"),
    [
        (changed(biased), ["distance"]),
        (coarse(32), ["distance", "tail"]),
        (coarse(64), ["distance", "tail"]),
        (changed(cut), ["distance", "tail"]),
        (build_table(16, precision_bits=32), ["distance", "tail"]),
    ],
    ids=["biased", "32 bits", "64 bits", "cut at 7.5 sigma", "32 bits, openly"],
)
def test_a_bad_table_is_found(table, found):
    names = failing(with_table(table))
    assert [name.rpartition(": ")[2] for name in names] == found


def test_a_certificate_that_lies_is_found(monkeypatch):
    monkeypatch.setattr(
        tables, "certify_table", lambda table: SimpleNamespace(total_variation=Fraction(1, 2**126))
    )
    assert any("certificate" in name for name in failing(with_table(build_table(16))))


def test_careless_convolution_is_found():
    careless = Layers(variances=(Fraction(36), Fraction(36)), multiplier=8)
    generator = DiscreteGaussianGenerator(TestKey("x"), layers=careless, max_distance=Fraction(1, 2**10))
    names = failing(generator)
    assert any("certified distance" in name for name in names)
    assert any("topmost convolution" in name for name in names)


def test_careless_convolution_that_is_not_refused_is_found(monkeypatch):
    from dp_flash_attention.noise.discrete_gaussian_layers import certify_layers

    monkeypatch.setattr(
        tables,
        "certify_layers",
        lambda layers, max_distance: certify_layers(layers, max_distance=Fraction(1, 2)),
    )
    (row,) = tables.careless_convolution()
    assert not row.holds
    assert "accepted" in row.measured
