"""``dpfa train``: options, refusals, and what a run prints and leaves."""

import json
import re

import pytest

from dp_flash_attention.cli.main import main

# A public count: the noise of a released one (scale 100) could fall below the batch size.
QUICK = ["--steps", "2", "--expected-batch-size", "32", "--dataset-size", "300"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["train", *map(str, arguments)])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


@pytest.fixture(scope="session")
def table(small_table):
    return small_table()


def test_a_table_becomes_a_model_a_certificate_and_a_report(capsys, table, tmp_path):
    out = tmp_path / "run"
    code, printed, err = call(capsys, "--data", table, "--label", "kind", "--out", out, *QUICK)
    assert (code, err) == (0, "")
    assert "AUC on the hold-out" in printed
    assert "(1, 1e-05)-differentially private for each record." in printed
    for name in ("model.safetensors", "model.json", "certificate.json", "report.html", "evaluation.json"):
        assert (out / name).stat().st_size > 0
    assert json.loads((out / "certificate.json").read_text())["claim"]["holds"] is True


def test_clipping_by_layer_one_example_at_a_time_is_certified(capsys, table, tmp_path):
    out = tmp_path / "run"
    code, printed, err = call(
        capsys,
        *("--data", table, "--label", "kind", "--out", out, *QUICK),
        *("--clipping", "per_layer", "--strategy", "one_example"),
    )
    assert (code, err) == (0, "")
    assert re.search(r"clipping\s+per_layer\s+each module's part", printed)
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["certified"]["clipping"] == "per_layer"
    assert certificate["hyper_parameters"]["strategy"] == "one_example"
    assert certificate["hyper_parameters"]["microbatch_size"] == 1
    assert certificate["hyper_parameters"]["num_clip_groups"] > 3
    assert call(capsys, "--resume", "--out", out)[0] == 0


def test_every_number_is_printed_with_its_reason(capsys, table):
    code, printed, _ = call(capsys, "--data", table, "--label", "kind", "--clip-norm", "2.5", *QUICK)
    assert code == 0
    rows = dict(re.findall(r"^(\w[\w ]*?)\s{2,}(\S+  +\S.*)$", printed, re.M))
    for name in (
        "delta",
        "expected_batch_size",
        "num_steps",
        "l2_clip_norm",
        "noise_multiplier",
        "learning_rate",
    ):
        assert name in rows, printed
    assert re.search(r"l2_clip_norm\s+2\.5\s+as asked", printed)


def test_runs_without_out_get_numbers_of_their_own(capsys, table, tmp_path):
    for _ in range(2):
        assert call(capsys, "--data", table, "--label", "kind", *QUICK)[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["train-1", "train-2"]


def test_a_finished_run_is_resumed_without_harm(capsys, table, tmp_path):
    out = tmp_path / "run"
    assert call(capsys, "--data", table, "--label", "kind", "--out", out, *QUICK)[0] == 0
    before = (out / "model.safetensors").read_bytes()
    assert call(capsys, "--resume", "--out", out)[0] == 0
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epsilon", "0"], "epsilon is 0"),
        (["--epsilon", "-1"], "epsilon is -1"),
        (["--epsilon", "nan"], "epsilon is nan"),
        (["--delta", "0"], "delta is 0"),
        (["--delta", "1"], "delta is 1"),
        (["--delta", "0.5"], "delta is 0.5"),
        (["--delta", "0.004", "--dataset-size", "300"], "1 / number of records"),
        (["--clip-norm", "0"], "l2_clip_norm is 0"),
        (["--clip-norm", "-2"], "l2_clip_norm is -2"),
        (["--learning-rate", "inf"], "learning_rate is inf"),
        (["--expected-batch-size", "0"], "expected_batch_size is 0"),
        (["--expected-batch-size", "100000"], "expected_batch_size is 100000"),
        (["--steps", "0"], "num_steps is 0"),
        (["--epochs", "1", "--steps", "1"], "epochs is 1"),
        (["--noise", "none"], "noise is 'none'"),
        (["--holdout", "1"], "holdout_prob is 1"),
        (["--label", "kinds"], "Did you mean 'kind'?"),
        (["--data", "nowhere.csv"], "not a file"),
        (["--schema", "nowhere.json"], "nowhere.json"),
        (["--text", "letter", "--schema", "x.json"], "--schema"),
        (["--max-length", "10"], "--max-length"),
        (["--microbatch-size", "0"], "microbatch_size is 0"),
        (["--threads", "0"], "num_threads is 0"),
        (["--clipping", "per_row"], "clipping is 'per_row'"),
        (["--clipping", "per_layer", "--strategy", "two_pass"], "strategy is 'two_pass'"),
        (["--strategy", "one_example", "--microbatch-size", "8"], "microbatch_size is 8"),
        (["--resume"], "--out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_exit_code_two_and_leaves_nothing(capsys, table, tmp_path, options, said):
    code, _, err = call(capsys, "--data", table, "--label", "kind", *options)
    assert code == 2, err
    assert err.startswith("dpfa: error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        ("a,kind\n", "no records"),
        ("a,kind\n1,x\n2\n3,y\n4,5,6\n", "2 rows of"),
        ("a,kind\n1,x\n2,x\n", "at least two classes"),
        ("a,kind\n1,\n2,x\n3,y\n", "1 records of"),
    ],
)
def test_a_bad_table_is_refused(capsys, tmp_path, content, said):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    code, _, err = call(capsys, "--data", path, "--label", "kind")
    assert (code, err.count("\n")) == (2, 1)
    assert said in err
    assert [item.name for item in tmp_path.iterdir()] == ["bad.csv"]


@pytest.mark.parametrize("option", ["--label", "--text", "--model", "--schema"])
def test_options_of_data_need_data(capsys, option):
    code, _, err = call(capsys, option, "x")
    assert code == 2
    assert option in err
    assert "--data" in err


def test_a_directory_with_something_in_it_is_left_alone(capsys, table, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("kept")
    code, _, err = call(capsys, "--data", table, "--label", "kind", "--out", out, *QUICK)
    assert code == 2
    assert "nothing is written over" in err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_resuming_takes_no_other_option_and_needs_a_run(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = call(capsys, "--resume", "--out", tmp_path / "empty", "--epsilon", "9")
    assert code == 2
    assert "--epsilon" in err
    code, _, err = call(capsys, "--resume", "--out", tmp_path / "empty")
    assert code == 2
    assert "holds no run" in err


def test_a_file_where_the_directory_should_be_is_refused(capsys, table, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = call(
        capsys, "--data", table, "--label", "kind", "--out", tmp_path / "file" / "run", *QUICK
    )
    assert code == 2
    assert err.count("\n") == 1
