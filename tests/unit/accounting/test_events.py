import pytest

from dp_flash_attention.accounting import (
    GaussianRelease,
    PoissonSampledGaussian,
    ShuffledGaussian,
    delta,
    epsilon,
)
from dp_flash_attention.accounting.events import as_events
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation

ADD_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE = NeighboringRelation.REPLACE_ONE


@pytest.mark.parametrize("field", ["sampling_prob", "noise_multiplier", "num_steps"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), None, True, "1"])
def test_a_field_outside_its_range_is_named(field, value):
    fields = {"sampling_prob": 0.1, "noise_multiplier": 1.0, "num_steps": 1} | {field: value}
    with pytest.raises(InvalidInputError, match=field):
        PoissonSampledGaussian(**fields)


def test_a_sampling_probability_above_one_is_refused():
    with pytest.raises(InvalidInputError, match="sampling_prob"):
        PoissonSampledGaussian(sampling_prob=1.01, noise_multiplier=1.0, num_steps=1)


def test_fractional_counts_are_refused():
    with pytest.raises(InvalidInputError, match="count"):
        GaussianRelease(noise_multiplier=1.0, count=1.5)


def test_events_are_frozen_and_keyword_only():
    event = GaussianRelease(noise_multiplier=1.0)
    with pytest.raises(AttributeError):
        event.noise_multiplier = 2.0
    with pytest.raises(TypeError):
        GaussianRelease(1.0)


@pytest.mark.parametrize("relation", ["add_or_remove_one", None])
def test_the_relation_is_a_type_and_not_a_string(relation):
    with pytest.raises(InvalidInputError, match="neighboring_relation"):
        GaussianRelease(noise_multiplier=1.0, neighboring_relation=relation)


def test_shuffling_cannot_claim_add_or_remove():
    with pytest.raises(InvalidInputError, match="replace_one"):
        ShuffledGaussian(noise_multiplier=1.0, num_epochs=1, neighboring_relation=ADD_REMOVE)


def test_events_of_different_relations_do_not_compose():
    sampled = PoissonSampledGaussian(sampling_prob=0.1, noise_multiplier=1.0, num_steps=1)
    shuffled = ShuffledGaussian(noise_multiplier=1.0, num_epochs=1)
    with pytest.raises(InvalidInputError, match="neighboring_relation"):
        epsilon([sampled, shuffled], delta=1e-6)


@pytest.mark.parametrize("events", [[], [object()], [None], ["poisson"]])
def test_nothing_and_foreign_objects_are_refused(events):
    with pytest.raises(InvalidInputError, match="event"):
        as_events(events)


def test_one_event_and_a_list_of_one_are_the_same():
    event = GaussianRelease(noise_multiplier=2.0)
    assert as_events(event) == as_events([event]) == (event,)


def test_shuffling_is_not_accounted_as_poisson():
    # 10 epochs in batches of 1 %: as Poisson 1000 steps at q = 0.01, as shuffling 10 full Gaussians of 2C.
    # Claiming the first for the second is the published error (Chua et al. 2024).
    poisson = PoissonSampledGaussian(sampling_prob=0.01, noise_multiplier=1.0, num_steps=1000)
    shuffled = ShuffledGaussian(noise_multiplier=1.0, num_epochs=10)
    assert epsilon(shuffled, delta=1e-6) > 10 * epsilon(poisson, delta=1e-6)


def test_shuffling_costs_a_gaussian_of_twice_the_clip_norm_per_epoch():
    shuffled = ShuffledGaussian(noise_multiplier=3.0, num_epochs=4)
    gaussian = GaussianRelease(noise_multiplier=1.5, count=4, neighboring_relation=REPLACE)
    assert epsilon(shuffled, delta=1e-6) == epsilon(gaussian, delta=1e-6)


def test_replace_one_costs_more_than_add_or_remove():
    fields = {"sampling_prob": 0.05, "noise_multiplier": 2.0, "num_steps": 50}
    added = PoissonSampledGaussian(**fields)
    replaced = PoissonSampledGaussian(**fields, neighboring_relation=REPLACE)
    assert epsilon(replaced, delta=1e-6) > 1.5 * epsilon(added, delta=1e-6)
    assert delta(replaced, epsilon=1.0) > delta(added, epsilon=1.0)


def test_replace_one_without_sampling_is_a_shift_by_twice_the_clip_norm():
    replaced = PoissonSampledGaussian(
        sampling_prob=1.0, noise_multiplier=4.0, num_steps=3, neighboring_relation=REPLACE
    )
    added = PoissonSampledGaussian(sampling_prob=1.0, noise_multiplier=2.0, num_steps=3)
    assert epsilon(replaced, delta=1e-6) == pytest.approx(epsilon(added, delta=1e-6), rel=1e-12)


def test_replace_one_sampling_has_no_renyi_bound_and_says_so():
    replaced = PoissonSampledGaussian(
        sampling_prob=0.1, noise_multiplier=2.0, num_steps=3, neighboring_relation=REPLACE
    )
    with pytest.raises(InvalidInputError, match="accountant"):
        epsilon(replaced, delta=1e-6, accountant="rdp")
