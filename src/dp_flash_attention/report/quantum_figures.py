"""The figure of what repeated quantum calls learn, as SVG text. It draws what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dp_flash_attention.report.figures import _NON_PRIVATE, _PRIVATE, _QUIET, _svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[float, float]]
_STYLES = {
    "classical": (_QUIET, "--", "fresh noise, answers averaged: 1/√q"),
    "quantum": (_NON_PRIVATE, "-", "fresh noise, amplitude estimation: 1/q"),
    "memoised": (_PRIVATE, "-", "memoised noise, amplitude estimation"),
    "distinct": (_PRIVATE, ":", "memoised, q distinct queries: q times the ρ"),
}


def amplitude_estimation_svg(
    curves: Mapping[str, Curve], *, noise_stddev: float, affordable_queries: int, budget: str
) -> str:
    """Draws error against calls for each attacker.

    Args:
        curves: (calls, error) by attacker: ``classical``, ``quantum``, ``memoised``, ``distinct``.
        noise_stddev: Of one answer.
        affordable_queries: How many distinct queries the budget answers before it refuses.
        budget: What that budget is, for the label.

    Returns:
        An ``<svg>`` element.
    """

    def draw(axes: Axes) -> None:
        for name, (colour, line, label) in _STYLES.items():
            axes.plot(*zip(*curves[name], strict=True), color=colour, ls=line, lw=2, label=label)
        axes.axhline(noise_stddev, color=_QUIET, lw=0.8, ls=":")
        axes.axvline(affordable_queries, color=_QUIET, lw=0.8)
        axes.annotate(
            f"{affordable_queries} distinct queries spend {budget}",
            (affordable_queries, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            color=_QUIET,
        )
        axes.set(xscale="log", yscale="log", xlabel="calls q", ylabel="root mean square error")
        axes.set_title("What repeated calls learn of the true value")
        # The style parses no math, which logarithmic labels are written in.
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda number, _: f"{number:,.10g}")
            axis.set_minor_formatter(lambda number, _: "")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=2)

    return _svg(draw, (7.2, 4.4))
