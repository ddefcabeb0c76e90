"""The report in a real browser: the slider is moved and the numbers are read, without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convlstm_fish.data.labels import burst_labels
from convlstm_fish.evaluate import Evaluation, evaluate, write_report
from convlstm_fish.evaluate.events import AlarmClock

FPS = 30.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
    # No name resolves: a page that needs a network fails here.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def unavailable(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium through chromedriver with an empty profile; skips without them, fails where ``CI=true``."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        unavailable("needs Chromium and its driver: apt-get install -y chromium chromium-driver")
    try:
        from selenium import webdriver
    except ImportError:
        unavailable("needs selenium: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = str(binary)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(driver)))
    chrome.set_script_timeout(60)
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def result() -> Evaluation:
    """Two models on a made-up series of two minutes; the first has a name that tries to be markup."""
    rng = np.random.default_rng(0)
    motion = 1e-3 + 3e-4 * rng.random(3600)
    for start in np.cumsum(rng.integers(80, 200, size=24)):
        motion[start : start + 30] += (2e-3 * np.hanning(30))[: max(0, 3600 - start)]
    labels = burst_labels(motion)
    frames = np.r_[119:1500, 1700:3550]
    score = 0.25 + 0.3 * labels[frames] + 0.15 * rng.normal(size=len(frames))
    return evaluate(
        frames,
        labels,
        {"<b onmouseover=alert(1)>one</b>": np.clip(score, 0, 1), "two": rng.random(len(frames))},
        motion,
        fps=FPS,
        resamples=50,
    )


def open_page(browser: Any, path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(path.as_uri())
    WebDriverWait(browser, 90).until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))


@pytest.fixture(scope="module")
def opened(browser: Any, result: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The report, opened and drawn once for the tests that look at it."""
    browser.get_log("browser")
    path = tmp_path_factory.mktemp("page") / "report.html"
    open_page(browser, write_report(result, path, {"made by": "<i>a test</i>"}))
    return browser


@pytest.fixture
def page(opened: Any) -> Any:
    """The report as it looks after opening: first model, its best J."""
    opened.execute_script(
        "const s = document.getElementById('model'); s.value = '0'; s.dispatchEvent(new Event('change'));"
    )
    settle(opened)
    return opened


def settle(browser: Any) -> None:
    """Wait until the page has drawn what it was told."""
    browser.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 20)));"
    )


def stats(browser: Any) -> dict[str, str]:
    return {
        element.get_attribute("id").removeprefix("stat-"): element.text
        for element in browser.find_elements("css selector", ".stat b")
    }


def expected(result: Evaluation, model: int, threshold: float) -> dict[str, str]:
    """The numbers as the Python side computes them."""
    scores = result.rows[model].scorer.scores
    assert scores is not None
    truth, called = result.positive, scores >= threshold
    clock = AlarmClock(result.frames, result.events, result.horizon_frames)
    alarms = clock.count(scores, threshold)
    numbers = {
        "tpr": called[truth].mean(),
        "fpr": called[~truth].mean(),
        "precision": truth[called].mean(),
        "accuracy": (called == truth).mean(),
        "j": called[truth].mean() - called[~truth].mean(),
    }
    return {key: f"{value:.3f}".replace("-", "−") for key, value in numbers.items()} | {
        "alarms": str(alarms.raised),
        "false": f"{alarms.false / (result.watched_seconds / 60):.1f}",
        "recall": f"{alarms.recalled} of {len(result.events.onset)}",
        "lead": f"{np.median(alarms.lead_frames) / FPS:.2f} s",
    }


def trace(browser: Any, figure: str, name: str) -> dict[str, Any]:
    """What plotly drew of one trace."""
    found: dict[str, Any] = browser.execute_script(
        "const t = document.getElementById(arguments[0]).data.find((t) => t.name === arguments[1]);"
        "return {x: Array.from(t.x, Number), y: Array.from(t.y, Number)};",
        figure,
        name,
    )
    return found


def test_opens_without_a_network_and_without_complaint(page: Any, result: Evaluation) -> None:
    assert page.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") == []
    assert page.get_log("browser") == []
    drawn = page.execute_script(
        "return [...document.querySelectorAll('.figure')].filter((f) => f.data).map((f) => f.id)"
    )
    assert set(drawn) == {
        f"fig-{name}"
        for name in (
            "series",
            "alarms",
            "roc",
            "pr",
            "thresholds",
            "histogram",
            "calibration",
            "horizon",
            "differences",
        )
    }
    assert page.find_element("css selector", ".verdict .sentence").text == result.verdict
    # Nothing is wider than the window.
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_moving_the_slider_changes_the_numbers(page: Any, result: Evaluation) -> None:
    from selenium.webdriver.common.keys import Keys

    settle(page)
    best = result.rows[0].metrics
    assert best is not None
    assert stats(page) == expected(result, 0, best.best_j.threshold)
    slider = page.find_element("id", "threshold")
    before = float(slider.get_attribute("value"))
    slider.send_keys(Keys.ARROW_RIGHT * 25)
    settle(page)
    after = float(slider.get_attribute("value"))
    assert after == pytest.approx(before + 0.025, abs=1e-3)
    assert float(page.find_element("id", "threshold-number").get_attribute("value")) == pytest.approx(after)
    assert stats(page) == expected(result, 0, after)
    assert stats(page) != expected(result, 0, before)
    slider.send_keys(Keys.HOME)
    settle(page)
    assert stats(page) == expected(result, 0, 0.0)
    assert stats(page)["tpr"] == stats(page)["fpr"] == "1.000"


def test_number_buttons_and_model(page: Any, result: Evaluation) -> None:
    from selenium.webdriver.support.ui import Select

    page.find_element("id", "use-accuracy").click()
    settle(page)
    best = result.rows[0].metrics
    assert best is not None
    assert stats(page) == expected(result, 0, best.best_accuracy.threshold)
    assert stats(page)["accuracy"] == f"{best.best_accuracy.value:.3f}"
    Select(page.find_element("id", "model")).select_by_visible_text("two")
    box = page.find_element("id", "threshold-number")
    box.clear()
    box.send_keys("0.9")
    settle(page)
    assert stats(page) == expected(result, 1, 0.9)
    shown = page.execute_script(
        "return document.getElementById('fig-thresholds').data.filter((t) => t.visible !== false && t.meta)"
        ".map((t) => t.meta.model)"
    )
    assert shown == [1, 1, 1, 1]


def test_figures_follow_the_threshold(page: Any, result: Evaluation) -> None:
    box = page.find_element("id", "threshold-number")
    box.clear()
    box.send_keys("0.4")
    settle(page)
    called = result.rows[0].scorer.scores >= 0.4
    spot = trace(page, "fig-roc", "at the chosen threshold")
    assert spot["x"] == [pytest.approx(called[~result.positive].mean())]
    assert spot["y"] == [pytest.approx(called[result.positive].mean())]
    line = page.execute_script("return document.getElementById('fig-thresholds').layout.shapes.map((s) => s.x0)")
    assert line == [0.4]


def test_the_series_zooms_and_marks_labels_and_alarms(page: Any, result: Evaluation) -> None:
    page.find_element("css selector", "[data-window=all]").click()
    box = page.find_element("id", "threshold-number")
    box.clear()
    box.send_keys("0.4")
    settle(page)
    assert len(trace(page, "fig-series", "a burst starts")["x"]) == len(result.events.onset)
    false, right = trace(page, "fig-alarms", "false alarm"), trace(page, "fig-alarms", "alarm, a burst follows")
    armed = result.frames[result.rows[0].scorer.scores >= 0.4]  # type: ignore[operator]
    # Each box has four corners and a gap; the first corner is the frame at which the alarm is raised.
    starts = sorted(round(x * FPS) for x in [*false["x"][::5], *right["x"][::5]])
    assert starts[0] == armed[0]
    assert set(starts) <= set(armed.tolist())
    assert false["x"]
    assert right["x"]

    lines = page.execute_script(
        "return document.getElementById('fig-series').data.filter((t) => t.mode === 'lines' && t.line.width > 1)"
        ".map((t) => [t.line.color, t.x.filter((x) => x > 0).length])"
    )
    assert len({colour for colour, _ in lines}) == 10
    assert sum(count for _, count in lines) >= len(result.frames) - 2

    page.find_element("css selector", "[data-window='20']").click()
    page.find_element("css selector", "[data-shift='1']").click()
    settle(page)
    low, high = page.execute_script("return document.getElementById('fig-series').layout.xaxis.range")
    assert (low, high) == (pytest.approx(119 / FPS + 16), pytest.approx(119 / FPS + 36))
    drawn = trace(page, "fig-series", "label 1")["x"]
    edges = np.flatnonzero(np.diff(np.r_[0, result.labels.astype(int)]))
    runs = [(a, b) for a, b in zip(edges[::2], edges[1::2]) if b / FPS >= low and a / FPS <= high]
    np.testing.assert_allclose([x for x in drawn if x is not None][::4], [a / FPS for a, _ in runs])
    np.testing.assert_allclose([x for x in drawn if x is not None][2::4], [b / FPS for _, b in runs])
    page.execute_script("return Plotly.relayout('fig-series', {'xaxis.range[0]': 70, 'xaxis.range[1]': 80})")
    settle(page)
    points = page.execute_script(
        "return document.getElementById('fig-series').data.at(-1).customdata.map((row) => [row[2], row[0]])"
    )
    seen = {int(frame) for frame, _ in points}
    assert set(range(70 * 30, 80 * 30 + 1)) <= seen <= set(range(70 * 30 - 5, 80 * 30 + 6))
    at = {int(f): i for i, f in enumerate(result.frames)}
    for frame, probability in points[::50]:
        assert probability == result.rows[0].scorer.scores[at[int(frame)]]  # type: ignore[index]


def test_dark_and_light(page: Any) -> None:
    def look() -> tuple[str, str]:
        settle(page)
        return (
            page.execute_script("return getComputedStyle(document.body).backgroundColor"),
            page.execute_script("return document.getElementById('fig-roc').layout.font.color"),
        )

    found = {}
    for scheme in ("dark", "light"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        found[scheme] = look()
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert found["dark"] == ("rgb(18, 22, 29)", "#e7ebf2")
    assert found["light"] == ("rgb(246, 247, 249)", "#1b2330")


@pytest.mark.slow
def test_a_long_recording_stays_responsive(browser: Any, tmp_path: Path) -> None:
    """An hour at 30 frames a second: the series is thinned to what is shown, and a slider step is quick."""
    rng = np.random.default_rng(0)
    total = 108_000
    motion = 1e-3 * rng.random(total)
    frames = np.arange(119, total - 60)
    result = evaluate(
        frames, rng.random(total) < 0.1, rng.random(len(frames)), motion, fps=FPS, resamples=1, name="long"
    )
    open_page(browser, write_report(result, tmp_path / "long.html"))
    browser.find_element("css selector", "[data-window=all]").click()
    settle(browser)
    drawn = browser.execute_script("return document.getElementById('fig-series').data.at(-1).x.length")
    assert 3000 < drawn <= 6001
    took = browser.execute_async_script(
        "const done = arguments[0], box = document.getElementById('threshold'); const start = performance.now();"
        "box.value = 0.9; box.dispatchEvent(new Event('input'));"
        "requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));"
    )
    assert took < 5000


def test_one_class_opens_too(browser: Any, tmp_path: Path) -> None:
    result = evaluate(np.arange(1, 90), np.zeros(100), np.linspace(0, 1, 89), np.full(100, 1e-3), fps=30)
    browser.get_log("browser")
    open_page(browser, write_report(result, tmp_path / "empty.html"))
    settle(browser)
    assert browser.get_log("browser") == []
    found = stats(browser)
    assert found["tpr"] == found["lead"] == "not defined"
    assert found["recall"] == "no bursts"
    assert not browser.find_element("id", "use-j").is_enabled()
