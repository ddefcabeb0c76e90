"""Evaluation of a split of a recording."""

from __future__ import annotations

import numpy as np
import pytest

from convlstm_fish.data.labels import burst_labels, chase_labels
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.recording_writer import RecordingWriter
from convlstm_fish.errors import UserError
from convlstm_fish.evaluate import MotionLSTMConfig, evaluate_recording
from convlstm_fish.evaluate.report import render

TRAIN, TEST = (0, 700), (700, 1100)
STARTS = np.array([90, 260, 420, 610, 705, 780, 880, 1000])


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Eleven hundred tiny frames at 10 a second; eight chases, each a second of flicker."""
    rng = np.random.default_rng(0)
    frames = np.zeros((1100, 8, 8), np.uint8)
    for start in STARTS:
        frames[start : start + 10] = rng.integers(0, 40, size=(10, 8, 8))
    chases = np.stack([STARTS, STARTS + 10, np.zeros(8, np.int64), np.ones(8, np.int64)], axis=1)
    path = tmp_path_factory.mktemp("data") / "tank"
    with RecordingWriter(path, frames.shape, fps=10, splits={"train": TRAIN, "test": TEST}) as writer:
        writer.append(frames)
        writer.finish(chases=chases)
    return Recording.open(path)


LSTM = MotionLSTMConfig(hidden_size=4, epochs=1)


def test_bursts(recording: Recording) -> None:
    frames = np.arange(760, 1080)
    result = evaluate_recording(
        recording, frames, np.random.default_rng(0).random(320), motion_lstm=LSTM, resamples=20, name="net"
    )
    np.testing.assert_array_equal(result.frames, frames - 700)
    np.testing.assert_array_equal(result.motion, recording.motion[700:1100])
    np.testing.assert_array_equal(result.labels, burst_labels(recording.motion[700:1100], first=39, horizon=15) == 1)
    assert result.rows[0].name == "net"
    assert result.row("two-layer LSTM on the motion series").metrics is not None
    assert result.horizon_undefined is None
    assert result.fps == 10


@pytest.mark.parametrize("clip_frames", [8, 20, 40])
def test_every_member_of_the_panel_is_compared_on_chases(recording: Recording, clip_frames: int) -> None:
    """Also where the clips are shorter than the window of the published baseline, 3 s."""
    frames = np.arange(700 + clip_frames - 1, 1080)
    truth = chase_labels(STARTS, 1100, 10)[frames]
    result = evaluate_recording(
        recording,
        frames,
        0.5 * truth,
        label="chase",
        horizon_seconds=1.0,
        clip_frames=clip_frames,
        motion_lstm=LSTM,
        resamples=20,
    )
    assert [row.name for row in result.rows if row.metrics is None] == []
    assert {d.baseline for d in result.differences} == {
        "always negative",
        "minus the last frame difference",
        "published algorithmic baseline",
        "persistence",
        "two-layer LSTM on the motion series",
    }
    assert result.verdict.startswith("model (AUC 1.000) beats every baseline of the panel")


def test_chases_are_the_events(recording: Recording) -> None:
    frames = np.arange(760, 1080)
    truth = chase_labels(STARTS, 1100, 10)[frames]
    result = evaluate_recording(
        recording, frames, 0.5 * truth, label="chase", horizon_seconds=1.0, motion_lstm=LSTM, resamples=20
    )
    # 705 lies before every scored frame; 780, 880 and 1000 can be announced, counted within the split.
    np.testing.assert_array_equal(result.events.onset, [80, 180, 300])
    assert result.rows[0].metrics is not None
    assert result.rows[0].metrics.auc == 1.0
    assert result.rows[0].events[0].recall == 1.0
    assert result.horizon_undefined is None
    assert result.rows[0].horizon_auc[10] == 1.0
    assert result.notes[-1] == "Chases that could be announced: 3; they are given as start frames."
    page = render(result, {})
    assert "Does a chase start within 1 s?" in page
    assert "3 chases announced" in page
    assert "no burst" not in page


def test_threshold_and_clip_length_reach_the_labels(recording: Recording) -> None:
    frames = np.arange(760, 1080)
    options = {"motion_lstm": LSTM, "resamples": 20}
    result = evaluate_recording(recording, frames, np.zeros(320), threshold=0.5, clip_frames=20, **options)
    assert not result.labels.any()
    result = evaluate_recording(recording, frames, np.zeros(320), clip_frames=20, **options)
    np.testing.assert_array_equal(result.labels, burst_labels(recording.motion[700:1100], first=19, horizon=15) == 1)


def test_the_training_split_itself_has_no_lstm(recording: Recording) -> None:
    result = evaluate_recording(recording, np.arange(100, 600), np.zeros(500), split="train", resamples=20)
    assert result.rows[-1].undefined == "not run: needs the training motion and labels"


def test_refused(recording: Recording) -> None:
    with pytest.raises(UserError, match=r"has no validation split \(it has: train, test\)"):
        evaluate_recording(recording, np.arange(5), np.zeros(5), split="validation")
    with pytest.raises(UserError, match="frames: 600 to 760 reach outside the test split, 700 to 1099"):
        evaluate_recording(recording, np.array([600, 760]), np.zeros(2))
    with pytest.raises(UserError, match="non-empty"):
        evaluate_recording(recording, np.array([], int), np.array([]))
