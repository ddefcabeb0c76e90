"""The baseline panel: each member's definition, and that none of them sees the future."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from convlstm_fish.data.labels import burst_labels
from convlstm_fish.evaluate import baselines
from convlstm_fish.evaluate.baselines import Scorer, baseline_panel
from convlstm_fish.evaluate.motion_lstm import MotionLSTMConfig


def panel(frames: np.ndarray, labels: np.ndarray, motion: np.ndarray, **options: object) -> dict[str, Scorer]:
    settings: dict[str, object] = {
        "fps": 30.0,
        "horizon_frames": 45,
        "train_motion": None,
        "train_labels": None,
        "motion_lstm": MotionLSTMConfig(hidden_size=4, epochs=1),
    }
    return {s.name: s for s in baseline_panel(frames, labels, motion, **(settings | options))}  # type: ignore[arg-type]


def scores(member: Scorer) -> np.ndarray:
    assert member.scores is not None
    return member.scores


def motion_series(frames: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return 1e-3 * (1 + np.sin(np.arange(frames) / 15) + 0.2 * rng.random(frames))


def test_published_baseline_is_the_published_file(published) -> None:  # type: ignore[no-untyped-def]
    members = panel(published.frames, published.labels == 1, published.motion)
    expected = published.load("Y_pred_baseline")[published.frames]
    np.testing.assert_allclose(scores(members[baselines.PUBLISHED]), expected, rtol=0, atol=1e-14)


def test_definitions() -> None:
    motion = motion_series(400)
    labels = burst_labels(motion, first=0) == 1
    frames = np.arange(119, 354)
    members = panel(frames, labels, motion)
    np.testing.assert_array_equal(scores(members[baselines.ALWAYS_NEGATIVE]), np.zeros(len(frames)))
    np.testing.assert_array_equal(scores(members[baselines.LAST_DIFFERENCE]), -motion[118:353])
    np.testing.assert_array_equal(scores(members[baselines.PERSISTENCE]), labels[119 - 46 : 354 - 46])
    assert members[baselines.MOTION_LSTM].missing == "not run: needs the training motion and labels"
    assert labels.any()


def test_persistence_before_any_label_is_known_is_0() -> None:
    labels = np.ones(100, bool)
    member = panel(np.arange(1, 100), labels, motion_series(100))[baselines.PERSISTENCE]
    np.testing.assert_array_equal(scores(member), np.arange(1, 100) >= 46)
    assert "label[t-46]" in member.description


@pytest.mark.parametrize("now", [200, 260])
def test_nobody_sees_the_future(now: int) -> None:
    """Frames up to ``now`` are known: motion up to now - 1, and labels whose horizon has passed."""
    motion = motion_series(500)
    labels = burst_labels(motion, first=0) == 1
    frames = np.arange(119, 400)
    train = {"train_motion": motion_series(2000), "train_labels": burst_labels(motion_series(2000)) == 1}
    before = panel(frames, labels, motion, **train)
    other = motion.copy()
    other[now:] = 1e-3 * np.random.default_rng(1).random(500 - now)
    after = panel(frames, burst_labels(other, first=0) == 1, other, **train)
    until = frames <= now
    for name, member in before.items():
        np.testing.assert_array_equal(scores(member)[until], scores(after[name])[until], err_msg=name)
    for name in (baselines.LAST_DIFFERENCE, baselines.PUBLISHED, baselines.MOTION_LSTM):
        assert (scores(before[name])[~until] != scores(after[name])[~until]).any()


def test_what_cannot_be_computed_says_why() -> None:
    motion = motion_series(300)
    labels = burst_labels(motion, first=0) == 1
    members = panel(np.arange(1, 200), labels, motion, train_motion=motion[:80], train_labels=labels[:80])
    assert members[baselines.PUBLISHED].scores is None
    assert "needs 2 values of motion before the first scored frame, which is frame 1" in str(
        members[baselines.PUBLISHED].missing
    )
    assert "80 frames, too few" in str(members[baselines.MOTION_LSTM].missing)


@pytest.mark.parametrize(
    ("first", "fps", "window", "short"),
    [
        (119, 30.0, 89, 0),
        (89, 30.0, 89, 0),
        (88, 30.0, 89, 1),
        (59, 30.0, 89, 30),  # clips of 2 s
        (2, 30.0, 89, 87),
        (7, 10.0, 30, 23),
    ],
)
def test_published_baseline_of_clips_shorter_than_its_window(first: int, fps: float, window: int, short: int) -> None:
    motion = motion_series(300)
    frames = np.arange(first, 300)
    member = panel(frames, np.zeros(300, bool), motion, fps=fps)[baselines.PUBLISHED]
    expected = []
    for t in frames:
        v = motion[max(0, t - window) : t]
        moved, rested = 5300 * (np.ptp(v) - 0.0006), -11000 * (v[-1] - v.min() - 0.2 * np.ptp(v))
        expected.append((1 / (1 + np.exp(-moved)) + 1 / (1 + np.exp(-rested))) / 2)
    np.testing.assert_allclose(scores(member), expected, rtol=0, atol=1e-14)
    told = f"the first {short} scored frames have fewer than {window} frames before them"
    assert (told in member.description) == (short > 0)
    assert f"within the last {window} frames" in member.description


def test_windows_scale_with_the_frame_rate() -> None:
    motion = motion_series(300)
    member = panel(np.arange(30, 200), np.zeros(300, bool), motion, fps=10.0)[baselines.PUBLISHED]
    v = motion[100 - 30 : 100]
    expected = (
        1 / (1 + np.exp(-5300 * (np.ptp(v) - 0.0006))) + 1 / (1 + np.exp(11000 * (v[-1] - v.min() - 0.2 * np.ptp(v))))
    ) / 2
    assert scores(member)[100 - 30] == pytest.approx(expected)


def test_the_published_lstm_beats_the_frame_difference(published, published_train) -> None:  # type: ignore[no-untyped-def]
    members = panel(
        published.frames,
        published.labels == 1,
        published.motion,
        train_motion=published_train.motion,
        train_labels=published_train.labels == 1,
        motion_lstm=MotionLSTMConfig(),
    )
    truth = published.labels[published.frames]
    assert roc_auc_score(truth, scores(members[baselines.MOTION_LSTM])) == pytest.approx(0.871, abs=0.004)
