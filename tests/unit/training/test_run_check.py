"""A run's files belong to its certificate, or they are named."""

import json
import os

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.crypto.certificates import content_digest
from dp_flash_attention.training.certificate_rows import Standing
from dp_flash_attention.training.run_check import check_run


@pytest.fixture
def run(certified_run, tmp_path):
    return certified_run(tmp_path / "run")


def wrong(directory, **options):
    return [row.name for row in check_run(directory, **options).rows if not row.holds]


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_whole_run_holds_and_standings_are_kept_apart(run):
    found = check_run(run)
    assert found.holds
    standing = {row.name: row.standing for row in found.rows}
    assert standing["training: ε"] is Standing.CERTIFIED
    assert standing["assumptions"] is Standing.ASSUMED
    assert standing["figures of the hold-out"] is Standing.ESTIMATED
    assert standing["model.safetensors"] is standing["report.html"] is standing["run.json"] is Standing.FILE
    assert json.loads(json.dumps(found.to_dict()))["holds"] is True


@pytest.mark.parametrize("name", ["model.safetensors", "evaluation.json"])
def test_a_file_that_was_altered_by_one_bit_is_named(run, name):
    content = bytearray((run / name).read_bytes())
    content[-1] ^= 1
    (run / name).write_bytes(bytes(content))
    assert name in wrong(run)
    assert wrong(run, certificate_only=True) == []


def test_a_missing_file_and_a_link_in_its_place_are_named(run, tmp_path):
    (run / "model.safetensors").rename(tmp_path / "elsewhere")
    assert wrong(run) == ["model.safetensors"]
    (run / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert wrong(run) == ["model.safetensors"]


def test_a_listed_name_leads_nowhere_else(run, tmp_path):
    (tmp_path / "outside").write_bytes(bytes(1000))

    def lead_away(content):
        content["files"]["../outside"] = content["files"]["model.safetensors"]

    rewrite(run / "certificate.json", lead_away)
    rows = {row.name: row for row in check_run(run).rows}
    assert not rows["../outside"].holds
    assert "plain" in rows["../outside"].recomputed


def test_figures_that_do_not_follow_from_the_release_are_named(run):
    rewrite(run / "certificate.json", lambda content: content["estimated"].update(auc=0.99))
    assert "figures of the hold-out" in wrong(run)


def test_a_release_with_less_noise_than_certified_is_named(run):
    rewrite(run / "evaluation.json", lambda content: content.update(noise_stddev=0.1))
    assert {"evaluation.json", "figures of the hold-out"} <= set(wrong(run))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "binary"}', '{"kind": "binary", "epsilon": NaN}', "\xff"]
)
def test_a_release_that_cannot_be_read_is_wrong_and_no_crash(run, text):
    (run / "evaluation.json").write_bytes(text.encode("latin-1"))
    assert "figures of the hold-out" in wrong(run)
    (run / "run.json").write_bytes(text.encode("latin-1"))
    assert "run.json" in wrong(run)


def test_a_record_of_another_plan_or_an_unfinished_run_is_named(run):
    rewrite(run / "run.json", lambda record: record["facts"]["plan"].update(num_steps=4000))
    assert wrong(run) == ["run.json"]
    rewrite(run / "run.json", lambda record: record["facts"]["plan"].update(num_steps=40))
    rewrite(run / "run.json", lambda record: record.update(status="running"))
    assert wrong(run) == ["run.json"]


def test_the_page_of_another_certificate_is_named(run):
    page = (run / "report.html").read_text()
    digest = content_digest(json.loads((run / "certificate.json").read_text()))
    for other in (
        page.replace(digest, "0" * 64),
        page.replace(digest, ""),
        page + page,
        page.replace("(4, 1e-05)", "(0.4, 1e-05)"),
    ):
        assert other != page
        (run / "report.html").write_text(other)
        assert wrong(run) == ["report.html"]


def test_what_was_not_passed_on_besides_the_model_is_no_fault(run):
    for name in ("report.html", "run.json"):
        (run / name).unlink()
    assert wrong(run) == []


@pytest.mark.skipif(os.name != "posix", reason="pipes with names are POSIX")
def test_a_pipe_in_place_of_a_file_does_not_block(run):
    for name in ("report.html", "run.json"):
        (run / name).unlink()
        os.mkfifo(run / name)
    assert wrong(run) == ["run.json", "report.html"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"claim": {}}', '{"claim": {}, "format": NaN}', '{"claim": {}, "format": 2, "format": 2}',
     '{"format": 2, "claim": {}, "x": 1e999}', "[" * 100_000, '{"claim": {}, "format": 1' + "0" * 5000 + "}"],
    ids=["empty", "list", "no claim", "no format", "NaN", "twice", "infinite", "deep", "long"],
)  # fmt: skip
def test_what_is_no_certificate_is_refused_with_one_line(run, text):
    (run / "certificate.json").write_text(text)
    with pytest.raises(InvalidInputError) as caught:
        check_run(run)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_missing_certificate_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="finished run"):
        check_run(tmp_path)
