"""``evaluate``: the published numbers, the verdict, degenerate input and input that is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from convlstm_fish.data.labels import burst_labels, chase_labels
from convlstm_fish.errors import UserError
from convlstm_fish.evaluate import Evaluation, MotionLSTMConfig, evaluate
from convlstm_fish.evaluate.baselines import Scorer
from convlstm_fish.evaluate.bootstrap import Interval
from convlstm_fish.evaluate.metrics import compute_metrics
from convlstm_fish.evaluate.result import Difference, Row
from convlstm_fish.evaluate.verdict import verdict

FPS = 10.0


def tank(frames: int = 1500) -> dict[str, np.ndarray]:
    """A small recording at 10 frames a second: calm, then a burst every 8 s or so."""
    rng = np.random.default_rng(0)
    motion = 1e-3 + 1e-4 * rng.random(frames)
    for start in np.cumsum(rng.integers(60, 100, size=frames // 90)):
        motion[start : start + 20] += 2e-3 * np.hanning(20)[: max(0, frames - start)][: len(motion[start : start + 20])]
    labels = burst_labels(motion, first=39, horizon=15)
    frame = np.arange(40, frames - 20)
    return {
        "frames": frame,
        "labels": labels,
        "probabilities": np.clip(0.3 + 0.3 * labels[frame] + 0.2 * rng.normal(size=len(frame)), 0, 1),
        "motion": motion,
    }


def score(data: dict[str, np.ndarray], **options: object) -> Evaluation:
    return evaluate(**{"fps": FPS, "resamples": 100, **data, **options})  # type: ignore[arg-type]


# -- the published test set ------------------------------------------------------------------------------------


def test_published_areas(published_result: Evaluation) -> None:
    auc = {row.name: round(row.metrics.auc, 3) for row in published_result.rows if row.metrics}
    assert auc["upbeat-snowflake-91"] == 0.830
    assert auc["visionary-serenity"] == 0.787
    assert auc["the baseline's file"] == auc["published algorithmic baseline"] == 0.838
    assert auc["minus the last frame difference"] == 0.865
    assert auc["always negative"] == 0.5
    ap = {row.name: round(row.metrics.average_precision, 3) for row in published_result.rows if row.metrics}
    assert (ap["upbeat-snowflake-91"], ap["minus the last frame difference"]) == (0.446, 0.505)


def test_published_operating_points(published_result: Evaluation) -> None:
    snowflake = published_result.row("upbeat-snowflake-91").metrics
    assert snowflake is not None
    assert (round(snowflake.best_accuracy.value, 3), round(snowflake.best_accuracy.threshold, 2)) == (0.847, 0.80)
    j = snowflake.best_j
    assert (round(j.value, 3), round(j.threshold, 2), round(j.tpr, 3), round(j.fpr, 3)) == (0.519, 0.31, 0.830, 0.310)
    baseline = published_result.row("published algorithmic baseline").metrics
    assert baseline is not None
    assert (round(baseline.best_j.value, 3), round(baseline.best_j.threshold, 3)) == (0.543, 0.604)
    assert round(baseline.best_accuracy.value, 3) == 0.854


def test_published_verdict_is_that_a_frame_difference_is_better(published_result: Evaluation) -> None:
    assert published_result.verdict.startswith(
        "upbeat-snowflake-91 (AUC 0.830) does not beat minus the last frame difference (AUC 0.865, difference −0.035, "
        "95% interval −0.0"
    )
    (worse,) = [
        d
        for d in published_result.differences
        if (d.model, d.baseline) == ("upbeat-snowflake-91", "minus the last frame difference")
    ]
    assert worse.value == pytest.approx(0.829985 - 0.865293, abs=1e-5)
    assert worse.interval is not None
    assert -0.07 < worse.interval.low < worse.value < worse.interval.high < 0
    assert set(published_result.verdicts) == {"upbeat-snowflake-91", "visionary-serenity", "the baseline's file"}


def test_published_series_around_the_figures(published_result: Evaluation) -> None:
    assert len(published_result.frames) == 5237
    assert published_result.horizons[0] == 0
    assert published_result.horizons[-1] == 3
    row = published_result.row("upbeat-snowflake-91")
    assert row.horizon_auc[0] is None
    at = published_result.horizons.index(1.5)
    # At the labels' own horizon only the last frames, whose future is cut off, are missing.
    assert row.metrics is not None
    assert row.horizon_auc[at] == pytest.approx(row.metrics.auc, abs=2e-3)
    assert len(published_result.events.onset) == 75
    assert any("35 scored frames are so near the end" in note for note in published_result.notes)
    silent = published_result.row("always negative")
    assert {p.recall for p in silent.events} == {0.0}


# -- verdicts --------------------------------------------------------------------------------------------------


def test_a_model_that_knows_beats_the_panel() -> None:
    data = tank()
    truth = data["labels"][data["frames"]]
    noise = np.random.default_rng(2).random(len(truth))
    result = score(data | {"probabilities": 0.9 * truth + 0.1 * noise}, name="oracle")
    assert result.verdict.startswith("oracle (AUC 1.000) beats every baseline of the panel; the nearest is ")
    assert all(d.interval is not None and d.interval.low > 0 for d in result.differences)


def test_a_close_lead_is_no_proof() -> None:
    data = tank()
    nearly = data["motion"][data["frames"] - 1]
    ranks = np.argsort(np.argsort(-nearly)) / len(nearly)
    ranks[5] += 1e-9
    result = score(data | {"probabilities": np.clip(ranks, 0, 1)}, name="copy")
    assert "copy" in result.verdict
    assert "beats every" not in result.verdict
    assert "minus the last frame difference" in result.verdict


@pytest.mark.parametrize(
    ("differences", "sentence"),
    [
        ({"a": (0.2, 0.1, 0.3)}, "m (AUC 0.700) beats every baseline of the panel; the nearest is a (AUC 0.500, "),
        ({"a": (0.2, 0.1, 0.3), "b": (-0.1, -0.2, 0.1)}, "m (AUC 0.700) does not beat b (AUC 0.800, "),
        ({"a": (0.2, -0.1, 0.3)}, "m (AUC 0.700) does not demonstrably beat a (AUC 0.500, difference +0.200, 95% "),
        ({"a": (0.2, None, None)}, "m (AUC 0.700) does not demonstrably beat a (AUC 0.500, difference +0.200, no "),
        (
            {"a": (0.2, None, None), "b": (-0.1, None, None), "c": (0.1, None, None)},
            "m (AUC 0.700) does not beat b (AUC 0.800, difference −0.100, no confidence interval), nor demonstrably "
            "a (AUC 0.500, difference +0.200, no confidence interval) or c (AUC 0.600, difference +0.100, no "
            "confidence interval).",
        ),
    ],
)
def test_what_a_verdict_says(differences: dict[str, tuple[float, float | None, float | None]], sentence: str) -> None:
    def row(name: str, auc: float, is_model: bool) -> Row:
        metrics = compute_metrics(np.array([0.0, 1.0]), np.array([False, True]))
        return Row(Scorer(name, "", is_model, None, True), None, replace(metrics, auc=auc))

    panel = [row(name, 0.7 - value[0], False) for name, value in differences.items()]
    found = [
        Difference("m", name, value, None if low is None or high is None else Interval(low, high))
        for name, (value, low, high) in differences.items()
    ]
    said = verdict(row("m", 0.7, True), panel, found, 0.95)
    assert said.startswith(sentence)
    assert said.endswith(").")


def test_a_short_series_has_no_interval_and_says_so() -> None:
    result = score(tank(300), block_seconds=10)
    assert result.intervals_undefined == ("the scored frames span 24.0 s, which is fewer than 5 blocks of 10 s")
    assert all(d.interval is None for d in result.differences)
    assert "no confidence interval" in result.verdict


# -- the LSTM, chases, horizons --------------------------------------------------------------------------------


def test_lstm_joins_the_panel_with_training_data() -> None:
    data = tank()
    lstm = MotionLSTMConfig(hidden_size=4, epochs=1)
    result = score(data, train_motion=data["motion"], train_labels=data["labels"], motion_lstm=lstm)
    assert result.row("two-layer LSTM on the motion series").metrics is not None
    assert result.settings["motion_lstm"]["hidden_size"] == 4
    three = MotionLSTMConfig(hidden_size=4, epochs=1, num_layers=3)
    result = score(data, train_motion=data["motion"], train_labels=data["labels"], motion_lstm=three)
    assert result.rows[-1].name == "3-layer LSTM on the motion series"


def test_chases_give_events_and_other_horizons() -> None:
    data = tank()
    starts = np.array([100, 340, 341, 700, 1100, 1490])
    data["labels"] = chase_labels(starts, 1500, 15)
    result = score(data)
    assert "the burst rule with c = 0.001" in str(result.horizon_undefined)
    assert result.horizons == ()
    result = score(data, onsets=starts, labels_at_horizon=lambda h: chase_labels(starts, 1500, h))
    assert result.horizon_undefined is None
    # The chase at 1490 can be announced from 1475 on, which is scored up to 1479.
    np.testing.assert_array_equal(result.events.onset, starts)
    assert any("given as start frames" in note for note in result.notes)
    wrong = score(data, onsets=starts, labels_at_horizon=lambda h: chase_labels(starts, 1500, h + 1))
    assert "labels_at_horizon" in str(wrong.horizon_undefined)


def test_another_c_is_told_to_the_horizons() -> None:
    data = tank()
    data["labels"] = burst_labels(data["motion"], first=39, horizon=15, c=0.0005)
    assert score(data).horizon_undefined is not None
    assert score(data, burst_c=0.0005).horizon_undefined is None


# -- degenerate input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1])
def test_one_class_has_no_auc_and_says_so(value: int) -> None:
    data = tank()
    result = score(data | {"labels": np.full(1500, value)})
    assert {row.undefined for row in result.rows if row.name != "two-layer LSTM on the motion series"} == {
        f"not defined, all 1440 scored frames have label {value}"
    }
    assert result.verdict == f"No verdict on model: its AUC is not defined, all 1440 scored frames have label {value}."
    assert result.differences == ()
    json.loads(result.to_json())


def test_a_single_frame_and_a_constant_model() -> None:
    result = evaluate([5], np.zeros(9), [0.3], np.zeros(9), fps=30)
    assert result.rows[0].metrics is None
    constant = score(tank() | {"probabilities": np.full(1440, 0.5)})
    assert constant.rows[0].metrics is not None
    assert constant.rows[0].metrics.auc == 0.5
    assert "does not beat" in constant.verdict


def test_gaps_between_frames() -> None:
    data = tank()
    keep = np.r_[0:200, 500:1440:3]
    result = score(data | {"frames": data["frames"][keep], "probabilities": data["probabilities"][keep]})
    assert result.rows[0].auc_interval is not None
    # 200 frames, one gap that counts as a horizon, 313 steps of three frames and the last frame.
    assert result.watched_seconds == pytest.approx((199 + 15 + 313 * 3 + 1) / FPS)


def test_json_holds_every_figure_and_no_nan(published_result: Evaluation) -> None:
    found = json.loads(published_result.to_json(), parse_constant=pytest.fail)
    row = found["rows"][0]
    assert row["name"] == "upbeat-snowflake-91"
    assert row["auc"] == published_result.rows[0].metrics.auc  # type: ignore[union-attr]
    assert found["rows"][3]["best_youden_j"]["threshold"] is None  # always negative
    assert len(row["horizon_auc"]) == len(found["horizons_s"]) == 31
    assert found["data"]["bursts"] == 75
    with pytest.raises(KeyError):
        published_result.row("nobody")


# -- input that is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"probabilities": []}, "probabilities of model: must be a non-empty series"),
        ({"probabilities": {}}, "probabilities: give at least one"),
        ({"probabilities": np.zeros(7)}, "probabilities of model: has 7 values for 1440 scored frames"),
        ({"probabilities": np.full(1440, 1.5)}, r"must lie in \[0, 1\], got 1.5 to 1.5; pass logits through a sigmoid"),
        ({"probabilities": np.full(1440, np.nan)}, "1440 values are not finite, the first is nan at index 0"),
        ({"probabilities": {"persistence": np.zeros(1440)}}, "the name 'persistence' belongs to a baseline"),
        ({"probabilities": np.array(["a"] * 1440)}, "probabilities of model: must be an array of numbers"),
        ({"probabilities": np.zeros(1440, complex)}, "must be an array of numbers, got complex128"),
        ({"labels": np.zeros(10)}, "labels: has 10 values and motion has 1500"),
        ({"labels": np.full(1500, 2)}, "labels: must be 0 or 1 at every frame, got 2"),
        ({"labels": np.full(1500, np.nan)}, "labels: 1500 values are not finite"),
        ({"labels": np.zeros((1500, 2))}, r"labels: must be a non-empty series .* got shape \(1500, 2\)"),
        ({"motion": np.full(1500, -1.0)}, "motion: a mean absolute difference cannot be negative"),
        ({"motion": np.full(1500, np.inf)}, "motion: 1500 values are not finite"),
        ({"frames": np.arange(0, 1440)}, r"frames: must lie in \[1, 1499\]"),
        ({"frames": np.arange(61, 1501)}, r"frames: must lie in \[1, 1499\]"),
        ({"frames": np.full(1440, 1e300)}, r"frames: must lie in \[1, 1499\]"),
        ({"frames": np.arange(40, 1480)[::-1]}, "frames: must be ascending"),
        ({"frames": np.arange(40, 1480) + 0.5}, "frames: must be whole numbers, got 40.5"),
        ({"fps": 0}, "fps: must be a positive number, got 0"),
        ({"fps": float("nan")}, "fps: must be a positive number"),
        ({"horizon_seconds": -1}, "horizon_seconds: must be a positive number"),
        ({"block_seconds": 0}, "block_seconds: must be a positive number"),
        ({"resamples": 0}, "resamples: must be at least 1"),
        ({"confidence": 1.0}, "confidence: must lie between 0 and 1"),
        ({"onsets": np.zeros((3, 4))}, "onsets: must be a list of start frames"),
        ({"train_motion": np.zeros(1500)}, "train_motion and train_labels: give both or neither"),
        (
            {"train_motion": np.zeros(9), "train_labels": np.zeros(8)},
            "train_labels: has 8 values and train_motion has 9",
        ),
    ],
)
def test_refused(change: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        score(tank() | change)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
