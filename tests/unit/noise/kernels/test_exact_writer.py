"""Exact noise from the kernel: every integer is the CPU's; which path runs; the self-check; what is refused."""

import sys
from fractions import Fraction

import pytest
import torch
import triton.language as tl

from dp_flash_attention.core.errors import (
    DependencyMissingError,
    InvalidInputError,
    NoiseReuseError,
    NoiseUnavailableError,
)
from dp_flash_attention.noise import DiscreteGaussianGenerator, TestKey
from dp_flash_attention.noise import discrete_gaussian as cpu
from dp_flash_attention.noise.discrete_gaussian_scan import TILE, TableScan
from dp_flash_attention.noise.kernels import discrete_gaussian as kernel
from dp_flash_attention.noise.kernels import exact_writer
from dp_flash_attention.noise.kernels.exact_writer import (
    CHECK_LAYERS,
    CHECK_NUMBERS,
    CHECK_STEP,
    KernelTables,
    disagreement,
    write_discrete_gaussian,
)
from dp_flash_attention.noise.keystream import MAX_STEP, MAX_STREAM, Domain

KEY = TestKey("exact kernel")
POISON = -(2**63)


def generator(**law):
    return DiscreteGaussianGenerator(KEY, cipher="chacha20", **law)


def written(made, out, *, step=0, stream=0, add=False):
    tables = KernelTables.build(made.tables, made.certificate.layers.multiplier, out.device)
    exact_writer._launch(out, tables, made.kernel_key(step), stream, add)
    return out


def wanted(made, size, *, step=0, stream=0):
    return made.fill_(torch.empty(size, dtype=torch.int64), step=step, stream=stream)


@pytest.mark.parametrize(
    "law",
    [
        {"stddev": Fraction(1, 8)},
        {"stddev": 4},
        {"variance": Fraction(50, 3)},
        {"stddev": 24},  # the widest table
        {"stddev": 40},  # two layers
        {"variance": Fraction(10**6, 3)},  # three layers
        pytest.param({"variance": Fraction(2**56)}, marks=pytest.mark.slow),  # past 32 bits
    ],
    ids=str,
)
def test_every_integer_is_the_cpu_s_and_nothing_behind_is_written(law):
    made = generator(**law)
    size = 77 if len(made.tables) > 3 else TILE + 77
    poisoned = torch.full((size + 5,), POISON)
    written(made, poisoned[:size], step=4, stream=9)
    assert torch.equal(poisoned[:size], wanted(made, size, step=4, stream=9))
    assert (poisoned[size:] == POISON).all()


@pytest.mark.parametrize(
    ("size", "step", "stream"),
    [
        (1, 0, MAX_STREAM),
        (63, MAX_STEP, 0),
        (65, 1, 1),
        (TILE - 1, 2**32, 2**31),
        (TILE, 0, 0),
        (TILE + 1, MAX_STEP, MAX_STREAM),
    ],
)
def test_odd_lengths_and_positions(size, step, stream):
    made = generator(stddev=2)
    got = written(made, torch.full((size,), POISON), step=step, stream=stream)
    assert torch.equal(got, wanted(made, size, step=step, stream=stream))


def test_a_part_of_a_tensor_and_a_shape_get_the_numbers_of_their_own_order():
    made = generator(stddev=4)
    base = torch.full((3 + 30 * 70,), POISON)
    written(made, base[3:].view(30, 70), step=1)
    assert (base[:3] == POISON).all()
    assert torch.equal(base[3:], wanted(made, 2100, step=1))


def test_adding_adds_modulo_2_to_the_64():
    made = generator(stddev=30)
    for start in (0, 2**63 - 5, -(2**63) + 5, 10**12):
        got = written(made, torch.full((300,), start), step=2, add=True)
        assert torch.equal(got, torch.full((300,), start) + wanted(made, 300, step=2))


def test_the_comparison_sees_another_position_law_and_key():
    made = generator(stddev=4)
    want = wanted(made, 100, step=1, stream=1)
    others = [
        written(made, torch.zeros(100, dtype=torch.int64), step=2, stream=1),
        written(made, torch.zeros(100, dtype=torch.int64), step=1, stream=2),
        written(generator(stddev=5), torch.zeros(100, dtype=torch.int64), step=1, stream=1),
    ]
    assert not any(torch.equal(other, want) for other in others)


@pytest.fixture
def on_kernel(monkeypatch):
    """Makes generators launch the kernel for CPU tensors, as they do for CUDA tensors; counts the launches."""
    launches = []

    def counted(out, **arguments):
        launches.append(out.numel())
        write_discrete_gaussian(out, **arguments)

    monkeypatch.setattr(
        cpu, "runs_on_kernel", lambda out: out.numel() < 100
    )  # not what the self-check compares with
    monkeypatch.setattr(exact_writer, "write_discrete_gaussian", counted)
    return launches


def test_a_generator_runs_the_kernel_for_such_a_tensor_and_only_then(on_kernel, monkeypatch):
    made = generator(stddev=4)
    filled = made.fill_(torch.empty(50, dtype=torch.int64), step=1, stream=3)
    added = made.add_(torch.ones(50, dtype=torch.int64), step=1, stream=3)
    made.fill_(torch.empty(0, dtype=torch.int64), step=1, stream=3)
    assert on_kernel == [50, 50]
    monkeypatch.undo()
    want = wanted(made, 50, step=1, stream=3)
    assert on_kernel == [50, 50]
    assert torch.equal(filled, want)
    assert torch.equal(added, 1 + want)


@pytest.mark.parametrize("cipher", ["aes-256-ctr", "shake256"])
def test_other_ciphers_have_no_kernel_and_nothing_is_switched_in_silence(cipher, on_kernel):
    out = torch.zeros(10, dtype=torch.int64)
    made = DiscreteGaussianGenerator(KEY, stddev=4, cipher=cipher)
    with pytest.raises(NoiseUnavailableError, match="no GPU kernel"):
        made.add_(out, step=0, stream=0)
    assert on_kernel == []
    assert not out.any()


def test_what_the_kernel_cannot_write_to_is_refused(on_kernel):
    made = generator(stddev=4)
    with pytest.raises(InvalidInputError, match="int64"):
        made.fill_(torch.empty(3), step=0, stream=0)
    with pytest.raises(InvalidInputError, match="contiguous on a GPU"):
        made.fill_(torch.empty(3, 4, dtype=torch.int64).T, step=0, stream=0)
    with pytest.raises(InvalidInputError, match="step"):
        made.fill_(torch.empty(3, dtype=torch.int64), step=-1, stream=0)


def test_a_missing_triton_is_an_error_with_its_remedy(on_kernel, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(DependencyMissingError, match=r"dp-flash-attention\[kernels\]"):
        generator(stddev=4).fill_(torch.empty(3, dtype=torch.int64), step=0, stream=0)


def test_a_captured_graph_is_refused_before_anything_is_written(monkeypatch):
    def refuse(out):
        raise NoiseReuseError("a graph is being captured")

    monkeypatch.setattr(exact_writer, "refuse_graph_capture", refuse)
    made, out = generator(stddev=4), torch.zeros(5, dtype=torch.int64)
    tables = KernelTables.build(made.tables, 1, out.device)
    with pytest.raises(NoiseReuseError):
        write_discrete_gaussian(out, tables=tables, key=made.kernel_key(0), stream=0, add=True)
    assert not out.any()


def check_key():
    return DiscreteGaussianGenerator(
        TestKey("exact noise kernel self-check"), layers=CHECK_LAYERS, cipher="chacha20"
    )


def test_the_self_check_s_position_takes_both_branches(monkeypatch):
    overflown = []
    overflow = TableScan._overflow
    monkeypatch.setattr(
        TableScan,
        "_overflow",
        lambda self, tile, *rest: overflown.append(tile) or overflow(self, tile, *rest),
    )
    check_key().fill_(torch.empty(CHECK_NUMBERS, dtype=torch.int64), step=CHECK_STEP, stream=0)
    assert overflown == [0]  # one of the two layers of the tile that is compared whole


def test_the_self_check_agrees_and_runs_once():
    runs = []

    def write(out, *rest):
        runs.append(1)
        exact_writer._write(out, *rest)

    assert disagreement(write, "cpu") is None
    assert disagreement(write, "cpu") is None
    assert len(runs) == 2


def test_the_self_check_sees_overflow_bits_of_another_domain(monkeypatch):
    monkeypatch.setattr(kernel, "_OVERFLOW", tl.constexpr(int(Domain.BITS)))
    assert "differ from the CPU's" in disagreement(lambda *args: exact_writer._write(*args), "cpu")


def test_the_self_check_sees_slots_of_another_place(monkeypatch):
    monkeypatch.setattr(kernel, "_SLOT_UNIT", tl.constexpr(271))
    assert "differ from the CPU's" in disagreement(lambda *args: exact_writer._write(*args), "cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out, tables, key, add: None,
        lambda out, tables, key, add: out.zero_(),
        lambda out, tables, key, add: out.copy_(
            check_key().fill_(torch.empty_like(out), step=CHECK_STEP, stream=0)
        ),  # never adds
        lambda out, tables, key, add: (
            check_key().add_(out, step=CHECK_STEP, stream=0)
            if add
            else out.copy_(check_key().fill_(torch.empty_like(out), step=CHECK_STEP, stream=0)).abs_()
        ),
    ],
)
def test_the_self_check_sees_no_noise_no_sign_and_no_addition(wrong):
    assert "differ from the CPU's" in disagreement(wrong, "cpu")


def test_a_failed_check_stops_the_noise_and_leaves_the_tensor(monkeypatch):
    monkeypatch.setattr(exact_writer, "disagreement", lambda *args: "1 of 2 integers differ")
    made, out = generator(stddev=4), torch.zeros(5, dtype=torch.int64)
    tables = KernelTables.build(made.tables, 1, out.device)
    with pytest.raises(NoiseUnavailableError, match="failed its check"):
        write_discrete_gaussian(out, tables=tables, key=made.kernel_key(0), stream=0, add=True)
    assert not out.any()
