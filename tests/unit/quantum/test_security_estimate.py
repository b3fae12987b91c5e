"""Estimates that cannot lose their assumptions, and strength that cannot be had by asking."""

import inspect
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum.security_estimate import (
    Bits,
    EntropySource,
    SecurityEstimate,
    hybrid,
    noise_security,
    operating_system_pool,
    strongest,
    weakest,
)

POOL = operating_system_pool()
KEY_FILE = EntropySource(name="key file", bits=256, assumption="The key file came from elsewhere.")


def make(figure=128.0, **changes):
    parts = {"unit": "calls", "formula": "key / 2", "source": "Grover 1996", "assumptions": ("A holds.",)}
    return Bits(figure, **(parts | changes))


def quantum_bits(*arguments, **options):
    return noise_security(*arguments, **options).quantum.to_dict()["bits"]


@pytest.mark.parametrize(
    "changes",
    [
        {"assumptions": ()},
        {"assumptions": ("",)},
        {"assumptions": ("A holds.", " ")},
        {"assumptions": ""},
        {"unit": ""},
        {"formula": " "},
        {"source": ""},
        {"source": None},
    ],
)
def test_a_figure_without_what_it_rests_on_is_refused(changes):
    with pytest.raises(InvalidInputError):
        make(**changes)


def test_no_argument_of_a_figure_has_a_default():
    parameters = inspect.signature(Bits).parameters.values()
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters)


@pytest.mark.parametrize("figure", [-1.0, float("inf"), float("nan")])
def test_a_figure_is_finite_and_not_negative(figure):
    with pytest.raises(InvalidInputError):
        make(figure)


def test_a_figure_is_no_bare_number():
    with pytest.raises(TypeError, match="keep the assumptions"):
        float(make())
    for attempt in (lambda: int(make()), lambda: make() + 1, lambda: f"{make():.1f}", lambda: round(make())):
        with pytest.raises(TypeError):
            attempt()
    public = [name for name in dir(make()) if not name.startswith("_")]
    assert not any(isinstance(getattr(make(), name), int | float) for name in public)


def test_every_way_to_print_a_figure_says_what_it_assumes():
    for shown in (str(make()), repr(make()), f"{make()}", str(make().to_dict())):
        assert "128" in shown
        assert "A holds." in shown
        assert "Grover 1996" in shown


def test_figures_are_rounded_down():
    assert make(181.99).to_dict()["bits"] == 181
    assert make(181.99).reaches(181.5)
    assert not make(181.99).reaches(182)


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=5))
def test_the_weakest_keeps_every_assumption_and_the_strongest_its_own(figures):
    parts = [make(figure, assumptions=(f"A{index} holds.",)) for index, figure in enumerate(figures)]
    low, high = weakest(parts, because="Any."), strongest(parts, because="All.")
    assert all(not part < low and not high < part for part in parts)
    assert set(low.assumptions) == {f"A{index} holds." for index in range(len(parts))} | {"Any."}
    assert "All." in high.assumptions
    assert len(high.assumptions) == 2


def test_nothing_composes_to_nothing():
    for compose in (weakest, strongest):
        with pytest.raises(InvalidInputError):
            compose([], because="Nothing.")


def test_a_hybrid_is_the_stronger_half_for_each_attacker_and_never_the_sum():
    first = SecurityEstimate(primitive="a", classical=make(125.0), quantum=make(0.0))
    second = SecurityEstimate(primitive="b", classical=make(100.0), quantum=make(90.0))
    both = hybrid("both", first, second, because="A theorem.")
    assert both.classical.to_dict()["bits"] == 125
    assert both.quantum.to_dict()["bits"] == 90
    assert "A theorem." in both.quantum.assumptions


@pytest.mark.parametrize(
    ("generator", "seed_bits", "sources", "bits"),
    [
        ("aes-256-ctr", 256, [POOL], 128),
        ("chacha20", 256, [POOL], 128),
        ("aes-256-ctr", 256, [POOL, KEY_FILE], 128),  # the key is the limit, whatever goes in
        ("shake256", 512, [POOL], 128),  # the pool carries 256 bits, however many are read
        ("shake256", 256, [POOL, KEY_FILE], 128),  # a short seed holds no more than its length
        ("shake256", 512, [POOL, KEY_FILE], 256),
        ("shake256", 1024, [POOL, KEY_FILE], 256),  # capacity
        ("sha3-512-counter", 512, [POOL, KEY_FILE], 256),
        ("shake256", 512, [POOL, EntropySource(name="weak", bits=64, assumption="It is weak.")], 160),
    ],
)
def test_the_noises_strength_follows_from_what_was_drawn(generator, seed_bits, sources, bits):
    assert quantum_bits(generator, seed_bits=seed_bits, sources=sources) == bits


@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 2000))
def test_strength_is_the_stated_minimum(first, second, seed_bits):
    sources = [
        EntropySource(name=str(index), bits=bits, assumption="Stated.")
        for index, bits in enumerate((first, second))
    ]
    for generator, capacity in (("shake256", 512), ("sha3-512-counter", 1024)):
        found = noise_security(generator, seed_bits=seed_bits, sources=sources)
        expected = min(first + second, seed_bits, capacity) / 2
        assert found.quantum.reaches(expected)
        assert not found.quantum.reaches(expected + 0.5)


def test_more_sources_need_the_assumption_that_they_are_independent():
    alone = noise_security("shake256", seed_bits=512, sources=[POOL]).quantum.assumptions
    together = noise_security("shake256", seed_bits=512, sources=[POOL, KEY_FILE]).quantum.assumptions
    assert not any("independent" in text for text in alone)
    assert any("independent" in text for text in together)
    assert KEY_FILE.assumption in together


@pytest.mark.parametrize(
    ("generator", "seed_bits", "sources"),
    [
        ("shake256", 512, []),
        ("shake256", 512, [POOL, POOL]),
        ("shake256", 0, [POOL]),
        ("aes-256-ctr", 512, [POOL]),
        ("xor_of_two_ciphers", 512, [POOL]),
    ],
)
def test_wrong_configurations_are_refused(generator, seed_bits, sources):
    with pytest.raises(InvalidInputError):
        noise_security(generator, seed_bits=seed_bits, sources=sources)


@pytest.mark.parametrize("changes", [{"bits": 0}, {"bits": -5}, {"assumption": ""}, {"name": " "}])
def test_a_source_states_what_it_gives_and_why(changes):
    with pytest.raises(InvalidInputError):
        EntropySource(**({"name": "a", "bits": 8, "assumption": "Because."} | changes))


def test_the_seed_is_never_stronger_than_the_generator():
    for generator, sources in itertools.product(("aes-256-ctr", "chacha20"), ([POOL], [POOL, KEY_FILE])):
        assert not noise_security(generator, seed_bits=256, sources=sources).quantum.reaches(128.5)
