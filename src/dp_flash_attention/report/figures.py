"""The figures of a run's report, as SVG text for a page. They draw what they are given and read no files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PRIVATE = "#0b6bcb"
_NON_PRIVATE = "#d9730d"
_QUIET = "#8a94a3"
_ANNOTATED_CLASSES = 12
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "text.parse_math": False,  # names of classes and columns are the user's
    "axes.spines.right": False,
    "axes.edgecolor": _QUIET,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dp-flash-attention",  # the same numbers give the same file
}


def roc_svg(
    evaluation: Mapping[str, Any], exact_curves: Mapping[str, Sequence[Sequence[float]]] | None = None
) -> str:
    """Draws the ROC curve of a differentially private evaluation.

    Args:
        evaluation: As ``ClassifierEvaluation.to_dict`` gives it.
        exact_curves: Curves by label to draw beside it, for data that is public.

    Returns:
        An ``<svg>`` element.
    """

    def draw(axes: Axes) -> None:
        for (label, curve), colour in zip((exact_curves or {}).items(), (_NON_PRIVATE, _QUIET), strict=False):
            axes.plot(*zip(*curve, strict=True), color=colour, lw=1.4, ls="--", label=label)
        label = (
            f"ε = {evaluation['epsilon']:g}: AUC {evaluation['auc']:.3f} ± "
            f"{evaluation['auc_standard_error']:.3f}"
        )
        axes.plot(*zip(*evaluation["roc"], strict=True), color=_PRIVATE, lw=2, label=label)
        axes.plot([0, 1], [0, 1], color=_QUIET, lw=0.8, ls=":")
        axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC on the hold-out")
        axes.legend(loc="lower right")

    return _svg(draw, (5.2, 4.6))


def score_svg(evaluation: Mapping[str, Any], classes: Sequence[str], score_bound: float) -> str:
    """Draws the released histograms of the score for both classes.

    Args:
        evaluation: As ``ClassifierEvaluation.to_dict`` gives it.
        classes: Names of both classes.
        score_bound: The outermost cells end at plus and minus this log-odds.

    Returns:
        An ``<svg>`` element.
    """

    def draw(axes: Axes) -> None:
        cells = len(evaluation["negatives"])
        edges = [score_bound * (2 * cell / cells - 1) for cell in range(cells + 1)]
        for name, counts, colour in zip(
            classes,
            (evaluation["negatives"], evaluation["positives"]),
            (_QUIET, _PRIVATE),
            strict=True,
        ):
            axes.stairs(counts, edges, fill=True, alpha=0.45, color=colour, label=name)
        axes.set(xlabel=f"score: log-odds of '{classes[1]}'", ylabel="records (with noise)")
        axes.set(title="Scores by true class")
        axes.legend()

    return _svg(draw, (5.2, 4.6))


def confusion_svg(counts: Sequence[Sequence[float]], classes: Sequence[str]) -> str:
    """Draws a released confusion matrix, each row as shares of its class.

    Args:
        counts: Noisy number of records by true (row) and predicted class (column).
        classes: Their names.

    Returns:
        An ``<svg>`` element.
    """

    def draw(axes: Axes) -> None:
        shares = [[max(0.0, cell) / max(1.0, sum(row)) for cell in row] for row in counts]
        axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        if len(classes) <= _ANNOTATED_CLASSES:
            for i, row in enumerate(shares):
                for j, share in enumerate(row):
                    axes.text(
                        j, i, f"{share:.2f}", ha="center", va="center", color="w" if share > 0.5 else "k"
                    )
        axes.set(xlabel="predicted", ylabel="true", title="Confusion on the hold-out (with noise)")

    return _svg(draw, (5.2, 4.6))


def epsilon_svg(steps: Sequence[int], epsilons: Sequence[float], *, budget: float) -> str:
    """Draws the certified ε of training after each step.

    Args:
        steps: Numbers of finished steps.
        epsilons: Upper bound of ε after each of them.
        budget: ε of the plan.

    Returns:
        An ``<svg>`` element.
    """

    def draw(axes: Axes) -> None:
        axes.plot(steps, epsilons, color=_PRIVATE, lw=2)
        axes.axhline(budget, color=_QUIET, lw=1, ls="--")
        axes.annotate(f"plan: {budget:g}", (0, budget), color=_QUIET, va="bottom")
        axes.set(xlabel="finished steps", ylabel="ε at the plan's δ", title="Privacy spent on training")
        axes.set(xlim=(0, None), ylim=(0, 1.12 * budget))

    return _svg(draw, (5.2, 3.4))


def diagnostics_svg(records: Sequence[Mapping[str, Any]], *, l2_clip_norm: float) -> str:
    """Draws loss, gradient norms, clipped share and batch sizes of each step. PRIVATE DATA.

    Args:
        records: As ``JsonLinesDiagnostics`` keeps them.
        l2_clip_norm: C, drawn among the norms.

    Returns:
        An ``<svg>`` element.
    """
    from matplotlib.figure import Figure

    shown = [record for record in records if record["norm_quantiles"] is not None]
    steps = [record["step"] for record in shown]
    with _style():
        figure = Figure(figsize=(10.5, 6.4), layout="constrained")
        (loss, norms), (clipped, sizes) = figure.subplots(2, 2)
        loss.plot(steps, [record["loss_mean"] for record in shown], color=_PRIVATE)
        loss.set(title="Training loss (mean of the batch)", xlabel="step")
        for quantile in shown[0]["norm_quantiles"] if shown else ():
            values = [record["norm_quantiles"][quantile] for record in shown]
            norms.plot(steps, values, label=f"quantile {quantile}")
        norms.axhline(l2_clip_norm, color=_QUIET, ls="--", label="clip norm")
        norms.set(title="Per-example gradient norms", xlabel="step", yscale="log")
        norms.legend()
        clipped.plot(steps, [record["clipped_fraction"] for record in shown], color=_PRIVATE)
        clipped.set(title="Share of clipped examples", xlabel="step", ylim=(0, 1))
        sizes.plot(
            [record["step"] for record in records],
            [record["sampled_batch_size"] for record in records],
            color=_PRIVATE,
        )
        sizes.set(title="Sampled batch size", xlabel="step")
        return _text(figure)


def _svg(draw: Any, size: tuple[float, float]) -> str:
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        return _text(figure)


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(_STYLE)


def _text(figure: Figure) -> str:
    """Returns the ``<svg>`` element without the XML prologue, which HTML does not allow."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
