"""Figures as text: well-formed SVG without a link, the same for the same numbers, and safe for any name."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from dp_flash_attention.report import figures

HOSTILE = ["<script>alert(1)</script>", "a & b $x_1$"]
BINARY = {
    "epsilon": 1.0,
    "auc": 0.8,
    "auc_standard_error": 0.01,
    "roc": [[0.0, 0.0], [0.2, 0.7], [1.0, 1.0]],
    "negatives": [5.0, 3.5, -0.5, 0.0],
    "positives": [-0.2, 1.0, 4.0, 6.0],
}
STEP = {
    "step": 0,
    "sampled_batch_size": 3,
    "loss_mean": 0.7,
    "norm_quantiles": {"0.5": 1.0},
    "clipped_fraction": 0.2,
}
EMPTY = {
    "step": 1,
    "sampled_batch_size": 0,
    "loss_mean": None,
    "norm_quantiles": None,
    "clipped_fraction": None,
}

DRAWN: dict[str, Callable[[], str]] = {
    "roc": lambda: figures.roc_svg(BINARY, {HOSTILE[0]: [[0.0, 0.0], [1.0, 1.0]]}),
    "scores": lambda: figures.score_svg(BINARY, HOSTILE, 8.0),
    "confusion": lambda: figures.confusion_svg([[5.0, -1.0], [0.0, 0.0]], HOSTILE),
    "many classes": lambda: figures.confusion_svg([[1.0] * 15] * 15, [f"c{k}" for k in range(15)]),
    "epsilon": lambda: figures.epsilon_svg([0, 5, 10], [0.0, 0.5, 0.9], budget=1.0),
    "diagnostics": lambda: figures.diagnostics_svg([STEP, EMPTY], l2_clip_norm=1.0),
    "diagnostics of empty steps": lambda: figures.diagnostics_svg([EMPTY], l2_clip_norm=1.0),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_one_svg_element_and_the_same_each_time(name: str) -> None:
    text = DRAWN[name]()
    assert text == DRAWN[name]()
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert not tags & {"script", "a", "foreignObject"}
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_names_are_shown_as_they_are() -> None:
    shown = "".join(
        ElementTree.fromstring(figures.confusion_svg([[1.0, 0.0], [0.0, 1.0]], HOSTILE)).itertext()
    )
    for name in HOSTILE:
        assert name in shown


def test_drawing_leaves_the_callers_settings_alone() -> None:
    from matplotlib import rcParams

    before = dict(rcParams)
    figures.epsilon_svg([0, 1], [0.0, 1.0], budget=1.0)
    assert dict(rcParams) == before
