"""The checks of key-streams hold, and fail for wrong primitives and reused positions."""

import pytest

from dp_flash_attention.noise import secure
from dp_flash_attention.noise.secure import CipherKeystream
from dp_flash_attention.noise.shake import ShakeKeystream
from dp_flash_attention.quantum.checks import ciphers
from dp_flash_attention.quantum.evidence import run_checks


def test_what_is_built_holds():
    assert all(result.holds for result in run_checks(ciphers.ciphers_checks()))
    assert len(ciphers.ciphers_checks(deep=True)) == len(ciphers.ciphers_checks())


def test_the_block_function_is_the_one_of_the_standard():
    # RFC 8439, section 2.3.2.
    block = ciphers.chacha20_block(bytes(range(32)), (1, 0x09000000, 0x4A000000, 0))
    assert block.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4")


class Shared:
    """A key-stream that forgets one part of its position."""

    def __init__(self, keystream, forget):
        self.keystream, self.forget = keystream, forget

    def at(self, **position):
        return self.keystream.at(**{**position, self.forget: 0})


@pytest.mark.parametrize("forget", ["step", "stream"])
@pytest.mark.parametrize("make", [lambda key: CipherKeystream(key, "aes-256-ctr"), ShakeKeystream])
def test_a_reused_nonce_is_found(make, forget):
    rows = list(ciphers.unique_positions("x", lambda key: Shared(make(key), forget), [0, 1]))
    assert [row.holds for row in rows] == [False, True]


def test_a_key_that_is_ignored_is_found():
    from dp_flash_attention.noise import TestKey

    rows = list(ciphers.unique_positions("x", lambda key: ShakeKeystream(TestKey("the same")), [0]))
    assert not rows[0].holds


def test_a_stream_that_does_not_repeat_is_found():
    def make(key):
        keystream, calls = ShakeKeystream(key), iter(range(10**9))

        class Drifting:
            def at(self, **position):
                stream = keystream.at(**position)

                class Stream:
                    block_bytes = stream.block_bytes

                    def read(self, size, *, domain, block, buffer):
                        return stream.read(
                            size, domain=domain, block=block + 2**20 * next(calls), buffer=buffer
                        )

                return Stream()

        return Drifting()

    rows = list(ciphers.unique_positions("x", make, [0]))
    assert not rows[1].holds


def test_a_wrong_primitive_is_found(monkeypatch):
    monkeypatch.setattr(ciphers, "philox4x64_block", lambda counter, key: (1, 2, 3, 4))
    assert [row.holds for row in ciphers.known_answers()] == [True, True, True, False, False]


def test_a_layout_that_changed_is_found(monkeypatch):
    monkeypatch.setattr(secure, "_STEP_PERSON", b"dpfa.step.v2")
    (row,) = ciphers.chacha20_layout()
    assert not row.holds
