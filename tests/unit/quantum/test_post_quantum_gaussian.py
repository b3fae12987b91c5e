"""What is released is what is accounted. Fixed keys; each statistical test's false-alarm rate is 1e-4 over keys."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import SecretKey, TestKey, WideSecretKey
from dp_flash_attention.quantum import post_quantum_gaussian
from dp_flash_attention.quantum.exact_noise import ExactNoise
from dp_flash_attention.quantum.post_quantum_gaussian import PostQuantumGaussian

BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)
ADD_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
ONE = Sensitivity(l2=1.0, neighboring_relation=ADD_REMOVE)
ALARM = 1e-4
BOUND = stats.norm.isf(ALARM / 2)
NUM = 40_000


def mechanism(**changes):
    return PostQuantumGaussian(key=TestKey("mechanism"), **changes)


def variance_score(released):
    """Standard score of the realised noise variance against the stated one, for a value of zeros."""
    scaled = np.asarray(released.value, dtype=np.float64) / released.noise_stddev
    return (np.mean(scaled**2) - 1.0) / math.sqrt(2.0 / scaled.size)


def test_the_noise_has_the_stated_scale():
    assert abs(variance_score(mechanism().release(np.zeros(NUM), ONE, BUDGET))) < BOUND


def with_noise(monkeypatch, change):
    stream = ExactNoise.stream

    def changed(self, key, num, consume, **settings):
        stream(self, key, num, lambda start, noise: consume(start, change(noise)), **settings)

    monkeypatch.setattr(ExactNoise, "stream", changed)


def test_noise_twice_too_small_is_noticed(monkeypatch):
    with_noise(monkeypatch, lambda noise: noise // 2)
    assert variance_score(mechanism().release(np.zeros(NUM), ONE, BUDGET)) < -BOUND


def test_no_noise_is_noticed(monkeypatch):
    with_noise(monkeypatch, lambda noise: 0 * noise)
    assert variance_score(mechanism().release(np.zeros(NUM), ONE, BUDGET)) < -BOUND


def test_everything_released_lies_on_the_grid():
    released = mechanism().release(np.linspace(-1, 1, 999), ONE, BUDGET)
    steps = released.value / released.grid
    assert np.array_equal(steps, np.rint(steps))


@pytest.mark.parametrize(
    "value",
    [
        7,
        7.25,
        np.full((2, 3), 5),
        np.full((2, 3), 5.0, np.float32),
        torch.full((4,), 2.0),
        torch.full((4,), 2),
    ],
    ids=str,
)
def test_kind_shape_and_dtype_come_back(value):
    found = mechanism().release(value, ONE, BUDGET).value
    assert type(found) is type(value)
    if not isinstance(value, int | float):
        assert found.dtype == value.dtype
        assert found.shape == value.shape
    assert not np.array_equal(np.asarray(found), np.asarray(value))


def test_the_release_is_near_the_value():
    value = np.arange(1000.0)
    released = mechanism().release(value, ONE, BUDGET)
    assert np.abs(released.value - value).max() < 7 * released.noise_stddev


def largest_move(release, first, second):
    """How far apart the same noise leaves two neighbours, over what is accounted, and both releases."""
    one, other = release(first), release(second)
    return float(np.linalg.norm(one.value - other.value)), one


def test_a_clipped_value_moves_by_at_most_what_is_accounted():
    wide = Sensitivity(l2=1e6, neighboring_relation=ADD_REMOVE)
    first, second = np.full(16, 1e5), np.full(16, -1e5)

    def release(value):
        return mechanism(l2_clip_norm=2.0).release(value, wide, BUDGET)

    moved, found = largest_move(release, first, second)
    plan = mechanism(l2_clip_norm=2.0).plan(dimension=16, sensitivity=wide, budget=BUDGET)
    assert 3.9 < moved <= plan.grid_sensitivity * plan.grid
    assert found.noise_stddev == pytest.approx(plan.noise_stddev)


def test_no_clip_is_noticed(monkeypatch):
    monkeypatch.setattr(post_quantum_gaussian, "_projected", lambda vector, clip: vector)
    wide = Sensitivity(l2=1e6, neighboring_relation=ADD_REMOVE)

    def release(value):
        return mechanism(l2_clip_norm=2.0).release(value, wide, BUDGET)

    moved, _ = largest_move(release, np.full(16, 1e5), np.full(16, -1e5))
    plan = mechanism(l2_clip_norm=2.0).plan(dimension=16, sensitivity=wide, budget=BUDGET)
    assert moved > plan.grid_sensitivity * plan.grid


def test_rounding_that_is_not_accounted_would_be_noticed():
    # The worst pair for rounding: half a step below and above, in every coordinate.
    d, grid = 256, 2.0**-6
    found = mechanism(grid=grid)
    step = 3 * grid + 2e-12
    apart = Sensitivity(l2=step * math.sqrt(d) * (1 + 1e-9), neighboring_relation=ADD_REMOVE)
    plan = found.plan(dimension=d, sensitivity=apart, budget=BUDGET)
    base = np.full(d, 0.5 * grid - 1e-12)
    first = PostQuantumGaussian(key=TestKey("same"), grid=grid).release(base, apart, BUDGET).value
    second = PostQuantumGaussian(key=TestKey("same"), grid=grid).release(base + step, apart, BUDGET).value
    moved = float(np.linalg.norm(second - first)) / grid
    assert moved > 1.3 * apart.l2 / grid  # far more than the sensitivity alone
    assert moved <= plan.grid_sensitivity


def test_a_sum_of_rows_clips_each_row_and_has_its_law():
    rows = np.zeros((30, NUM // 10))
    rows[:, 0] = 1e9
    released = mechanism().release_sum(rows, 1.0, BUDGET)
    assert released.value[0] == pytest.approx(30.0, abs=8 * released.noise_stddev)
    rest = released.value[1:] / released.noise_stddev
    assert abs((np.mean(rest**2) - 1.0) / math.sqrt(2.0 / rest.size)) < BOUND


@pytest.mark.parametrize(("relation", "times"), [(ADD_REMOVE, 1.0), (NeighboringRelation.REPLACE_ONE, 2.0)])
def test_one_row_moves_the_sum_by_at_most_what_is_accounted(relation, times, rng):
    rows = rng.normal(0, 3, (5, 400))
    changed = rows[:-1] if times == 1.0 else np.concatenate([rows[:-1], -50.0 * rows[-1:]])
    release = {
        name: PostQuantumGaussian(key=TestKey("same")).release_sum(
            data, 1.5, BUDGET, neighboring_relation=relation
        )
        for name, data in (("all", rows), ("changed", changed))
    }
    moved = float(np.linalg.norm(release["all"].value - release["changed"].value))
    stated = float(release["all"].guarantee.sensitivity.split("; ")[1].split()[0])
    assert 0.9 * times * 1.5 < moved <= stated * (1 + 1e-5)
    assert release["all"].guarantee.neighboring_relation is relation


@pytest.mark.parametrize("rows", [np.zeros((0, 500)), torch.zeros(0, 500)], ids=["array", "tensor"])
def test_a_sum_of_no_rows_is_a_release_like_any_other(rows):
    released = mechanism().release_sum(rows, 1.0, BUDGET)
    assert type(released.value) is type(rows)
    assert released.value.shape == (500,)
    assert abs(variance_score(released)) < BOUND


def test_rows_that_are_no_matrix_are_refused():
    with pytest.raises(InvalidInputError, match="rows"):
        mechanism().release_sum(np.zeros(4), 1.0, BUDGET)


def test_a_stored_key_never_repeats_noise_and_two_releases_never_share_it():
    key = SecretKey.from_os()
    draws = [PostQuantumGaussian(key=key).release(np.zeros(20), ONE, BUDGET).value for _ in range(2)]
    one = PostQuantumGaussian(key=key)
    draws += [one.release(np.zeros(20), ONE, BUDGET).value for _ in range(2)]
    assert len({draw.tobytes() for draw in draws}) == 4


def test_a_test_key_is_reported_and_a_secret_one_has_128_bits():
    assert mechanism().release(1.0, ONE, BUDGET).quantum_security_bits == 0
    found = PostQuantumGaussian().release(1.0, ONE, BUDGET)
    assert found.quantum_security_bits == 128
    assert any("Grover" in line for line in found.assumed)


@pytest.mark.parametrize("cipher", ["aes-256-ctr", "chacha20", "shake256"])
def test_every_cipher_gives_the_law(cipher):
    released = mechanism(cipher=cipher).release(np.zeros(NUM), ONE, BUDGET)
    assert abs(variance_score(released)) < BOUND


def test_a_wide_key_from_two_sources_carries_256_bits_against_quantum_search():
    wide = WideSecretKey.from_bytes(bytes(range(64)), entropy_bits=512)
    found = PostQuantumGaussian(key=wide).release(np.zeros(NUM), ONE, BUDGET)
    assert found.quantum_security_bits == 256
    assert abs(variance_score(found)) < BOUND
    # The same length from the operating system alone is worth 256 bits, so 128.
    alone = WideSecretKey.from_bytes(bytes(range(64)), entropy_bits=256)
    assert PostQuantumGaussian(key=alone).release(1.0, ONE, BUDGET).quantum_security_bits == 128


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_clip_norm_out_of_range_is_refused(bad):
    with pytest.raises(InvalidInputError, match="l2_clip_norm"):
        PostQuantumGaussian(l2_clip_norm=bad)


@pytest.mark.parametrize(
    "rows", [np.zeros((0, 5), dtype=np.float32), torch.zeros(0, 5)], ids=["array", "tensor"]
)
def test_a_sum_of_no_rows_is_released_like_any_other(rows):
    """An error would tell no row from one, which add/remove makes private."""
    released = mechanism().release_sum(rows, 1.0, BUDGET)
    assert type(released.value) is type(rows)
    assert tuple(released.value.shape) == (5,)
    assert released.value.dtype == rows.dtype
    assert released.noise_stddev == mechanism().release_sum(np.ones((1, 5)), 1.0, BUDGET).noise_stddev
    assert float(abs(released.value).max()) > 0


BROKEN = [np.nan, np.inf, -np.inf, 1e300]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize(
    "make", [np.array, lambda rows: torch.tensor(rows, dtype=torch.float32)], ids=["array", "tensor"]
)
def test_a_broken_record_neither_raises_nor_moves_the_sum_further_than_any_other(broken, make, rng):
    """Before, one NaN record made the release raise: an observer told the neighbours apart for sure."""
    rows = rng.normal(0, 3, (5, 40))
    rows[-1, ::3] = broken
    both = [
        PostQuantumGaussian(key=TestKey("same")).release_sum(make(data), 1.5, BUDGET)
        for data in (rows, rows[:-1])
    ]
    moved = float(np.linalg.norm(np.asarray(both[0].value) - np.asarray(both[1].value)))
    stated = float(both[0].guarantee.sensitivity.split("; ")[1].split()[0])
    assert moved <= stated * (1 + 1e-5)
    assert np.isfinite(np.asarray(both[0].value)).all()


def test_a_record_whose_infinities_were_taken_after_the_clip_would_be_noticed(monkeypatch):
    monkeypatch.setattr(post_quantum_gaussian, "_projected", lambda vector, clip: vector)
    rows = np.array([[1.0, 2.0], [np.inf, np.nan]])
    both = [
        PostQuantumGaussian(key=TestKey("same")).release_sum(data, 1.5, BUDGET) for data in (rows, rows[:1])
    ]
    moved = float(np.linalg.norm(both[0].value - both[1].value))
    assert moved > float(both[0].guarantee.sensitivity.split("; ")[1].split()[0])


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_given_value_is_released_whatever_it_holds_and_saturates_where_it_says(broken, clip):
    value = np.array([1.0, broken, 0.5])
    release = mechanism(l2_clip_norm=clip).release(value, ONE, BUDGET)
    plan = mechanism(l2_clip_norm=clip).plan(dimension=3, sensitivity=ONE, budget=BUDGET)
    end = {None: plan.reach, 2.0: 2.0}[clip]
    wanted = 0.0 if math.isnan(broken) else math.copysign(end, broken)
    assert release.value[1] == pytest.approx(wanted, abs=9 * release.noise_stddev)
    assert plan.reach == 2.0**52 * plan.grid


def test_a_sum_that_is_too_large_for_the_grid_saturates():
    release = mechanism(grid=2.0**-42).release_sum(np.full((2048, 1), 1e30), 1.0, BUDGET)
    assert release.value[0] == pytest.approx(2.0**52 * 2.0**-42, abs=9 * release.noise_stddev)
