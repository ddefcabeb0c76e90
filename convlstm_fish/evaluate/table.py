"""The evaluation as tables in the terminal."""

from __future__ import annotations

import math

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from convlstm_fish.evaluate.bootstrap import Interval
from convlstm_fish.evaluate.calibration import Calibration
from convlstm_fish.evaluate.metrics import OperatingPoint
from convlstm_fish.evaluate.result import Evaluation
from convlstm_fish.evaluate.verdict import signed

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"  # where there is no figure


def number(value: float, digits: int = 3) -> str:
    """A figure with a fixed number of decimals."""
    return f"{value:.{digits}f}".replace("-", MINUS)


def threshold_text(value: float) -> str:
    """A threshold: three decimals, or three significant digits where that would show nothing."""
    if math.isinf(value):
        return "never"
    digits = 3 if value == 0 or abs(value) >= 0.01 else 2 - math.floor(math.log10(abs(value)))
    return number(value, digits)


def interval_text(interval: Interval | None) -> str:
    """``low to high``, or a dash."""
    return DASH if interval is None else f"{number(interval.low)} to {number(interval.high)}"


def difference_text(interval: Interval | None) -> str:
    """``low to high`` with signs, or a dash."""
    return DASH if interval is None else f"{signed(interval.low)} to {signed(interval.high)}"


def skill_text(calibration: Calibration) -> str:
    """The Brier skill with its sign, or a dash."""
    return DASH if calibration.brier_skill is None else signed(calibration.brier_skill)


def notes_of(result: Evaluation) -> list[str]:
    """What a reader should know about the data, and why there are no intervals where there are none."""
    missing = result.intervals_undefined
    return [*result.notes, *([f"No confidence intervals: {missing}."] if missing else [])]


def point_text(point: OperatingPoint) -> tuple[str, str]:
    """An operating point as ``value at threshold`` and ``TPR / FPR``."""
    return (
        f"{number(point.value)} at {threshold_text(point.threshold)}",
        f"{number(point.tpr)} / {number(point.fpr)}",
    )


def _main_table(result: Evaluation) -> Table:
    table = Table(title="Every forecast on the same frames", title_justify="left")
    table.add_column("forecast", overflow="fold")
    level = f"{result.settings['confidence']:.0%}"
    for head in (f"AUC\n{level} interval", "AP", "best accuracy\nTPR / FPR", "best Youden's J\nTPR / FPR"):
        table.add_column(head, justify="right")
    for row in result.rows:
        # A user's name may hold square brackets, which must not be read as markup.
        name = Text(row.name, style="bold" if row.scorer.is_model else "")
        if row.metrics is None:
            table.add_row(name, *[DASH] * 4)
            continue
        m = row.metrics
        table.add_row(
            name,
            f"{number(m.auc)}\n{interval_text(row.auc_interval)}",
            number(m.average_precision),
            "\n".join(point_text(m.best_accuracy)),
            "\n".join(point_text(m.best_j)),
        )
    return table


def _reasons(result: Evaluation) -> list[Text]:
    """Why a row has no figures, a line for each such row; in the table it would fill a narrow column."""
    return [Text(f"{row.name}: {row.undefined}", style="italic") for row in result.rows if row.metrics is None]


def _difference_table(result: Evaluation) -> Table:
    table = Table(title="Difference in AUC, model minus baseline", title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("baseline", overflow="fold")
    table.add_column("difference", justify="right")
    table.add_column(f"{result.settings['confidence']:.0%} interval", justify="right")
    for d in result.differences:
        table.add_row(Text(d.model), Text(d.baseline), signed(d.value), difference_text(d.interval))
    return table


def _event_table(result: Evaluation) -> Table:
    table = Table(
        title=f"{result.event.capitalize()}s announced (median lead) at no more than this many false alarms a minute",
        title_justify="left",
    )
    table.add_column("forecast", overflow="fold")
    scored = [row for row in result.rows if row.events]
    for point in scored[0].events:
        table.add_column(f"{point.allowed_per_minute:g}/min", justify="right")
    for row in scored:
        cells = []
        for p in row.events:
            lead = "" if p.median_lead_seconds is None else f" ({p.median_lead_seconds:.1f} s)"
            cells.append(f"{p.recall:.0%}{lead}")
        table.add_row(Text(row.name), *cells)
    return table


def _calibration_table(result: Evaluation) -> Table:
    table = Table(title="Calibration of what claims to be a probability", title_justify="left")
    table.add_column("forecast", overflow="fold")
    for head in ("expected calibration error", "Brier score", "Brier skill"):
        table.add_column(head, justify="right")
    for row in result.rows:
        if row.calibration is not None:
            c = row.calibration
            table.add_row(Text(row.name), number(c.ece), number(c.brier), skill_text(c))
    return table


def print_table(result: Evaluation, console: Console | None = None) -> None:
    """Print the tables, the notes and the verdict of ``result``.

    Args:
        result: what ``evaluate`` returned.
        console: where to, by default standard output.
    """
    console = console or Console()
    parts: list[Table | Text] = [_main_table(result), *_reasons(result)]
    if result.differences:
        parts.append(_difference_table(result))
    if any(row.events for row in result.rows):
        parts.append(_event_table(result))
    parts.append(_calibration_table(result))
    console.print(Group(*parts))
    for note in notes_of(result):
        console.print(Text(note))
    verdicts = Text("\n".join(result.verdicts.values()))
    console.print(Panel(verdicts, title="Verdict", title_align="left"))
