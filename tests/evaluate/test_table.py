"""The tables in the terminal."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from convlstm_fish.evaluate import Evaluation, evaluate, print_table
from convlstm_fish.evaluate.table import threshold_text


def printed(result: Evaluation, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table(result, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def line(text: str, name: str) -> str:
    return next(row for row in text.splitlines() if name in row)


def test_published_table(published_result: Evaluation) -> None:
    text = printed(published_result)
    assert [cell.strip() for cell in line(text, "upbeat-snowflake-91").split("│")[2:-1]] == [
        "0.830",
        "0.446",
        "0.847 at 0.801",
        "0.519 at 0.308",
    ]
    assert "0.865" in line(text, "minus the last frame difference")
    assert "0.106 / 0.014" in text
    assert "0.830 / 0.310" in text
    assert "never" in line(text, "always negative")
    assert "not run: needs the training motion and" in text
    flat = " ".join(text.replace("│", " ").split())
    assert published_result.verdict in flat


def test_names_are_not_markup_and_narrow_terminals_hold_the_figures() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(300) % 30 < 5, 2)
    result = evaluate(
        np.arange(100, 500), labels, {"[red]x[/nothing]": rng.random(400)}, rng.random(600), fps=10, resamples=20
    )
    assert "[red]x[/nothing]" in printed(result)
    assert "never" in printed(result, width=60)


@pytest.mark.parametrize("width", [80, 120])
def test_a_reason_stands_below_the_table_and_leaves_rows_low(width: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(300) % 30 < 5, 2)
    result = evaluate(np.arange(1, 500), labels, {"net": rng.random(499)}, rng.random(600), fps=10, resamples=20)
    table, _, below = printed(result, width).partition("┘\n")
    assert "needs" not in table
    rows = table.split("┩\n")[1].splitlines()
    at = next(k for k, row in enumerate(rows) if row.startswith("│ two-layer LSTM"))
    assert [cell.strip() for cell in rows[at].split("│")[2:-1]] == ["–"] * 4
    assert len(rows[at:]) <= 4  # the lines of the name, at the most three, and the one under the table
    assert below.startswith("published algorithmic baseline: needs 2 values of motion before the first")
    assert "\ntwo-layer LSTM on the motion series: not run: needs the training motion and" in below


def test_undefined_rows_print() -> None:
    result = evaluate(np.arange(1, 50), np.zeros(60), np.zeros(49), np.zeros(60), fps=30)
    text = printed(result)
    assert "all 49 scored frames have label 0" in text
    assert "No confidence intervals: " in text
    assert "Difference in AUC" not in text
    assert "Bursts announced" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.30817, "0.308"),
        (float("inf"), "never"),
        (0.0, "0.000"),
        (1.0, "1.000"),
        (-0.00079028, "−0.000790"),
        (0.0123, "0.012"),
    ],
)
def test_thresholds(value: float, text: str) -> None:
    assert threshold_text(value) == text
