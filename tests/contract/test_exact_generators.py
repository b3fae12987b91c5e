"""What every exact generator promises, whatever its cipher and however many layers it adds up."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise import DiscreteGaussianGenerator, SecretKey, TestKey
from dp_flash_attention.noise.discrete_gaussian_scan import TILE
from dp_flash_attention.noise.keystream import MAX_STEP, MAX_STREAM

CHUNK = 16 * TILE
CIPHERS = ["aes-256-ctr", "chacha20", "shake256"]
STDDEVS = [4, Fraction(313, 7), 5000]
SIZES = [1, 63, 65, TILE - 1, TILE, TILE + 1, CHUNK, CHUNK + 3]


@pytest.fixture(params=[(c, s) for c in CIPHERS for s in STDDEVS], ids=str)
def make(request):
    cipher, stddev = request.param
    return lambda key: DiscreteGaussianGenerator(key, stddev=stddev, cipher=cipher)


@pytest.fixture
def generator(make):
    return make(TestKey("contract"))


def fill(generator, size, **where):
    out = torch.full((size,), -(2**62), dtype=torch.int64)
    return generator.fill_(out, **{"step": 0, "stream": 0, **where})


def test_every_element_is_written_and_a_shorter_tensor_is_a_prefix(generator):
    whole = fill(generator, 2 * CHUNK)
    assert whole.abs().max() <= generator.certificate.largest
    for size in SIZES:
        assert torch.equal(fill(generator, size), whole[:size])


def test_the_number_of_threads_changes_nothing(generator):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fill(generator, 2 * CHUNK + 7, step=3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", [5, TILE + 9])
def test_adding_adds_what_filling_writes_modulo_2_to_the_64(generator, size):
    noise = fill(generator, size, step=2, stream=4)
    start = torch.arange(size) - 3
    assert torch.equal(generator.add_(start.clone(), step=2, stream=4), start + noise)
    edge = torch.full((size,), 2**63 - 1)
    assert torch.equal(generator.add_(edge, step=2, stream=4), noise - 1 + -(2**63))


def test_shape_and_strides_do_not_matter_only_the_row_major_index(generator):
    flat = fill(generator, 24 * 500)
    for view in (
        torch.empty(24, 500, dtype=torch.int64),
        torch.empty(500, 24, dtype=torch.int64).t(),
        torch.empty(24, 1000, dtype=torch.int64)[:, ::2],
    ):
        assert torch.equal(generator.fill_(view, step=0, stream=0).reshape(-1), flat)


def test_what_lies_between_strided_elements_is_untouched(generator):
    memory = torch.full((10, 10), 2**60)
    generator.fill_(memory[:, ::2], step=0, stream=0)
    assert (memory[:, 1::2] == 2**60).all()
    assert (memory[:, ::2] != 2**60).all()
    before = memory[:, ::2].clone()
    generator.add_(memory[:, ::2], step=0, stream=0)
    assert torch.equal(memory[:, ::2], 2 * before)


def test_a_scalar_and_an_empty_tensor(generator):
    assert generator.fill_(torch.tensor(9), step=0, stream=0) == fill(generator, 1)[0]
    assert generator.fill_(torch.empty(0, 5, dtype=torch.int64), step=0, stream=0).shape == (0, 5)


def test_positions_and_keys_have_noise_of_their_own(make):
    rows = torch.stack(
        [
            fill(make(TestKey(key)), 64, step=step, stream=stream)
            for key in ("a", "b")
            for step in (0, 1, MAX_STEP)
            for stream in (0, 1, MAX_STREAM)
        ]
    )
    assert len(torch.unique(rows, dim=0)) == len(rows)


@pytest.mark.parametrize(
    ("where", "name"),
    [({"step": -1}, "step"), ({"step": MAX_STEP + 1}, "step"), ({"stream": MAX_STREAM + 1}, "stream")],
)
def test_a_position_that_would_wrap_round_is_refused(generator, where, name):
    with pytest.raises(InvalidInputError, match=name):
        fill(generator, 3, **where)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (np.zeros(3, dtype=np.int64), "torch.Tensor"),
        (torch.zeros(3), "int64"),
        (torch.zeros(3, dtype=torch.int32), "int64"),
        (torch.zeros(1, dtype=torch.int64).expand(3), "overlap"),
    ],
    ids=["numpy", "float32", "int32", "expanded"],
)
def test_what_cannot_take_noise_is_refused(generator, out, said):
    with pytest.raises(InvalidInputError, match=said):
        generator.add_(out, step=0, stream=0)


def test_another_device_is_refused(generator):
    with pytest.raises(NoiseUnavailableError, match="meta"):
        generator.fill_(torch.empty(3, dtype=torch.int64, device="meta"), step=0, stream=0)


def test_whether_the_key_is_a_test_key_is_known(make):
    assert make(TestKey("x")).uses_test_key is True
    assert make(SecretKey.from_os()).uses_test_key is False
