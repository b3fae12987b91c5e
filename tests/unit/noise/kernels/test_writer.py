"""Whole tensors from the kernel against the CPU generators; which path runs; what is refused."""

import sys

import numpy as np
import pytest
import torch

from dp_flash_attention.core.errors import (
    DependencyMissingError,
    InvalidInputError,
    NoiseReuseError,
    NoiseUnavailableError,
)
from dp_flash_attention.noise import FastNormalGenerator, SecureNormalGenerator, TestKey, make_generator
from dp_flash_attention.noise import writer as cpu_writer
from dp_flash_attention.noise.kernels import write_normals
from dp_flash_attention.noise.kernels import writer as kernel_writer
from dp_flash_attention.noise.keystream import MAX_STEP, MAX_STREAM, TILE_NUMBERS
from dp_flash_attention.noise.targets import float32_two_variance

GENERATORS = {
    "secure": make_generator("secure", TestKey("kernel writer"), cipher="chacha20"),
    "fast": make_generator("fast", TestKey("kernel writer")),
}
# See test_transform.py; atol is for a standard deviation of 1.
CLOSE = {"rtol": 16 * 2.0**-24, "atol": 2.0**-25}


def written(generator, out, *, stddev=1.0, step=0, stream=0, add=False, tiles_per_program=2):
    write_normals(
        out,
        two_variance=float32_two_variance(stddev),
        key=generator.kernel_key(step),
        stream=stream,
        add=add,
        tiles_per_program=tiles_per_program,
    )
    return out


@pytest.fixture(params=GENERATORS)
def generator(request):
    return GENERATORS[request.param]


@pytest.fixture
def on_kernel(monkeypatch):
    """Makes generators launch the kernel for CPU tensors, as they do for CUDA tensors; counts the launches."""
    launches = []

    def counted(out, **arguments):
        launches.append(out.numel())
        write_normals(out, **arguments)

    monkeypatch.setattr(cpu_writer, "runs_on_kernel", lambda out: True)
    monkeypatch.setattr("dp_flash_attention.noise.kernels.write_normals", counted)
    return launches


@pytest.mark.parametrize(
    "size", [1, 17, TILE_NUMBERS - 1, TILE_NUMBERS, TILE_NUMBERS + 1, 4 * TILE_NUMBERS + 129]
)
def test_every_element_is_written_and_nothing_behind_it(generator, size):
    poisoned = torch.full((size + 5,), float("nan"))
    got = written(generator, poisoned[:size], step=4, stream=9)
    assert torch.isnan(poisoned[size:]).all()
    want = generator.fill_normal_(torch.empty(size), step=4, stream=9)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize(("step", "stream"), [(0, MAX_STREAM), (MAX_STEP, 0), (2**32, 2**31)])
def test_positions_and_scale(generator, step, stream):
    where = {"stddev": 3.7, "step": step, "stream": stream}
    got = written(generator, torch.full((3, 700), float("nan")), **where)
    want = generator.fill_normal_(torch.empty(3, 700), **where)
    torch.testing.assert_close(got / 3.7, want / 3.7, **CLOSE)


def test_adding_adds_what_filling_writes(generator):
    where = {"stddev": 0.3, "step": 2, "stream": 4}
    noise = written(generator, torch.empty(TILE_NUMBERS + 9), **where)
    start = torch.linspace(-1, 1, TILE_NUMBERS + 9)
    # A fused product and sum may round once less than the two.
    torch.testing.assert_close(written(generator, start.clone(), **where, add=True), start + noise, **CLOSE)


def test_the_work_of_a_program_changes_nothing(generator):
    results = [
        written(generator, torch.empty(9 * TILE_NUMBERS), tiles_per_program=tiles) for tiles in (1, 4, 16)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_comparison_sees_a_wrong_position_and_a_wrong_scale(generator):
    right = {"stddev": 1.0, "step": 1, "stream": 1}
    want = generator.fill_normal_(torch.empty(100), **right)
    for wrong in ({"step": 2}, {"stream": 2}, {"stddev": 1.0001}):
        assert not torch.allclose(written(generator, torch.empty(100), **{**right, **wrong}), want, **CLOSE)


def test_a_generator_runs_the_kernel_for_such_a_tensor_and_only_then(generator, on_kernel, monkeypatch):
    kernel = generator.fill_normal_(torch.empty(50), step=1, stream=0)
    assert on_kernel == [50]
    added = generator.add_normal_(torch.ones(50), stddev=1.0, step=1, stream=0)
    assert on_kernel == [50, 50]
    generator.fill_normal_(torch.empty(0), step=1, stream=0)
    assert on_kernel == [50, 50]
    monkeypatch.undo()
    cpu = generator.fill_normal_(torch.empty(50), step=1, stream=0)
    assert on_kernel == [50, 50]
    torch.testing.assert_close(kernel, cpu, **CLOSE)
    torch.testing.assert_close(added, 1 + cpu, **CLOSE)


def test_autograd_notices_the_write(generator, on_kernel):
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    generator.add_normal_(y.detach(), stddev=1.0, step=0, stream=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_aes_has_no_kernel_and_nothing_is_switched_in_silence(on_kernel):
    out = torch.zeros(10)
    with pytest.raises(NoiseUnavailableError, match="chacha20"):
        SecureNormalGenerator(TestKey("aes")).add_normal_(out, stddev=1.0, step=0, stream=0)
    with pytest.raises(NoiseUnavailableError, match="chacha20"):
        make_generator("secure", TestKey("aes")).fill_normal_(out, step=0, stream=0)
    assert on_kernel == []
    assert torch.equal(out, torch.zeros(10))


def test_a_missing_triton_is_an_error_with_its_remedy(on_kernel, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(DependencyMissingError, match=r"dp-flash-attention\[kernels\]"):
        FastNormalGenerator(TestKey("t")).fill_normal_(torch.empty(3), step=0, stream=0)


def test_what_the_kernel_cannot_write_to_is_refused(generator, on_kernel):
    with pytest.raises(InvalidInputError, match="float32 on a GPU"):
        generator.fill_normal_(torch.empty(3, dtype=torch.float64), step=0, stream=0)
    with pytest.raises(InvalidInputError, match="contiguous on a GPU"):
        generator.fill_normal_(torch.empty(3, 4).T, step=0, stream=0)


def test_a_captured_graph_would_replay_the_noise_and_is_refused(generator, monkeypatch):
    class OnDevice:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(NoiseReuseError, match="same noise"):
        kernel_writer.refuse_graph_capture(OnDevice())


def test_a_cipher_is_for_secure_noise_alone():
    assert make_generator("secure", TestKey("c"), cipher="chacha20").cipher == "chacha20"
    assert make_generator("secure", TestKey("c")).cipher == "aes-256-ctr"
    with pytest.raises(InvalidInputError, match="None for noise 'fast'"):
        make_generator("fast", TestKey("c"), cipher="chacha20")


def test_a_kernel_key_never_shows_its_words(generator):
    key = generator.kernel_key(7)
    shown = repr(key) + str(key)
    assert "step=7" in shown
    assert not any(str(word) in shown for word in key.words if word > 99)
    assert np.all(np.array(key.words) < 2**32)
