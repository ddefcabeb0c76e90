"""The report's figures as plotly figures; the page draws them and moves what follows the threshold."""

from __future__ import annotations

import html
import math
import textwrap
from typing import Any

import numpy as np
import plotly.graph_objects as go

from convlstm_fish.evaluate.metrics import Curve, Floats, Metrics
from convlstm_fish.evaluate.result import Evaluation, Row

# Mid tones that stand out on white and on near-black; dashes tell them apart without colour.
MODEL_COLOURS = ("#2f7de1", "#b14fd8", "#d6336c", "#0f9fb5")
BASELINE_STYLES = (
    ("#8b93a1", "dot"),
    ("#e07b00", "solid"),
    ("#12957a", "dash"),
    ("#a0785a", "dot"),
    ("#6f8f1f", "dashdot"),
)
CURVE_POINTS = 400
HISTOGRAM_BINS = 40


def style(result: Evaluation, row: Row) -> tuple[str, str]:
    """Colour and dash of a forecast, the same in every figure and in the table."""
    same_kind = [r.name for r in result.rows if r.scorer.is_model == row.scorer.is_model]
    i = same_kind.index(row.name)
    if row.scorer.is_model:
        return MODEL_COLOURS[i % len(MODEL_COLOURS)], "solid"
    return BASELINE_STYLES[i % len(BASELINE_STYLES)]


def label(name: str) -> str:
    """A name as plotly shall show it: plotly reads a small subset of HTML in every text."""
    return html.escape(name, quote=False)


def _line(result: Evaluation, row: Row) -> dict[str, Any]:
    colour, dash = style(result, row)
    return {"color": colour, "dash": dash, "width": 3 if row.scorer.is_model else 1.8}


def _layout(x: str, y: str, legend_rows: int, **more: Any) -> go.Layout:
    return go.Layout(
        template=go.layout.Template(),
        # Room for a legend of ``legend_rows`` lines under the axis title.
        margin={"l": 60, "r": 12, "t": 30, "b": 62 + 19 * legend_rows},
        xaxis={"title": {"text": x}} | more.pop("xaxis", {}),
        yaxis={"title": {"text": y}} | more.pop("yaxis", {}),
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
        **more,
    )


def _thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most ``CURVE_POINTS`` points of a curve, evenly along its length, ends included."""
    if len(x) <= CURVE_POINTS:
        return x, y
    along = np.concatenate(([0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))))
    keep = np.searchsorted(along, np.linspace(0, along[-1], CURVE_POINTS))
    keep = np.unique(np.minimum(keep, len(x) - 1))
    return x[keep], y[keep]


def _scored(result: Evaluation) -> list[tuple[Row, Metrics]]:
    return [(row, row.metrics) for row in result.rows if row.metrics is not None]


def _spot() -> go.Scatter:
    """The point at the chosen threshold, which the page moves."""
    return go.Scatter(
        x=[0.0],
        y=[0.0],
        mode="markers",
        marker={"size": 13, "color": "#ffffff", "line": {"color": MODEL_COLOURS[0], "width": 4}},
        name="at the chosen threshold",
        meta={"spot": True},
        hoverinfo="skip",
    )


def _unit_axis() -> dict[str, Any]:
    return {"range": [-0.01, 1.01], "zeroline": False}


def _curve_figure(
    result: Evaluation, x: str, y: str, lines: list[tuple[Row, Floats, Floats, float]], hover: str
) -> go.Figure:
    """Lines in the unit square, each with its area in the legend, and the spot of the chosen threshold."""
    figure = go.Figure(layout=_layout(x, y, len(result.rows) + 1, xaxis=_unit_axis(), yaxis=_unit_axis()))
    for row, along, up, area in lines:
        figure.add_scatter(
            x=along,
            y=up,
            mode="lines",
            line=_line(result, row),
            name=f"{label(row.name)}, {area:.3f}",
            hovertemplate=hover,
        )
    return figure.add_trace(_spot())


def roc(result: Evaluation) -> go.Figure:
    """ROC curves of everything that has one."""
    lines = [(row, *_thinned(m.curve.fpr, m.curve.tpr), m.auc) for row, m in _scored(result)]
    return _curve_figure(result, "false positive rate", "true positive rate", lines, hover="FPR %{x:.3f}, TPR %{y:.3f}")


def precision_recall(result: Evaluation) -> go.Figure:
    """Precision-recall curves of everything that has one, and the base rate."""
    lines = [(row, *_recall_and_precision(m.curve), m.average_precision) for row, m in _scored(result)]
    return _curve_figure(
        result, "recall (true positive rate)", "precision", lines, hover="recall %{x:.3f}, precision %{y:.3f}"
    )


def _recall_and_precision(curve: Curve) -> tuple[Floats, Floats]:
    if len(curve.thresholds) == 2:  # a constant score has the base rate for precision, at recall 1 only
        return np.array([0.0, 1.0]), np.full(2, curve.precision[-1])
    # Precision is not defined where nothing is called positive.
    return _thinned(curve.tpr[1:], curve.precision[1:])


def thresholds(result: Evaluation) -> go.Figure:
    """Accuracy, J and both rates of each model against the threshold; the page shows one model's."""
    figure = go.Figure(
        layout=_layout("threshold (probability)", "value", 3, xaxis=_unit_axis(), yaxis={"zeroline": False})
    )
    kinds = (
        ("accuracy", "accuracy", MODEL_COLOURS[0], "solid", 3),
        ("Youden's J", "youden_j", MODEL_COLOURS[2], "solid", 3),
        ("true positive rate", "tpr", "#12957a", "dash", 1.5),
        ("false positive rate", "fpr", "#e07b00", "dash", 1.5),
    )
    grid = np.linspace(0, 1, 401)
    models = [row for row in result.rows if row.scorer.is_model]
    for index, row in enumerate(models):
        if row.metrics is None:
            continue
        curve = row.metrics.curve
        # Thresholds descend: the last one that is still at least the grid's counts what the grid's counts.
        at = np.searchsorted(-curve.thresholds, -grid, side="right") - 1
        for name, attribute, colour, dash, width in kinds:
            figure.add_scatter(
                x=grid,
                y=getattr(curve, attribute)[at],
                mode="lines",
                name=name,
                line={"color": colour, "dash": dash, "width": width},
                meta={"model": index},
                hovertemplate="%{y:.3f} at %{x:.3f}",
            )
    accuracy = 1 - float(result.positive.mean())
    figure.add_scatter(
        x=[0, 1],
        y=[accuracy, accuracy],
        mode="lines",
        name="accuracy of always negative",
        line={"color": "#8b93a1", "dash": "dot", "width": 1.8},
        hovertemplate="%{y:.3f}",
    )
    return figure


def histogram(result: Evaluation) -> go.Figure:
    """Probabilities of each model for label 0 and for label 1, each class summing to 1."""
    figure = go.Figure(
        layout=_layout("probability", "share of the class", 1, barmode="overlay", bargap=0.0, xaxis=_unit_axis())
    )
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    models = [row for row in result.rows if row.scorer.is_model]
    for index, row in enumerate(models):
        if row.scorer.scores is None:
            continue
        for value, colour in ((0, "#5b7fb8"), (1, "#e66a3a")):
            chosen = row.scorer.scores[result.positive == bool(value)]
            count, _ = np.histogram(chosen, bins=edges)
            figure.add_bar(
                x=(edges[:-1] + edges[1:]) / 2,
                y=count / max(1, len(chosen)),
                width=1 / HISTOGRAM_BINS,
                customdata=count,
                name=f"label {value} ({len(chosen)} frames)",
                marker={"color": colour, "opacity": 0.6, "line": {"width": 0}},
                meta={"model": index},
                hovertemplate="%{customdata} frames, %{y:.1%} of the class, near %{x:.3f}",
            )
    return figure


def calibration(result: Evaluation) -> go.Figure:
    """Reliability of everything that claims to be a probability and takes more than two values."""
    figure = go.Figure(
        layout=_layout(
            "predicted probability (mean of the bin)",
            "observed share of label 1",
            len(result.rows),
            xaxis=_unit_axis(),
            yaxis=_unit_axis(),
        )
    )
    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        name="perfect",
        line={"color": "#8b93a1", "dash": "dot", "width": 1.5},
        hoverinfo="skip",
    )
    for row in result.rows:
        c = row.calibration
        if c is None or len(c.count) < 3:
            continue
        colour, _ = style(result, row)
        figure.add_scatter(
            x=c.predicted,
            y=c.observed,
            mode="lines+markers",
            line=_line(result, row),
            marker={"size": [5 + 22 * math.sqrt(n / len(result.frames)) for n in c.count], "color": colour},
            customdata=c.count,
            name=f"{label(row.name)}, error {c.ece:.3f}",
            hovertemplate="predicted %{x:.3f}, observed %{y:.3f}, %{customdata} frames",
        )
    return figure


def horizon(result: Evaluation) -> go.Figure:
    """AUC of the same scores against labels of other horizons."""
    figure = go.Figure(
        layout=_layout("horizon (s)", "AUC", len(result.rows), xaxis={"range": [0, max(result.horizons)]})
    )
    for row in result.rows:
        if any(value is not None for value in row.horizon_auc):
            figure.add_scatter(
                x=result.horizons,
                y=row.horizon_auc,
                mode="lines",
                line=_line(result, row),
                name=label(row.name),
                hovertemplate="AUC %{y:.3f} within %{x:.1f} s",
            )
    figure.add_vline(
        x=result.horizon_frames / result.fps,
        line={"color": "#8b93a1", "dash": "dot", "width": 1.5},
        annotation={"text": "the labels' horizon", "yref": "paper", "y": 0.02, "font": {"size": 11}},
        annotation_position="right",
    )
    return figure


def differences(result: Evaluation) -> go.Figure:
    """AUC of each model minus that of each baseline, with intervals, and the line it has to clear."""
    baselines = list(dict.fromkeys(d.baseline for d in result.differences))
    models = list(dict.fromkeys(d.model for d in result.differences))
    figure = go.Figure(
        layout=_layout(
            "difference in AUC (right of 0: the model is better)",
            "",
            1,
            yaxis={"autorange": "reversed", "automargin": True, "tickvals": list(range(len(baselines)))},
            xaxis={"zeroline": False},
            showlegend=len(models) > 1,
        )
    )
    # Broken into short lines, or a phone would show names and no figure.
    figure.layout.yaxis.ticktext = ["<br>".join(map(label, textwrap.wrap(name, 20))) for name in baselines]
    for k, model in enumerate(models):
        own = [d for d in result.differences if d.model == model]
        shift = 0.24 * (k - (len(models) - 1) / 2)
        low = [0.0 if d.interval is None else d.value - d.interval.low for d in own]
        high = [0.0 if d.interval is None else d.interval.high - d.value for d in own]
        figure.add_scatter(
            x=[d.value for d in own],
            y=[baselines.index(d.baseline) + shift for d in own],
            error_x={"type": "data", "array": high, "arrayminus": low, "thickness": 2.5, "width": 6},
            mode="markers",
            marker={"size": 10, "color": MODEL_COLOURS[k % len(MODEL_COLOURS)]},
            name=label(model),
            hovertemplate="%{x:+.3f}",
        )
    figure.add_vline(x=0, line={"color": "#8b93a1", "width": 2})
    return figure
