"""What every normal generator promises, whatever its stream of words."""

import numpy as np
import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise import (
    FastNormalGenerator,
    SecretKey,
    SecureNormalGenerator,
    TestKey,
    make_generator,
)
from dp_flash_attention.noise.keystream import MAX_STEP, MAX_STREAM, TILE_NUMBERS
from dp_flash_attention.noise.writer import CHUNK_NUMBERS

MAKERS = {
    "secure, AES": lambda key: SecureNormalGenerator(key),
    "secure, ChaCha20": lambda key: SecureNormalGenerator(key, cipher="chacha20"),
    "fast": FastNormalGenerator,
}
SIZES = [
    1,
    2,
    5,
    TILE_NUMBERS - 1,
    TILE_NUMBERS,
    TILE_NUMBERS + 1,
    CHUNK_NUMBERS,
    CHUNK_NUMBERS + 3,
    3 * CHUNK_NUMBERS,
]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture
def generator(make):
    return make(TestKey("contract"))


def fill(generator, size, dtype=torch.float32, **where):
    out = torch.full((size,), float("nan"), dtype=dtype)
    return generator.fill_normal_(out, **{"step": 0, "stream": 0, **where})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_element_is_written_and_a_shorter_tensor_is_a_prefix(generator, size, dtype):
    whole = fill(generator, 3 * CHUNK_NUMBERS, dtype)
    assert torch.equal(fill(generator, size, dtype), whole[:size])
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(generator, dtype):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fill(generator, 5 * CHUNK_NUMBERS + 7, dtype, step=3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, TILE_NUMBERS + 9, CHUNK_NUMBERS + 1])
def test_adding_adds_what_filling_writes(generator, size, dtype):
    noise = generator.fill_normal_(torch.empty(size, dtype=dtype), stddev=0.3, step=2, stream=4)
    start = torch.linspace(-1, 1, size, dtype=dtype)
    added = generator.add_normal_(start.clone(), stddev=0.3, step=2, stream=4)
    assert torch.equal(added, start + noise)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_and_strides_do_not_matter_only_the_row_major_index(generator, dtype):
    flat = fill(generator, 24 * 2000, dtype)
    for view in (
        torch.empty(24, 2000, dtype=dtype),
        torch.empty(2000, 24, dtype=dtype).t(),
        torch.empty(24, 4000, dtype=dtype)[:, ::2],
        torch.empty(2, 12, 20, 100, dtype=dtype).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
    ):
        assert torch.equal(generator.fill_normal_(view, step=0, stream=0).reshape(-1), flat)


def test_what_lies_between_strided_elements_is_untouched(generator):
    memory = torch.full((10, 10), 7.0)
    generator.fill_normal_(memory[:, ::2], step=0, stream=0)
    assert (memory[:, 1::2] == 7.0).all()
    assert (memory[:, ::2] != 7.0).all()


def test_a_scalar_and_an_empty_tensor(generator):
    assert generator.fill_normal_(torch.tensor(9.0), step=0, stream=0) == fill(generator, 1)[0]
    assert generator.fill_normal_(torch.empty(0, 5), step=0, stream=0).shape == (0, 5)


def test_positions_keys_and_types_have_noise_of_their_own(make):
    columns = [
        fill(make(TestKey(key)), 64, dtype, step=step, stream=stream).float()
        for key in ("a", "b")
        for dtype in DTYPES
        for step in (0, 1, 2**32, MAX_STEP)
        for stream in (0, 1, 2**16, MAX_STREAM)
    ]
    matrix = torch.stack(columns)
    assert len({tuple(row.tolist()) for row in matrix}) == len(columns)
    # No value of one column turns up at another place of another one: streams are not shifted copies.
    assert len(torch.unique(matrix)) > 0.999 * matrix.numel()


def test_the_standard_deviation_scales_and_is_never_rounded_down(generator):
    ones = fill(generator, 4096, torch.float64)
    for stddev in (1e-3, 0.7, 12345.678):
        scaled = generator.fill_normal_(
            torch.empty(4096, dtype=torch.float64), stddev=stddev, step=0, stream=0
        )
        assert torch.allclose(scaled, ones * stddev, rtol=1e-14, atol=0)
        single = generator.fill_normal_(torch.empty(4096), stddev=stddev, step=0, stream=0)
        unit = fill(generator, 4096)
        assert torch.allclose(single, unit * stddev, rtol=1e-6, atol=0)


@pytest.mark.parametrize("stddev", [0, -1.0, float("nan"), float("inf"), None, "1", 2.0**-41, 2.0**61])
def test_a_standard_deviation_out_of_range_is_refused(generator, stddev):
    out = torch.full((3,), 5.0)
    with pytest.raises(InvalidInputError, match="stddev"):
        generator.add_normal_(out, stddev=stddev, step=0, stream=0)
    assert (out == 5.0).all()


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ({"step": -1}, "step"),
        ({"step": MAX_STEP + 1}, "step"),
        ({"step": 0.5}, "step"),
        ({"step": True}, "step"),
        ({"stream": -1}, "stream"),
        ({"stream": MAX_STREAM + 1}, "stream"),
    ],
)
def test_a_position_that_would_wrap_round_is_refused(generator, where, name):
    with pytest.raises(InvalidInputError, match=name):
        fill(generator, 3, **where)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (np.zeros(3), "torch.Tensor"),
        (torch.zeros(3, dtype=torch.float16), "float32 or float64"),
        (torch.zeros(3, dtype=torch.bfloat16), "float32 or float64"),
        (torch.zeros(3, dtype=torch.int64), "float32 or float64"),
        (torch.zeros(1).expand(3), "overlap"),
        (torch.zeros(5).unfold(0, 3, 1), "overlap"),
        (torch.zeros(3).to_sparse(), "dense"),
        (torch.zeros(3, requires_grad=True), "no_grad"),
    ],
    ids=["numpy", "half", "bfloat16", "integers", "expanded", "sliding", "sparse", "needs gradient"],
)
def test_what_cannot_take_noise_is_refused(generator, out, said):
    with pytest.raises(InvalidInputError, match=said):
        generator.fill_normal_(out, step=0, stream=0)


def test_another_device_is_refused(generator):
    with pytest.raises(NoiseUnavailableError, match="meta"):
        generator.fill_normal_(torch.empty(3, device="meta"), step=0, stream=0)


def test_autograd_notices_the_write(generator):
    x = torch.ones(3, requires_grad=True)
    saved = x * 1.0
    loss = (saved * saved).sum()
    with torch.no_grad():
        generator.fill_normal_(saved.detach(), step=0, stream=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_whether_the_key_is_a_test_key_is_known(make):
    assert make(TestKey("x")).uses_test_key is True
    assert make(SecretKey.from_os()).uses_test_key is False


def test_generators_are_found_by_name_and_nothing_else_is():
    assert isinstance(make_generator("secure", TestKey(1)), SecureNormalGenerator)
    assert isinstance(make_generator("fast", TestKey(1)), FastNormalGenerator)
    with pytest.raises(InvalidInputError, match="secure"):
        make_generator("torch", TestKey(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (7, 5), (2048, 64), (3000, 33), (2, CHUNK_NUMBERS + 1), (5, 0)]
)
def test_rows_may_have_deviations_of_their_own(generator, dtype, rows, width):
    deviations = torch.linspace(0.5, 3.0, rows, dtype=dtype)
    unit = generator.fill_normal_(torch.empty(rows, width, dtype=dtype), step=1, stream=2)
    start = torch.linspace(-1, 1, rows * width, dtype=dtype).view(rows, width)
    added = generator.add_row_normal_(start.clone(), row_stddev=deviations, step=1, stream=2)
    assert torch.equal(added, start + unit * deviations[:, None])


@pytest.mark.parametrize(
    ("out", "deviations"),
    [
        (torch.zeros(2, 3), torch.ones(3)),
        (torch.zeros(2, 3), torch.ones(2, dtype=torch.float64)),
        (torch.zeros(3, 2).t(), torch.ones(2)),
        (torch.zeros(6), torch.ones(6)),
        (torch.zeros(2, 3), torch.tensor([1.0, 0.0])),
        (torch.zeros(2, 3), torch.tensor([1.0, float("nan")])),
        (torch.zeros(2, 3), 1.0),
    ],
)
def test_deviations_that_do_not_fit_their_rows_are_refused(generator, out, deviations):
    with pytest.raises(InvalidInputError):
        generator.add_row_normal_(out, row_stddev=deviations, step=0, stream=0)
    assert (out == 0.0).all()
