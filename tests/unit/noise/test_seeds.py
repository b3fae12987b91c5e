"""Wide keys: what they are worth follows from the sources, and a broken source stops everything."""

import copy
import hashlib
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.hashes import SHA3_512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise import (
    DiscreteGaussianGenerator,
    ExternalSource,
    KeyFile,
    OsPool,
    SecretKey,
    SecureNormalGenerator,
    WideSecretKey,
    draw_wide_key,
)
from dp_flash_attention.noise.seeds import extract_and_expand


def token(name="token", credit=256, rate=8.0, seed=0):
    rng = np.random.default_rng(seed)
    return ExternalSource(name=name, reader=rng.bytes, credit_bits=credit, min_entropy_per_byte=rate)


def test_two_sources_carry_512_bits_and_one_carries_256():
    key, report = draw_wide_key([OsPool(), token()], min_entropy_bits=512)
    assert key.entropy_bits == report.entropy_bits == 512
    assert [(s.name, s.num_bytes, s.credited_bits) for s in report.sources] == [
        ("os", 1024, 256),
        ("token", 1024, 256),
    ]
    assert draw_wide_key([OsPool()], min_entropy_bits=256)[1].entropy_bits == 256
    with pytest.raises(NoiseUnavailableError, match=r"256 bits \(os 256\), but 512"):
        draw_wide_key([OsPool()], min_entropy_bits=512)


def test_more_sources_are_never_worth_more_than_the_key():
    assert (
        draw_wide_key([OsPool(), token("a"), token("b", seed=1)], min_entropy_bits=512)[1].entropy_bits == 512
    )


def test_a_public_beacon_adds_nothing():
    beacon = token("beacon", credit=0)
    with pytest.raises(NoiseUnavailableError, match="beacon 0"):
        draw_wide_key([OsPool(), beacon], min_entropy_bits=257)


def test_the_credit_is_no_more_than_the_bytes_can_carry():
    short = ExternalSource(
        name="short",
        reader=lambda n: np.random.default_rng(1).bytes(40),
        credit_bits=256,
        min_entropy_per_byte=4.0,
    )
    assert draw_wide_key([OsPool(), short], min_entropy_bits=300)[1].sources[1].credited_bits == 160


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        (lambda n: bytes(n), "in a row"),
        (lambda n: b"ab" * (n // 2), "within 512"),
        (lambda n: b"short", "5 bytes"),
        (lambda n: "text" * n, "str"),
    ],
    ids=["stuck", "two values", "short", "no bytes"],
)
def test_a_broken_source_stops_everything(reader, said):
    broken = ExternalSource(name="token", reader=reader, credit_bits=256)
    with pytest.raises(NoiseUnavailableError, match=said):
        draw_wide_key([OsPool(), broken], min_entropy_bits=256)


def test_one_source_under_two_names_is_found():
    same = np.random.default_rng(5).bytes(1024)
    sources = [ExternalSource(name=name, reader=lambda n: same, credit_bits=256) for name in ("a", "b")]
    with pytest.raises(NoiseUnavailableError, match="same bytes"):
        draw_wide_key(sources, min_entropy_bits=512)


@pytest.mark.parametrize("sources", [[], [OsPool(), OsPool()]])
def test_no_source_or_one_twice_is_refused(sources):
    with pytest.raises(InvalidInputError, match="sources"):
        draw_wide_key(sources, min_entropy_bits=256)


@pytest.mark.parametrize("bits", [0, 513, True, -1])
def test_a_strength_that_no_key_has_is_refused(bits):
    with pytest.raises(InvalidInputError, match="min_entropy_bits"):
        draw_wide_key([OsPool()], min_entropy_bits=bits)


def test_a_source_that_claims_too_much_is_refused():
    with pytest.raises(InvalidInputError, match="credit"):
        draw_wide_key([token(credit=512)], min_entropy_bits=256)


def test_mixing_is_hkdf_of_another_library():
    samples = [("os", b"x" * 40), ("token", b"y" * 33)]
    material = b"".join(
        len(n).to_bytes(8, "little") + len(s).to_bytes(8, "little") + n.encode() + s for n, s in samples
    )
    expected = HKDF(algorithm=SHA3_512(), length=64, salt=b"dpfa.seed.v1", info=b"dpfa wide key").derive(
        material
    )
    assert extract_and_expand(samples) == expected


def test_every_source_changes_the_key_and_so_does_its_boundary():
    base = extract_and_expand([("a", b"12"), ("b", b"3")])
    for other in ([("a", b"13"), ("b", b"3")], [("a", b"12"), ("b", b"4")], [("a", b"1"), ("b", b"23")]):
        assert extract_and_expand(other) != base


def wide(byte=7):
    return WideSecretKey(bytes([byte]) * 64, entropy_bits=512)


def test_subkeys_are_shake256_of_key_and_purpose():
    expected = hashlib.shake_256(b"dpfa.derive.wide.v1" + b"\x07" * 64 + b"noise").digest(64)
    assert wide().derive("noise").export() == expected
    assert wide().derive("noise").entropy_bits == 512
    assert wide().derive("noise") != wide().derive("sampling")


def test_a_wide_key_shows_pickles_and_copies_nothing_and_can_be_destroyed():
    key = wide()
    assert repr(key) == "WideSecretKey(<64 secret bytes>, entropy_bits=512)"
    for spread in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            spread(key)
    memory = key._secret
    key.destroy()
    key.destroy()
    assert bytes(memory) == bytes(64)
    assert key != wide()
    for use in (key.export, lambda: key.derive("noise")):
        with pytest.raises(NoiseUnavailableError, match="destroyed"):
            use()


@pytest.mark.parametrize("secret", [b"", bytes(32), bytes(65), "a" * 64, None])
def test_what_is_no_wide_key_is_refused_without_being_shown(secret):
    with pytest.raises(InvalidInputError, match="64 bytes"):
        WideSecretKey(secret, entropy_bits=512)


@pytest.mark.parametrize("bits", [-1, 513, True])
def test_a_worth_out_of_range_is_refused(bits):
    with pytest.raises(InvalidInputError, match="entropy_bits"):
        WideSecretKey.from_bytes(bytes(64), entropy_bits=bits)


@pytest.mark.parametrize("purpose", ["", None, 3])
def test_a_subkey_needs_a_purpose(purpose):
    with pytest.raises(InvalidInputError, match="purpose"):
        wide().derive(purpose)


def test_only_shake256_takes_a_wide_key():
    assert not DiscreteGaussianGenerator(wide(), stddev=4, cipher="shake256").uses_test_key
    for make in (
        lambda: DiscreteGaussianGenerator(wide(), stddev=4),
        lambda: SecureNormalGenerator(wide()),
    ):
        with pytest.raises(InvalidInputError, match="shake256"):
            make()
    DiscreteGaussianGenerator(SecretKey.from_os(), stddev=4, cipher="shake256")


def test_the_pool_under_another_name_is_not_a_second_source():
    """It would be credited with 512 bits, and noise with 256-bit quantum strength, from one pool."""
    with pytest.raises(InvalidInputError, match="one OsPool"):
        draw_wide_key([OsPool(), OsPool(name="second")], min_entropy_bits=512)


def test_two_keys_from_one_key_file_differ(tmp_path):
    """A process that starts again with its key file must not start with the same noise."""
    path = tmp_path / "secret"
    path.write_bytes(np.random.default_rng(3).bytes(64))
    path.chmod(0o600)
    file = KeyFile(path=path, credit_bits=256)
    first, report = draw_wide_key([file], min_entropy_bits=256)
    assert first != draw_wide_key([file], min_entropy_bits=256)[0]
    assert report.entropy_bits == first.entropy_bits == 256


def test_what_a_caller_vouches_for_stays_the_callers_word(tmp_path):
    path = tmp_path / "dice"
    path.write_bytes(np.random.default_rng(3).bytes(4096))
    path.chmod(0o600)

    class MyPool(OsPool):
        pass

    for source in (token(), KeyFile(path=path, credit_bits=100), MyPool(name="mine", credit_bits=99)):
        sources = [source] if isinstance(source, MyPool) else [OsPool(), source]
        key, report = draw_wide_key(sources, min_entropy_bits=99)
        assert report.drawn_bits == 256 * (len(sources) - 1)
        (statement,) = key.derive("a").derive("b").vouched
        assert f"{source.credit_bits} of the key's {report.entropy_bits} bits" in statement
        assert repr(source.name) in statement
        assert f"worth {report.drawn_bits} bits" in statement


def test_what_the_library_drew_itself_needs_no_word_and_a_public_beacon_adds_none():
    assert draw_wide_key([OsPool()], min_entropy_bits=256)[0].vouched == ()
    beacon = ExternalSource(name="beacon", reader=np.random.default_rng(4).bytes, credit_bits=0)
    key, report = draw_wide_key([OsPool(), beacon], min_entropy_bits=256)
    assert key.vouched == report.vouched == ()
    assert report.drawn_bits == 256


def test_bytes_that_were_passed_in_are_the_callers_word_altogether():
    drawn = draw_wide_key([OsPool()], min_entropy_bits=256)[0]
    again = WideSecretKey.from_bytes(drawn.export(), entropy_bits=512)
    for key in (again, again.derive("noise"), WideSecretKey(drawn.export(), entropy_bits=512)):
        (statement,) = key.vouched
        assert "all 512 bits" in statement
        assert "passed in" in statement
