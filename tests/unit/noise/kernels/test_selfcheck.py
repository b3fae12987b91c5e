"""The check before the first use: it agrees, it sees mistakes, and a failed one stops the noise."""

import pytest
import torch
import triton.language as tl

from dp_flash_attention.core.errors import NoiseUnavailableError
from dp_flash_attention.noise.kernels import transform, writer
from dp_flash_attention.noise.kernels.selfcheck import STEPS, check_generator, disagreement
from dp_flash_attention.noise.keystream import TILE_NUMBERS, Domain, new_buffer
from dp_flash_attention.noise.targets import float32_two_variance


@pytest.fixture(autouse=True)
def _fresh():
    disagreement.cache_clear()
    yield
    disagreement.cache_clear()


@pytest.mark.parametrize("cipher", STEPS)
def test_it_agrees_and_runs_once(cipher):
    runs = []

    def write(out, key):
        runs.append(1)
        writer._fill(out, key)

    assert disagreement(write, "cpu", cipher) is None
    assert disagreement(write, "cpu", cipher) is None
    assert len(runs) == 1


@pytest.mark.parametrize("cipher", STEPS)
def test_its_position_takes_the_refining_path_where_that_shows(cipher):
    source = check_generator(cipher)._keystream.at(step=STEPS[cipher], stream=0)
    size = 8 * TILE_NUMBERS
    words = source.read(size, domain=Domain.FLOAT32, block=0, buffer=new_buffer(size)).view("<u4")
    assert words.reshape(2, 2, -1)[:, 0].min() < 64


def test_it_sees_refining_words_of_another_domain(monkeypatch):
    monkeypatch.setattr(transform, "_FLOAT32_REFINEMENT", tl.constexpr(int(Domain.FLOAT64)))
    assert "differ from the CPU's" in disagreement(writer._fill, "cpu", "chacha20")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out, key: out.normal_(),
        lambda out, key: out.zero_(),
        lambda out, key: None,  # the NaN stay
        lambda out, key: (writer._fill(out, key), out.mul_(1.001)),
    ],
)
def test_it_sees_other_noise_no_noise_and_a_wrong_scale(wrong):
    assert "differ from the CPU's" in disagreement(wrong, "cpu", "philox4x64")


def test_a_failed_check_stops_the_noise_and_leaves_the_tensor(monkeypatch):
    monkeypatch.setattr(writer, "disagreement", lambda *args: "1 of 2 numbers differ")
    out = torch.zeros(5)
    with pytest.raises(NoiseUnavailableError, match="failed its check"):
        writer.write_normals(
            out,
            two_variance=float32_two_variance(1.0),
            key=check_generator("philox4x64").kernel_key(0),
            stream=0,
            add=True,
        )
    assert torch.equal(out, torch.zeros(5))
