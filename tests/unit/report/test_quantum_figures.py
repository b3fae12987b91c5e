import re

from dp_flash_attention.report.quantum_figures import amplitude_estimation_svg

CURVES = {
    name: [(10, 3.0), (100, 1.0), (1000, 0.2)] for name in ("classical", "quantum", "memoised", "distinct")
}


def test_the_figure_names_every_attacker_and_is_the_same_for_the_same_numbers():
    def draw():
        return amplitude_estimation_svg(CURVES, noise_stddev=2.0, affordable_queries=50, budget="ε = 4")

    text = draw()
    assert text.startswith("<svg")
    assert text == draw()
    for words in (
        "amplitude estimation: 1/q",
        "averaged",
        "memoised noise",
        "50 distinct queries spend ε = 4",
    ):
        assert words in text
    assert "mathdefault" not in re.sub(r"<!--.*?-->", "", text)
