"""The check of fresh noise holds, and fails for every mechanism that uses a key as it is."""

import pytest

from dp_flash_attention.quantum import lattice_gaussian, layered_noise, post_quantum_gaussian
from dp_flash_attention.quantum.checks import freshness
from dp_flash_attention.quantum.evidence import run_checks


def test_it_holds():
    assert all(result.holds for result in run_checks(freshness.freshness_checks()))


@pytest.mark.parametrize("module", [post_quantum_gaussian, lattice_gaussian, layered_noise])
def test_a_mechanism_without_subkeys_of_its_own_is_found(monkeypatch, module):
    monkeypatch.setattr(module, "fresh_subkey", lambda key, purpose: key.derive(purpose))
    assert [row.holds for row in freshness.fresh_noise()].count(False) == 1
