"""The HTML report as a file: alone, escaped, small enough, complete or absent. How it behaves: test_page.py."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from convlstm_fish.evaluate import Evaluation, evaluate, write_report


class Outline(HTMLParser):
    """Collects what a browser would fetch, the visible text, and the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.fetched += [str(values[key]) for key in ("src", "href", "data", "action", "poster") if key in values]
        if tag in ("link", "iframe", "object", "embed", "base"):
            self.fetched.append(tag)
        if "id" in values:
            self.ids.append(str(values["id"]))
        self._inside = tag
        self.scripts += tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text.append(data)


def read(path: Path) -> tuple[str, Outline]:
    page = path.read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(page)
    outline.close()
    return page, outline


def test_published_report_is_one_complete_file(published_result: Evaluation, tmp_path: Path) -> None:
    path = write_report(published_result, tmp_path / "new/report.html", {"command": "evaluate", "fit": {"lr": 8e-5}})
    page, outline = read(path)
    assert outline.fetched == ["#main"]
    assert len(re.findall(r"plotly\.js v\d", page)) >= 1
    assert outline.scripts == 3
    text = " ".join(" ".join(outline.text).split())
    assert published_result.verdict in text
    for figure in ("0.830", "0.787", "0.838", "0.865", "0.446", "0.505", "0.847", "0.519", "0.543", "0.604"):
        assert figure in text
    assert "fit.lr 8e-05" in text
    assert "command evaluate" in text
    for name in ("series", "roc", "pr", "thresholds", "histogram", "calibration", "horizon", "differences"):
        assert f"fig-{name}" in outline.ids
    assert len(outline.ids) == len(set(outline.ids))
    # plotly.js is 4.8 MB of it; 5237 frames and three models stay below half a megabyte.
    from plotly.offline import get_plotlyjs

    assert len(page) - len(get_plotlyjs()) < 500_000
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


HOSTILE = "</script><script>alert(1)</script><b>&amp;'\""


def hostile_result() -> Evaluation:
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 30 < 5
    return evaluate(
        np.arange(100, 500), labels, {HOSTILE: rng.random(400)}, 1e-3 * rng.random(600), fps=10, resamples=20
    )


def test_text_stays_text(tmp_path: Path) -> None:
    path = write_report(hostile_result(), tmp_path / "r.html", {HOSTILE: HOSTILE}, title=HOSTILE)
    page, outline = read(path)
    assert outline.scripts == 3
    assert "<script>alert" not in page
    text = "".join(outline.text)
    # Heading, title, verdict, table, differences, calibration, events, and the settings' name and value.
    assert text.count(HOSTILE) >= 8
    payload = page.split('id="payload">')[1].split("</script>")[0]
    names = [trace.get("name", "") for trace in json.loads(payload)["figures"]["roc"]["data"]]
    assert any("&lt;/script&gt;" in name for name in names)  # plotly reads tags in names, so these are none
    assert not any("<" in name for name in names)


def test_what_is_not_defined_says_so(tmp_path: Path) -> None:
    result = evaluate(np.arange(1, 50), np.zeros(60), np.zeros(49), np.full(60, 1e-3), fps=30)
    page, outline = read(write_report(result, tmp_path / "r.html"))
    text = " ".join(" ".join(outline.text).split())
    assert "No verdict on model: its AUC is not defined, all 49 scored frames have label 0." in text
    assert "no burst could be announced" in text
    assert "No confidence intervals" in text
    assert "fig-roc" not in outline.ids
    json.loads(page.split('id="payload">')[1].split("</script>")[0], parse_constant=pytest.fail)


def test_curves_are_thinned_without_losing_their_ends(published_result: Evaluation) -> None:
    from convlstm_fish.evaluate.figures import CURVE_POINTS, roc

    figure = roc(published_result)
    curve = published_result.rows[0].metrics.curve  # type: ignore[union-attr]
    assert len(curve.fpr) > 5000
    x, y = np.array(figure.data[0].x), np.array(figure.data[0].y)
    assert len(x) <= CURVE_POINTS
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(0.830, abs=1e-3)


def test_threshold_figure_counts_as_the_definition(published_result: Evaluation) -> None:
    from convlstm_fish.evaluate.figures import thresholds

    traces = {(t.name, t.meta["model"]): t for t in thresholds(published_result).data if t.meta}
    scores = published_result.rows[1].scorer.scores
    assert scores is not None
    truth = published_result.positive
    for i in (0, 57, 200, 313, 400):
        called = scores >= traces["accuracy", 1].x[i]
        assert traces["accuracy", 1].y[i] == pytest.approx((called == truth).mean())
        assert traces["true positive rate", 1].y[i] == pytest.approx(called[truth].mean())
        assert traces["false positive rate", 1].y[i] == pytest.approx(called[~truth].mean())
