import json

import pytest

from dp_flash_attention import accounting
from dp_flash_attention.cli.main import main

RUN = {"--noise-multiplier": "1.1", "--steps": "200", "--sampling-prob": "0.01", "--delta": "1e-6"}


def call(capsys, options, *more):
    with pytest.raises(SystemExit) as end:
        main(["account", *(word for pair in options.items() for word in pair), *more])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def ask(capsys, options):
    code, out, err = call(capsys, options, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def without(options, *names):
    return {name: value for name, value in options.items() if name not in names}


def test_epsilon_of_a_run(capsys):
    answer = ask(capsys, RUN)
    event = accounting.PoissonSampledGaussian(sampling_prob=0.01, noise_multiplier=1.1, num_steps=200)
    assert answer["question"] == "epsilon"
    assert answer["answer"] == answer["epsilon_pld"] == accounting.epsilon(event, delta=1e-6)
    assert answer["epsilon_rdp"] == accounting.epsilon(event, delta=1e-6, accountant="rdp")
    assert answer["epsilon_pld"] < answer["epsilon_rdp"]
    assert (answer["sampling"], answer["neighboring_relation"]) == ("poisson", "add_or_remove_one")


def test_noise_for_a_target(capsys):
    answer = ask(capsys, without(RUN, "--noise-multiplier") | {"--epsilon": "1"})
    assert answer["question"] == "noise_multiplier"
    assert 0.999 <= answer["epsilon_pld"] <= 1.0


def test_steps_for_a_budget(capsys):
    answer = ask(capsys, without(RUN, "--steps") | {"--epsilon": "1"})
    assert answer["question"] == "num_steps"
    assert answer["answer"] == accounting.max_steps(
        epsilon=1.0, delta=1e-6, sampling_prob=0.01, noise_multiplier=1.1
    )
    assert answer["epsilon_pld"] <= 1.0


def test_delta_at_an_epsilon(capsys):
    answer = ask(capsys, without(RUN, "--delta") | {"--epsilon": "1"})
    assert answer["question"] == "delta"
    assert answer["epsilon_pld"] == pytest.approx(1.0, abs=1e-3)


def test_batch_size_for_a_budget(capsys):
    answer = ask(capsys, without(RUN, "--sampling-prob") | {"--epsilon": "1", "--dataset-size": "60000"})
    assert answer["question"] == "sampling_prob"
    assert answer["expected_batch_size"] == pytest.approx(60_000 * answer["sampling_prob"])
    assert 0.999 <= answer["epsilon_pld"] <= 1.0


def test_batch_size_and_epochs_stand_for_probability_and_steps(capsys):
    options = without(RUN, "--steps", "--sampling-prob")
    answer = ask(
        capsys, options | {"--expected-batch-size": "256", "--dataset-size": "60000", "--epochs": "1"}
    )
    assert answer["sampling_prob"] == pytest.approx(256 / 60_000)
    assert answer["num_steps"] == 234


def test_the_table_shows_both_bounds(capsys):
    code, out, _ = call(capsys, RUN)
    answer = ask(capsys, RUN)
    assert code == 0
    assert f"{answer['epsilon_pld']:.4f}" in out
    assert f"{answer['epsilon_rdp']:.4f}" in out
    assert "certified" in out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "exactly 1"),
        (RUN | {"--epsilon": "1"}, "exactly 1"),
        (without(RUN, "--delta") | {"--epsilon": "-1"}, "epsilon"),
        (RUN | {"--delta": "1"}, "delta"),
        (RUN | {"--sampling-prob": "1.5"}, "sampling_prob"),
        (RUN | {"--steps": "0"}, "num_steps"),
        (RUN | {"--noise-multiplier": "nan"}, "noise_multiplier"),
        (RUN | {"--dataset-size": "1000", "--delta": "0.001"}, "--delta"),
        (RUN | {"--dataset-size": "0"}, "--dataset-size"),
        (RUN | {"--expected-batch-size": "256", "--dataset-size": "60000"}, "--expected-batch-size"),
        (without(RUN, "--sampling-prob") | {"--expected-batch-size": "256"}, "--expected-batch-size"),
        (RUN | {"--epochs": "3"}, "--epochs"),
        (without(RUN, "--steps", "--sampling-prob") | {"--epochs": "3", "--epsilon": "1"}, "--epochs"),
        (without(RUN, "--steps") | {"--epsilon": "0.001"}, "--epsilon"),
    ],
)
def test_wrong_input_is_refused_by_name(capsys, options, named):
    code, out, err = call(capsys, options)
    assert (code, out) == (2, "")
    assert named in err
    assert err.count("\n") == 1
