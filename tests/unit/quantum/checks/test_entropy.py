"""The checks of entropy hold on this machine, and fail for a source that is stuck."""

import os

import numpy as np

from dp_flash_attention.noise import ExternalSource, OsPool
from dp_flash_attention.quantum.checks import entropy
from dp_flash_attention.quantum.evidence import run_checks


def test_this_machine_holds():
    assert all(result.holds for result in run_checks(entropy.entropy_checks()))


def test_a_stuck_source_is_found():
    for reader in (bytes, lambda n: b"", lambda n: b"ab" * (n // 2)):
        source = ExternalSource(name="x", reader=reader, credit_bits=256)
        (row,) = entropy.source_health(source, 4096)
        assert not row.holds


def test_a_mixer_that_takes_a_stuck_source_is_found(monkeypatch):
    monkeypatch.setattr("dp_flash_attention.noise.seeds.check_health", lambda *args, **kwargs: None)
    (row,) = entropy.stuck_source()
    assert not row.holds


def test_a_pool_that_is_stuck_makes_every_check_of_it_fail(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda n: (b"ab" * n)[:n])
    failed = [result.name for result in run_checks(entropy.entropy_checks()) if not result.holds]
    assert {"source 'os'", "what seeds are worth"} <= set(failed)


def test_seeds_that_repeat_are_found(monkeypatch):
    class Copy(OsPool):
        def read(self, num_bytes):
            return np.random.default_rng(0).bytes(num_bytes)

    (row,) = entropy.seed_strength([Copy()])
    assert not row.holds
    assert "EQUAL" in row.measured


def test_a_strength_that_one_source_cannot_have_is_found(monkeypatch):
    from types import SimpleNamespace

    report = SimpleNamespace(sources=[SimpleNamespace(name="os")], entropy_bits=512, vouched=())
    monkeypatch.setattr(entropy, "draw_wide_key", lambda *args, **kwargs: (object(), report))
    (row,) = entropy.seed_strength([OsPool()])
    assert not row.holds


def test_seeds_of_a_callers_sources_are_shown_as_assumed():
    token = ExternalSource(name="token", reader=os.urandom, credit_bits=128)
    rows = list(entropy.seed_strength([OsPool(), token]))
    assert ["assumed, on the caller's word: 128 of" in row.measured for row in rows] == [False, True]


def test_subkeys_that_forget_whose_word_their_bits_are_fail(monkeypatch):
    monkeypatch.setattr(entropy, "vouched_entropy", lambda key: ())
    assert [row.holds for row in entropy.vouched_strength()] == [False, False, True]
