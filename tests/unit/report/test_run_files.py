"""The two pages of a run: what stands on them, and what must not."""

import json
import re
import stat
from html.parser import HTMLParser

import pytest

from dp_flash_attention.noise import TestKey
from dp_flash_attention.report.run_files import write_reports
from dp_flash_attention.training.choices import RunRequest
from dp_flash_attention.training.pipeline import run_private_training
from dp_flash_attention.training.tasks import table_task

# A thousand records: the noisy count (scale 33) stays far above the batch size.
REQUEST = RunRequest(epsilon=3.0, num_steps=4, expected_batch_size=32, holdout_prob=0.2)


@pytest.fixture(scope="module", params=[2, 3], ids=["two classes", "three classes"])
def outcome(request, small_table, tmp_path_factory):
    task = table_task(small_table(num_records=1000, classes=request.param), label="kind")
    return run_private_training(task, REQUEST, out_dir=tmp_path_factory.mktemp("run") / "run", with_twin=True)


class Elements(HTMLParser):
    """Collects tags and attributes; complains about tags that do not close."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "img", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


def parsed(page):
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    return elements


def test_the_page_says_what_is_promised_and_draws_it(outcome):
    path = write_reports(outcome)
    page = path.read_text()
    elements = parsed(page)
    claim = outcome.certificate.to_dict()["claim"]
    assert claim["statement"] in page
    assert "ε = 3" in page
    two_classes = len(outcome.certificate.to_dict()["task"]["classes"]) == 2
    assert elements.seen.count("svg") == (3 if two_classes else 2)
    for statement in ("Certified", "Estimated", "Assumed", "Not covered"):
        assert f"<h2>{statement}</h2>" in page


def test_the_page_opens_without_a_network(outcome):
    page = write_reports(outcome).read_text()
    assert all(link.startswith(("#", "data:")) for link in parsed(page).links)
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert not re.search(r"@import|url\((?!#)", page)


def test_exact_scores_stand_on_the_page_of_public_data_alone(outcome):
    exact = f"{outcome.comparison['non_private']['log_loss']:.4f}"
    page = write_reports(outcome).read_text()
    assert exact not in page
    assert "without privacy" not in page
    private = (outcome.path / "diagnostics" / "report.html").read_text()
    assert exact in private
    if "auc" in outcome.comparison["private"]:
        assert (
            "against the same model without privacy"
            in write_reports(outcome, is_public_data=True).read_text()
        )


def test_the_page_of_diagnostics_warns_and_is_for_the_owner_alone(outcome):
    write_reports(outcome)
    path = outcome.path / "diagnostics" / "report.html"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    page = path.read_text()
    parsed(page)
    assert 'role="alert">PRIVATE DATA' in page


def test_a_run_with_a_test_key_says_so_in_red(small_table, tmp_path):
    task = table_task(small_table(), label="kind")
    outcome = run_private_training(task, REQUEST, out_dir=tmp_path / "run", test_key=TestKey(1))
    assert 'role="alert">NOT PRIVATE' in write_reports(outcome).read_text()


def test_names_from_the_data_are_escaped(tmp_path):
    path = tmp_path / "odd.csv"
    rows = "\n".join(f"{i % 7},<b>$x_{i % 2}</b>" for i in range(1000))
    path.write_text(f"<script>a</script>,kind\n{rows}\n")
    outcome = run_private_training(table_task(path, label="kind"), REQUEST, out_dir=tmp_path / "run")
    page = write_reports(outcome).read_text()
    parsed(page)
    assert "<script>" not in page
    assert "<b>$x" not in page
    assert "&lt;b&gt;$x" in page
    assert json.dumps(outcome.certificate.to_dict())
