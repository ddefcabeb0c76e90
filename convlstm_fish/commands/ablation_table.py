"""The table and the plot of ablations: each level of each factor over its seeds, and how it differs from the base."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convlstm_fish.errors import UserError
from convlstm_fish.files import write_text

if TYPE_CHECKING:
    from convlstm_fish.commands.ablate import Run

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table by Cornish and Fisher's expansion.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Row:
    """One level of one factor over its seeds. ``delta`` is the paired difference from the base level, seed by seed."""

    factor: str
    level: str
    seeds: int
    auc: float
    auc_sd: float
    average_precision: float
    delta: float
    delta_half_width: float
    seconds: float


def model_metrics(path: Path) -> dict[str, Any]:
    """AUC and average precision of the trained model from the result file of a test.

    Raises:
        UserError: where the test gave no AUC.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content.get("rows")
    if not rows:
        raise UserError(f"{path}: holds no AUC; the base config of an ablation classifies clips of a recording")
    row = dict(rows[0])
    if row.get("auc") is None:
        raise UserError(f"{path}: the AUC is {row.get('undefined') or 'absent'}")
    return row


def summarise(plan: Mapping[tuple[str, str, int], Run]) -> list[Row]:
    """The table: for each level the mean over seeds, and the paired difference from the base with a 95 % t interval."""
    for run in plan.values():
        path = run.result()
        if path is not None and not run.metrics:
            try:
                run.metrics = model_metrics(path)
            except UserError as error:
                run.error = str(error)
                continue
            run.metrics["seconds"] = run.seconds() or math.nan
    rows = []
    groups: dict[tuple[str, str], dict[int, Run]] = {}
    for (factor, level, seed), run in plan.items():
        if run.metrics:
            groups.setdefault((factor, level), {})[seed] = run
    for (factor, level), by_seed in groups.items():
        base = {
            seed: run for (name, _, seed), run in plan.items() if name == factor and not run.overrides and run.metrics
        }
        aucs = [float(run.metrics["auc"]) for run in by_seed.values()]
        deltas = [
            float(by_seed[seed].metrics["auc"]) - float(base[seed].metrics["auc"]) for seed in by_seed if seed in base
        ]
        rows.append(
            Row(
                factor=factor,
                level=level,
                seeds=len(aucs),
                auc=statistics.fmean(aucs),
                auc_sd=statistics.stdev(aucs) if len(aucs) > 1 else math.nan,
                average_precision=statistics.fmean(float(run.metrics["average_precision"]) for run in by_seed.values()),
                delta=statistics.fmean(deltas) if deltas else math.nan,
                delta_half_width=_half_width(deltas),
                seconds=statistics.fmean(float(run.metrics["seconds"]) for run in by_seed.values()),
            )
        )
    return rows


def _half_width(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    freedom = len(values) - 1
    return _quantile(freedom) * statistics.stdev(values) / math.sqrt(len(values))


def _quantile(freedom: int) -> float:
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = 1.95996
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def cells(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """The table's rows as texts, under HEADER."""

    def number(value: float, digits: int = 3) -> str:
        return "-" if math.isnan(value) else f"{value:.{digits}f}"

    for row in rows:
        delta = "-" if math.isnan(row.delta) else f"{row.delta:+.3f}"
        if not math.isnan(row.delta_half_width):
            delta += f" ± {row.delta_half_width:.3f}"
        yield (
            row.factor,
            row.level,
            str(row.seeds),
            f"{number(row.auc)} ± {number(row.auc_sd)}" if row.seeds > 1 else number(row.auc),
            delta,
            number(row.average_precision),
            number(row.seconds, 0),
        )


HEADER = (
    "factor",
    "level",
    "seeds",
    "test AUC ± sd",
    "against base (95 %)",
    "average precision",
    "s per run",
)


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(rows)]
    return "\n".join(lines) + "\n"


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """One panel a factor: test AUC of each level with its standard deviation, in one self-contained HTML file."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    factors = list(dict.fromkeys(row.factor for row in rows))
    figure = make_subplots(rows=1, cols=len(factors), shared_yaxes=True, subplot_titles=factors)
    for column, factor in enumerate(factors, start=1):
        mine = [row for row in rows if row.factor == factor]
        spread = [0.0 if math.isnan(row.auc_sd) else row.auc_sd for row in mine]
        points = Scatter(
            x=[row.level for row in mine],
            y=[row.auc for row in mine],
            error_y={"type": "data", "array": spread},
            mode="markers",
            marker={"size": 9},
            name=factor,
        )
        figure.add_trace(points, row=1, col=column)
    figure.update_yaxes(title_text="test AUC (mean ± sd over seeds)", row=1, col=1)
    figure.update_layout(showlegend=False, title="Ablations: one factor changed at a time")
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))


def numbers(row: Row) -> dict[str, Any]:
    """The row for JSON, which has no NaN."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in vars(row).items()
    }
