"""A whole run: what it leaves, what it promises, and that it can be stopped at any point."""

import json
import math
import stat
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from dp_flash_attention.accounting import PoissonSampledGaussian, epsilon
from dp_flash_attention.core.errors import (
    ExampleCouplingError,
    InvalidInputError,
    MissingRuleError,
    RunStateError,
)
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import PrivacyPlan, pipeline
from dp_flash_attention.training.certificate import Certificate
from dp_flash_attention.training.choices import RunRequest
from dp_flash_attention.training.pipeline import Observer, run_private_training
from dp_flash_attention.training.tasks import load_built_in_model, table_task, tabular_logits, tabular_loss

KEY = TestKey("pipeline")
REQUEST = RunRequest(epsilon=2.0, num_steps=4, expected_batch_size=32, holdout_prob=0.2)


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


@pytest.fixture(scope="module")
def task(small_table):
    return table_task(small_table(), label="kind")


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    return run_private_training(
        task, REQUEST, out_dir=tmp_path_factory.mktemp("runs") / "unbroken", test_key=KEY, with_twin=True
    )


def results(path):
    names = ("model.safetensors", "evaluation.json", "model.json", "certificate.json")
    return {name: (path / name).read_bytes() for name in names}


def test_the_certificate_of_a_table_names_no_folder_of_this_machine(small_table, finished):
    text = (finished.path / "certificate.json").read_text()
    assert not [folder for folder in (finished.path, small_table().parent) if str(folder.parent) in text]


def test_the_certified_parts_add_up_to_the_claim(small_table, tmp_path):
    # With a real key the count's noise (scale 50) differs each time; so many records keep it off the batch size.
    task = table_task(small_table(num_records=2000), label="kind")
    outcome = run_private_training(task, REQUEST, out_dir=tmp_path / "run")
    certificate = outcome.certificate.to_dict()
    assert certificate == Certificate.read(tmp_path / "run" / "certificate.json").to_dict()
    claim = certificate["claim"]
    assert claim["holds"] is True
    assert (claim["epsilon"], claim["delta"]) == (2.0, outcome.plan.delta)
    parts = {part["name"]: part for part in certificate["mechanisms"]}
    on_training_part = parts["number of training records"]["epsilon"] + parts["training"]["epsilon"]
    assert on_training_part == pytest.approx(2.0, rel=1e-12)
    assert on_training_part <= 2.0
    assert parts["evaluation"]["epsilon"] <= 2.0
    assert parts["evaluation"]["delta"] <= claim["delta"]
    numbers = parts["training"]["parameters"]
    event = PoissonSampledGaussian(
        sampling_prob=numbers["sampling_prob"],
        noise_multiplier=numbers["noise_multiplier"],
        num_steps=numbers["num_steps"],
    )
    assert epsilon(event, delta=claim["delta"]) <= parts["training"]["epsilon"]


def test_a_run_with_a_test_key_certifies_nothing(finished):
    certificate = finished.certificate.to_dict()
    assert certificate["claim"]["holds"] is False
    assert certificate["claim"]["statement"].startswith("NOT PRIVATE")
    assert certificate["certified"] == {}


def test_the_count_is_released_once_with_noise(task, finished):
    released = json.loads((finished.path / "run.json").read_text())["facts"]["training_record_count"]
    assert released == finished.plan.expected_batch_size / finished.plan.sampling_prob
    counts = {
        run_count(task, key_number, finished.path.parent / f"count-{key_number}") for key_number in range(5)
    }
    assert len(counts) == 5  # noise of scale 50; five equal counts by chance: below 1e-7


def run_count(task, key_number, path):
    outcome = run_private_training(task, REQUEST, out_dir=path, test_key=TestKey(key_number))
    return json.loads((outcome.path / "run.json").read_text())["facts"]["training_record_count"]


def test_a_public_count_costs_nothing(task, tmp_path):
    outcome = run_private_training(
        task, replace(REQUEST, dataset_size=300), out_dir=tmp_path / "run", test_key=KEY
    )
    assert outcome.plan.epsilon == 2.0
    assert outcome.plan.sampling_prob == pytest.approx(32 / 240)
    assert [part["name"] for part in outcome.certificate.to_dict()["mechanisms"]] == [
        "training",
        "evaluation",
    ]
    assert "The number of records is public, as the user stated." in outcome.certificate.to_dict()["assumed"]


def test_secrets_are_gone_and_private_data_is_kept_apart(finished):
    assert not (finished.path / ".secrets").exists()
    diagnostics = finished.path / "diagnostics"
    assert stat.S_IMODE(diagnostics.stat().st_mode) == 0o700
    assert stat.S_IMODE((diagnostics / "comparison.json").stat().st_mode) == 0o600
    first = json.loads((diagnostics / "steps.jsonl").read_text().splitlines()[0])
    assert first["warning"].startswith("PRIVATE DATA")


def test_nothing_outside_diagnostics_holds_an_exact_score_or_a_loss(finished):
    private = json.loads((finished.path / "diagnostics" / "comparison.json").read_text())
    lines = (finished.path / "diagnostics" / "steps.jsonl").read_text().splitlines()[1:]
    figures = [scores[name] for scores in private.values() for name in ("auc", "log_loss")]
    figures += [json.loads(line)["loss_mean"] for line in lines]
    figures = [figure for figure in figures if len(repr(figure)) > 10]  # 1.0 may stand anywhere
    assert len(figures) >= 2 + 4
    shared = [path.read_text() for path in finished.path.iterdir() if path.suffix in (".json", ".html")]
    assert len(shared) >= 4
    for figure in figures:
        assert not any(repr(figure)[:8] in text for text in shared)


def test_the_model_can_be_loaded_again_and_predicts(task, finished):
    model = load_built_in_model(finished.path)
    rows = task.dataset.take(torch.arange(20))
    assert tabular_logits(model, rows).shape == (20, 2)
    with pytest.raises(InvalidInputError, match="run directory"):
        load_built_in_model(finished.path / "diagnostics")


@pytest.mark.parametrize("classes", [2, 3])
def test_enough_budget_learns_the_telling_column(small_table, tmp_path, classes):
    learnable = table_task(small_table(num_records=600, classes=classes), label="kind")
    request = RunRequest(epsilon=50.0, num_steps=30, expected_batch_size=128)
    outcome = run_private_training(learnable, request, out_dir=tmp_path / "run", test_key=KEY)
    assert outcome.evaluation is not None
    # Two classes four standard deviations apart: the ideal accuracy is 0.977, chance 1 / classes.
    assert outcome.evaluation.accuracy > 0.85


def stop_at_phase(monkeypatch, word):
    def on_phase(phase):
        if word in phase:
            raise Killed(phase)

    return Observer(on_phase=on_phase)


def stop_at_step(monkeypatch, step):
    def on_step(report):
        if report.step == step:
            raise Killed(step)

    return Observer(on_step=on_step)


def stop_before(monkeypatch, name):
    def stop(*args, **kwargs):
        raise Killed(name)

    monkeypatch.setattr(pipeline, name, stop)
    return Observer()


@pytest.mark.parametrize(
    ("stop", "where"),
    [
        (stop_at_phase, "Calibrating"),
        (stop_at_phase, "Training with"),
        (stop_at_step, 1),
        (stop_at_step, 3),
        (stop_at_phase, "Evaluating"),
        (stop_at_phase, "without privacy"),
        (stop_before, "train_without_privacy"),
        (stop_before, "write_atomically"),
        (stop_before, "build_certificate"),
    ],
)
def test_a_run_stopped_anywhere_ends_as_an_unbroken_one(task, finished, tmp_path, monkeypatch, stop, where):
    path = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        run_private_training(
            task, REQUEST, out_dir=path, test_key=KEY, with_twin=True, observer=stop(patch, where)
        )
    assert not (path / "certificate.json").exists()
    run_private_training(task, REQUEST, out_dir=path, resume=True, with_twin=True)
    assert results(path) == results(finished.path)
    assert not (path / ".secrets").exists()


def test_resuming_a_finished_run_changes_nothing(task, finished):
    before = results(finished.path)
    run_private_training(task, REQUEST, out_dir=finished.path, resume=True, with_twin=True)
    assert results(finished.path) == before


@pytest.mark.parametrize(("stop", "where"), [(stop_at_phase, "Calibrating"), (stop_at_step, 2)])
def test_a_run_is_not_resumed_with_other_numbers(task, tmp_path, stop, where):
    # Before the first step already: the count was released at the first request's price.
    path = tmp_path / "run"
    with pytest.raises(Killed):
        run_private_training(task, REQUEST, out_dir=path, test_key=KEY, observer=stop(None, where))
    for changes in ({"epsilon": 0.2}, {"holdout_prob": 0.0}, {"num_steps": 3}, {"noise": "fast"}):
        with pytest.raises(RunStateError, match="recorded"):
            run_private_training(task, replace(REQUEST, **changes), out_dir=path, resume=True)


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10_000, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids, mix):
        return self.head(self.norm(self.embedding(ids).mean(dim=(1, 2))))


class WithOwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, ids, mix):
        return self.scale * mix.sum(dim=(1, 2)).unsqueeze(1)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"build_model": WithBatchNorm}, (MissingRuleError, ExampleCouplingError)),
        ({"build_model": WithOwnParameter}, MissingRuleError),
        (
            {"loss_fn": lambda model, rows: tabular_loss(model, rows) / len(rows["label"])},
            ExampleCouplingError,
        ),
        (
            {"loss_fn": lambda model, rows: tabular_loss(model, rows).mean()},
            (ExampleCouplingError, InvalidInputError),
        ),
    ],
)
def test_what_cannot_be_clipped_is_refused_before_anything_is_written(task, tmp_path, changes, error):
    with pytest.raises(error):
        run_private_training(replace(task, **changes), REQUEST, out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "request_",
    [replace(REQUEST, expected_batch_size=5000), replace(REQUEST, delta=0.5)],
    ids=["batch larger than the data", "delta not below 1/N"],
)
def test_numbers_that_do_not_fit_leave_no_directory(task, tmp_path, request_):
    with pytest.raises(InvalidInputError):
        run_private_training(task, request_, out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_over(task, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="new or empty"):
        run_private_training(task, REQUEST, out_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_hold_out_there_is_no_evaluation(task, tmp_path):
    outcome = run_private_training(
        task, replace(REQUEST, holdout_prob=0.0), out_dir=tmp_path / "run", test_key=KEY
    )
    assert outcome.evaluation is None
    assert outcome.certificate.to_dict()["estimated"] == {}
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_the_observer_sees_every_step_and_the_budget_grow(task, tmp_path):
    seen = []
    run_private_training(
        task, REQUEST, out_dir=tmp_path / "run", test_key=KEY, observer=Observer(on_step=seen.append)
    )
    assert [report.step for report in seen] == [1, 2, 3, 4]
    spent = [report.epsilon_spent for report in seen]
    assert spent == sorted(spent)
    assert 0.0 < spent[0] < spent[-1] <= 2.0
    assert not any(math.isnan(report.examples_per_s) for report in seen)


EXACT = replace(REQUEST, noise="exact", dataset_size=300)


def test_exact_noise_from_start_to_certificate_and_across_a_kill(task, tmp_path):
    unbroken = run_private_training(task, EXACT, out_dir=tmp_path / "unbroken", test_key=KEY)
    with pytest.raises(Killed):
        run_private_training(
            task, EXACT, out_dir=tmp_path / "killed", test_key=KEY, observer=stop_at_step(None, 2)
        )
    run_private_training(task, EXACT, out_dir=tmp_path / "killed", resume=True)
    assert results(tmp_path / "killed") == results(unbroken.path)
    other = run_private_training(
        task, replace(EXACT, noise="secure"), out_dir=tmp_path / "secure", test_key=KEY
    )
    assert results(other.path)["model.safetensors"] != results(unbroken.path)["model.safetensors"]


def test_the_certificate_of_exact_noise_can_be_computed_again_and_an_altered_one_cannot(task, tmp_path):
    outcome = run_private_training(task, EXACT, out_dir=tmp_path / "run")
    certificate = Certificate.read(tmp_path / "run" / "certificate.json").to_dict()
    training = next(part for part in certificate["mechanisms"] if part["name"] == "training")
    again = PrivacyPlan.from_dict(training["parameters"])
    assert again == outcome.plan
    stated = certificate["certified"]["finite_precision"]
    assert stated["delta_of_the_accountant"] == again.accounted_delta
    assert {name: stated[name] for name in asdict(again.finite_precision)} == asdict(again.finite_precision)
    assert certificate["certified"]["training_epsilon_by_pld"] == again.accounted_epsilon <= again.epsilon
    assumed = " ".join(certificate["assumed"])
    assert "float32 sums of clipped gradients, before they are rounded" in assumed
    assert "no attack on AES-256" in assumed
    assert "rounding of sums and noise is not part" not in assumed
    assert "'secure'" not in assumed
    evaluation = next(part for part in certificate["mechanisms"] if part["name"] == "evaluation")
    assert "whole steps" in evaluation["guarantee"]["theorem"]
    # Counts of records come out in whole steps of 2^-24, which float64 normals would not.
    assert outcome.evaluation.noise == "exact"
    released = torch.tensor(outcome.evaluation.negatives, dtype=torch.float64) * 2.0**25
    assert torch.equal(released, released.round())
    assert float(released.abs().max()) < 2.0**50
    with pytest.raises(InvalidInputError, match="epsilon"):
        PrivacyPlan.from_dict(training["parameters"] | {"noise_multiplier": 0.9 * again.noise_multiplier})
    with pytest.raises(InvalidInputError, match="num_parameters"):
        PrivacyPlan.from_dict(training["parameters"] | {"num_parameters": None})
