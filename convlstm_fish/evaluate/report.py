"""The evaluation as one HTML file that opens without a network."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import plotly.io
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from convlstm_fish.evaluate import figures as draw
from convlstm_fish.evaluate.result import Evaluation, Row
from convlstm_fish.evaluate.table import difference_text, interval_text, notes_of, number, skill_text, threshold_text
from convlstm_fish.evaluate.verdict import signed
from convlstm_fish.files import write_text


def write_report(
    result: Evaluation,
    path: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
    *,
    title: str | None = None,
) -> Path:
    """Write ``result`` as one self-contained HTML file.

    The page holds plotly.js once, the series, the curves and a threshold slider that counts rates and alarms
    anew in the page. It asks the network for nothing and shows every text it is given as text.

    Args:
        result: what ``evaluate`` returned.
        path: the file; it appears complete or not at all.
        settings: more of the run's settings for the last table, nested mappings allowed.
        title: heading, by default the models' names.

    Returns:
        ``path``.

    Raises:
        UserError: where the file cannot be written.
    """
    target = Path(path)
    write_text(target, render(result, settings or {}, title))
    return target


def render(result: Evaluation, settings: Mapping[str, Any], title: str | None = None) -> str:
    """The page as text; see :func:`write_report`."""
    models = [row for row in result.rows if row.scorer.is_model]
    shown = _figures(result)
    scored = [row for row in result.rows if row.events]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = resources.files("convlstm_fish.evaluate") / "page"
    return environment.from_string((page / "page.html").read_text(encoding="utf-8")).render(
        title=title or " and ".join(row.name for row in models),
        event=result.event,
        lede=f"Does a {result.event} start within {result.horizon_frames / result.fps:.3g} s? {result.notes[0]}",
        level=f"{result.settings['confidence']:.0%}",
        horizon=f"{result.horizon_frames / result.fps:.3g}",
        verdicts=[_verdict(result, row) for row in models],
        rows=[_table_row(result, row) for row in result.rows],
        differences=[
            {
                "model": d.model,
                "baseline": d.baseline,
                "value": signed(d.value),
                "interval": difference_text(d.interval),
            }
            for d in result.differences
        ],
        models=[row.name for row in models],
        figures=shown,
        horizon_undefined=result.horizon_undefined,
        calibration=[
            {
                "name": row.name,
                "ece": number(row.calibration.ece),
                "brier": number(row.calibration.brier),
                "skill": skill_text(row.calibration),
            }
            for row in result.rows
            if row.calibration is not None
        ],
        bursts=len(result.events.onset),
        event_rates=[f"{p.allowed_per_minute:g}" for p in scored[0].events] if scored else [],
        events=[{"name": row.name, "cells": _event_cells(row)} for row in scored],
        notes=notes_of(result),
        settings=_flat({**result.settings, **settings}),
        css=Markup((page / "page.css").read_text(encoding="utf-8")),
        js=Markup((page / "page.js").read_text(encoding="utf-8")),
        plotly_js=Markup(get_plotlyjs()),
        payload=Markup(_script_safe(json.dumps(_payload(result, models, shown), allow_nan=False))),
    )


def _script_safe(text: str) -> str:
    """JSON that cannot end the script element it stands in, whatever the strings hold."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _figures(result: Evaluation) -> dict[str, Any]:
    """Every figure that is defined, as plain JSON; figures keep the names of their places in the page."""
    shown: dict[str, Any] = {"calibration": draw.calibration(result)}
    if result.differences:
        shown["differences"] = draw.differences(result)
    if any(row.metrics is not None for row in result.rows):
        shown["roc"] = draw.roc(result)
        shown["pr"] = draw.precision_recall(result)
        shown["thresholds"] = draw.thresholds(result)
        shown["histogram"] = draw.histogram(result)
    if result.horizon_undefined is None:
        shown["horizon"] = draw.horizon(result)
    return {name: json.loads(plotly.io.to_json(figure, validate=False)) for name, figure in shown.items()}


def _packed(values: npt.NDArray[Any], kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode("ascii")


def _payload(result: Evaluation, models: list[Row], figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "series": {
            "fps": result.fps,
            "horizon": result.horizon_frames,
            "minutes": result.watched_seconds / 60,
            "frames": _packed(result.frames, "<i4"),
            "motion": _packed(result.motion[result.frames], "<f4"),
            "labels": _packed(result.positive, "u1"),
        },
        "event": result.event,
        "events": {
            "first": result.events.first.tolist(),
            "last": result.events.last.tolist(),
            "onset": result.events.onset.tolist(),
        },
        "models": [
            {
                "colour": draw.style(result, row)[0],
                "probability": _packed(row.scorer.scores, "<f8"),
                "best_accuracy": None if row.metrics is None else min(1.0, row.metrics.best_accuracy.threshold),
                "best_j": None if row.metrics is None else min(1.0, row.metrics.best_j.threshold),
            }
            for row in models
            if row.scorer.scores is not None
        ],
        "figures": figures,
    }


def _verdict(result: Evaluation, row: Row) -> dict[str, str]:
    own = [d for d in result.differences if d.model == row.name]
    good = bool(own) and all(d.interval is not None and d.interval.low > 0 for d in own)
    badge = "Beats the panel." if good else "Does not beat the panel." if own else "No verdict."
    return {"kind": "good" if good else "mixed", "badge": badge, "text": result.verdicts[row.name]}


def _table_row(result: Evaluation, row: Row) -> dict[str, Any]:
    colour, dash = draw.style(result, row)
    out: dict[str, Any] = {
        "name": row.name,
        "description": row.scorer.description,
        "is_model": row.scorer.is_model,
        "undefined": row.undefined,
        "colour": colour,
        "dash": dash,
    }
    if row.metrics is not None:
        m = row.metrics
        out |= {
            "auc": number(m.auc),
            "auc_interval": interval_text(row.auc_interval),
            "average_precision": number(m.average_precision),
            "points": [
                {
                    "value": number(p.value),
                    "threshold": threshold_text(p.threshold),
                    "tpr": number(p.tpr),
                    "fpr": number(p.fpr),
                }
                for p in (m.best_accuracy, m.best_j)
            ],
        }
    return out


def _event_cells(row: Row) -> list[dict[str, str]]:
    return [
        {
            "recall": f"{p.recall:.0%}",
            "lead": "" if p.median_lead_seconds is None else f"{p.median_lead_seconds:.1f} s before",
        }
        for p in row.events
    ]


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings as (name, value) lines, nested ones with dotted names."""
    lines: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            lines += [(f"{key}.{inner}", text) for inner, text in _flat(value)]
        else:
            lines.append((str(key), "not set" if value is None else str(value)))
    return lines
