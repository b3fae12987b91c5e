"""The whole generator against its layout, computed one number at a time; its arguments."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import DiscreteGaussianGenerator, Layers, SecureNormalGenerator, TestKey
from dp_flash_attention.noise.discrete_gaussian_scan import OVERFLOW_BYTES, TILE, TILE_BYTES, TableScan
from dp_flash_attention.noise.keystream import Domain, new_buffer
from dp_flash_attention.noise.secure import CipherKeystream

KEY = TestKey("exact")


def draw(size, *, step=0, stream=0, key=KEY, **law):
    out = torch.empty(size, dtype=torch.int64)
    return DiscreteGaussianGenerator(key, **law).fill_(out, step=step, stream=stream)


def test_numbers_follow_the_layout():
    """Tile t of a law with L layers: bytes (t·L + layer)·19,456 of its key's stream; overflow likewise."""
    layers = Layers(variances=(Fraction(64), Fraction(49), Fraction(30)), multiplier=4)
    generator = DiscreteGaussianGenerator(KEY, layers=layers, max_distance=Fraction(1, 2**70))
    key = KEY.derive("noise.discrete-gaussian.v1:4:64,49,30")
    source = CipherKeystream(key, "aes-256-ctr").at(step=3, stream=5)

    def read(domain, index, size):
        return source.read(size, domain=domain, block=index * size // 16, buffer=new_buffer(size))

    expected = np.zeros(2 * TILE, dtype=np.int64)
    for tile in range(2):
        for layer in range(3):
            part = 3 * tile + layer
            samples = TableScan(generator.tables[layer]).draw(
                read(Domain.DISCRETE_GAUSSIAN, part, TILE_BYTES)[None],
                TILE,
                lambda index, part=part: read(Domain.DISCRETE_GAUSSIAN_OVERFLOW, part, OVERFLOW_BYTES),
            )
            expected[tile * TILE : (tile + 1) * TILE] += 4**layer * samples.astype(np.int64)
    found = generator.fill_(torch.empty(2 * TILE, dtype=torch.int64), step=3, stream=5)
    assert np.array_equal(found.numpy(), expected)


def test_overflow_bytes_are_reached_through_the_generator():
    """At σ = 24 one tile in a hundred overflows: 300 tiles hold some, and they match the layout too."""
    generator = DiscreteGaussianGenerator(KEY, stddev=24)
    source = CipherKeystream(KEY.derive("noise.discrete-gaussian.v1:1:576"), "aes-256-ctr").at(
        step=0, stream=0
    )
    scan, overflown = TableScan(generator.tables[0]), []
    found = generator.fill_(torch.empty(300 * TILE, dtype=torch.int64), step=0, stream=0).numpy()
    for tile in range(300):

        def read_overflow(index, tile=tile):
            overflown.append(tile)
            return source.read(
                OVERFLOW_BYTES,
                domain=Domain.DISCRETE_GAUSSIAN_OVERFLOW,
                block=tile * OVERFLOW_BYTES // 16,
                buffer=new_buffer(OVERFLOW_BYTES),
            )

        words = source.read(
            TILE_BYTES,
            domain=Domain.DISCRETE_GAUSSIAN,
            block=tile * TILE_BYTES // 16,
            buffer=new_buffer(TILE_BYTES),
        )
        samples = scan.draw(words[None], TILE, read_overflow)
        assert np.array_equal(samples, found[tile * TILE : (tile + 1) * TILE])
    assert 0 < len(overflown) < 30


def test_sums_wider_than_32_bits_are_exact():
    """Horner's scheme again, in Python's integers, from the layers' own samples."""
    generator = DiscreteGaussianGenerator(KEY, stddev=2**40)
    assert generator.certificate.largest > 2**31
    wide = generator.fill_(torch.empty(TILE, dtype=torch.int64), step=1, stream=2)
    k, num_layers = generator.certificate.layers.multiplier, len(generator.tables)
    text = ",".join(str(variance) for variance in generator.certificate.layers.variances)
    source = CipherKeystream(KEY.derive(f"noise.discrete-gaussian.v1:{k}:{text}"), "aes-256-ctr").at(
        step=1, stream=2
    )
    size = num_layers * TILE_BYTES
    words = source.read(size, domain=Domain.DISCRETE_GAUSSIAN, block=0, buffer=new_buffer(size))
    expected = [0] * TILE
    for layer, table in enumerate(generator.tables):
        part = words[layer * TILE_BYTES : (layer + 1) * TILE_BYTES]
        samples = TableScan(table).draw(
            part[None], TILE, lambda index: pytest.fail("this tile overflows: take another")
        )
        expected = [sum_ + k**layer * sample for sum_, sample in zip(expected, samples.tolist(), strict=True)]
    assert wide.tolist() == expected
    assert max(map(abs, expected)) > 2**40


@pytest.mark.parametrize("stddev", [0.1 + 0.2, Fraction(10, 3), 4, 12345.678, 2.0**30])
def test_the_variance_is_exactly_the_one_asked_for(stddev):
    generator = DiscreteGaussianGenerator(KEY, stddev=stddev)
    assert generator.variance == Fraction(stddev) ** 2
    assert generator.certificate.total_variation <= Fraction(1, 2**100)


def test_standard_deviation_and_variance_mean_the_same():
    assert torch.equal(draw(100, stddev=Fraction(5, 2)), draw(100, variance=Fraction(25, 4)))


def test_laws_share_no_numbers():
    """Two scales on one key and position: correlated noise would cancel in a difference."""
    a, b = draw(20_000, stddev=4).double(), draw(20_000, variance=Fraction(1601, 100)).double()
    assert abs((a * b).mean() / 16) < 5 / math.sqrt(20_000)
    unit = SecureNormalGenerator(KEY).fill_normal_(torch.empty(20_000), step=0, stream=0).double()
    assert abs((a * unit).mean() / 4) < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("stddev", [0, -1, math.nan, math.inf, True, "4", 2.0**49, Fraction(1, 9)])
def test_a_standard_deviation_out_of_range_is_refused(stddev):
    with pytest.raises(InvalidInputError, match=r"stddev|variance"):
        DiscreteGaussianGenerator(KEY, stddev=stddev)


@pytest.mark.parametrize(
    "law",
    [
        {},
        {"stddev": 4, "variance": 16},
        {"stddev": 4, "layers": Layers(variances=(Fraction(16),), multiplier=1)},
    ],
)
def test_the_law_is_given_once(law):
    with pytest.raises(InvalidInputError, match="exactly one"):
        DiscreteGaussianGenerator(KEY, **law)


def test_careless_layers_are_refused_when_the_generator_is_built():
    careless = Layers(variances=(Fraction(36), Fraction(36)), multiplier=8)
    with pytest.raises(InvalidInputError, match="k = 8"):
        DiscreteGaussianGenerator(KEY, layers=careless, max_distance=Fraction(1, 2**60))
    DiscreteGaussianGenerator(KEY, layers=careless, max_distance=Fraction(1, 2**15))


def test_an_unknown_cipher_is_refused():
    with pytest.raises(InvalidInputError, match="aes-256-ctr"):
        DiscreteGaussianGenerator(KEY, stddev=4, cipher="rot13")
