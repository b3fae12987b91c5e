"""Sources: what they give, what they refuse, and the processor's own one where there is one."""

import os
from pathlib import Path

import pytest

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise import CpuInstruction, ExternalSource, KeyFile, OsPool, cpu_entropy
from dp_flash_attention.noise.cpu_entropy import has_rdseed, load_rdseed, rdseed_bytes
from dp_flash_attention.noise.health import check_health


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(os.urandom(64))
    path.chmod(0o600)
    return path


def test_the_pool_gives_what_is_asked_for():
    assert len(OsPool().read(1024)) == 1024
    assert OsPool().credit_bits == 256


@pytest.mark.skipif(not has_rdseed(), reason="no RDSEED on this machine")
def test_the_processor_gives_healthy_bytes():
    source = CpuInstruction()
    first, second = source.read(1024), source.read(1023)
    assert len(second) == 1023
    assert first[:1023] != second
    check_health("cpu", first, min_entropy_per_byte=8.0)


def test_a_machine_without_the_instruction_says_so(monkeypatch, tmp_path):
    flags = tmp_path / "cpuinfo"
    flags.write_text("flags\t\t: fpu rdrand rdseedling\n")
    monkeypatch.setattr(cpu_entropy, "_FLAGS", flags)
    assert not has_rdseed()
    with pytest.raises(NoiseUnavailableError, match="RDSEED"):
        CpuInstruction()
    monkeypatch.setattr(cpu_entropy, "_FLAGS", tmp_path / "missing")
    assert not has_rdseed()


def test_a_kernel_that_forbids_executable_pages_is_an_error(monkeypatch):
    monkeypatch.setattr(cpu_entropy, "has_rdseed", lambda: True)

    def refused(*args, **kwargs):
        raise PermissionError("no")

    monkeypatch.setattr(cpu_entropy.mmap, "mmap", refused)
    with pytest.raises(NoiseUnavailableError, match="executable page"):
        load_rdseed()


def test_a_generator_that_runs_dry_is_asked_again_but_not_for_ever():
    words = iter([None, 1, None, None, 2])
    assert rdseed_bytes(lambda: next(words), 12) == (1).to_bytes(8, "little") + b"\x02\0\0\0"
    with pytest.raises(NoiseUnavailableError, match=r"dry|nothing"):
        rdseed_bytes(lambda: None, 8)


def test_a_key_file_is_read_whole(key_file):
    assert KeyFile(path=key_file, credit_bits=256).read(8) == key_file.read_bytes()


def test_a_key_file_that_others_may_read_is_refused(key_file):
    key_file.chmod(0o640)
    with pytest.raises(InvalidInputError, match=r"0o640.*chmod 600"):
        KeyFile(path=key_file, credit_bits=256).read(8)


@pytest.mark.parametrize("length", [0, 31, (1 << 20) + 1])
def test_a_key_file_of_a_strange_length_is_refused(key_file, length):
    key_file.write_bytes(bytes(length))
    with pytest.raises(InvalidInputError, match="length"):
        KeyFile(path=key_file, credit_bits=256).read(8)


def test_a_missing_key_file_is_an_error():
    with pytest.raises(NoiseUnavailableError, match="cannot be read"):
        KeyFile(path=Path("no such file"), credit_bits=256).read(8)


def test_a_token_that_fails_is_an_error_with_its_name():
    def unplugged(num_bytes):
        raise TimeoutError("no answer")

    with pytest.raises(NoiseUnavailableError, match=r"'token' failed.*no answer"):
        ExternalSource(name="token", reader=unplugged, credit_bits=256).read(8)


@pytest.mark.skipif(os.name != "posix", reason="a file that is open can be replaced on POSIX alone")
def test_the_key_file_whose_mode_is_checked_is_the_one_that_is_read(key_file, tmp_path, monkeypatch):
    secret, other = key_file.read_bytes(), tmp_path / "other"
    other.write_bytes(bytes(64))
    other.chmod(0o644)
    real = os.open

    def open_and_replace(*arguments, **options):
        descriptor = real(*arguments, **options)
        os.replace(other, key_file)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_replace)
    assert KeyFile(path=key_file, credit_bits=256).read(8) == secret


@pytest.mark.skipif(os.name != "posix", reason="pipes with names are POSIX")
def test_a_pipe_is_no_key_file_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe", mode=0o600)
    with pytest.raises(NoiseUnavailableError, match="no regular file"):
        KeyFile(path=tmp_path / "pipe", credit_bits=256).read(8)
