"""The published targets, reproduced, and the label rules against loops over their definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convlstm_fish.data import labels
from convlstm_fish.errors import UserError


def target(shared: Path, split: str, name: str) -> np.ndarray:
    return np.load(shared / "published/targets" / split / f"{name}.npy")


def test_motion_of_the_published_frames(shared: Path) -> None:
    frames = np.stack([np.asarray(Image.open(p)) for p in sorted((shared / "published/frames").glob("*.png"))])
    motion = labels.motion(frames, chunk_frames=4)
    np.testing.assert_allclose(motion[:10], target(shared, "train", "Y_tilde")[:10], rtol=0, atol=1e-10)
    assert motion[-1] == 0


@pytest.mark.parametrize(("split", "percent"), [("train", 13.36), ("validation", 12.66), ("test", 15.43)])
def test_published_labels(shared: Path, split: str, percent: float) -> None:
    made = labels.burst_labels(target(shared, split, "Y_tilde"))
    np.testing.assert_array_equal(made, target(shared, split, "Y_label"))
    assert round(100 * made.mean(), 2) == percent


def test_published_baseline(shared: Path) -> None:
    made = labels.published_baseline(target(shared, "test", "Y_tilde"))
    np.testing.assert_allclose(made, target(shared, "test", "Y_pred_baseline"), rtol=0, atol=1e-15)


def slow_published_baseline(y: np.ndarray, first: int, window: int, last: int) -> list[float]:
    out = [0.0] * len(y)
    for t in range(first, len(y) - 1 - last):
        v = y[max(0, t - window) : t]
        moved, rested = 5300 * (np.ptp(v) - 0.0006), -11000 * (y[t - 1] - v.min() - 0.2 * np.ptp(v))
        out[t] = (1 / (1 + np.exp(-moved)) + 1 / (1 + np.exp(-rested))) / 2
    return out


@pytest.mark.parametrize(
    ("length", "first", "window", "last"),
    [
        (300, 119, 89, 10),  # the publication: whole windows only
        (300, 89, 89, 0),  # the first whole window
        (300, 59, 89, 0),  # clips of 2 s: windows of 59, 60 ... 88 and then 89 frames
        (300, 2, 89, 0),
        (300, 2, 89, -1),  # the very last frame as well
        (91, 2, 89, 0),  # one whole window
        (90, 2, 89, 0),  # none
        (40, 2, 89, 0),
        (40, 10, 2, 5),  # the shortest window
        (40, 39, 5, -1),  # one value
    ],
)
def test_published_baseline_against_its_definition(length: int, first: int, window: int, last: int) -> None:
    y = 2e-3 * np.random.default_rng(length).random(length)
    made = labels.published_baseline(y, first, window, last)
    np.testing.assert_allclose(made, slow_published_baseline(y, first, window, last), rtol=0, atol=1e-14)
    assert (made != 0).sum() == max(0, length - 1 - last - first)


@pytest.mark.parametrize("first", [0, 1])
def test_published_baseline_needs_two_values_of_motion(first: int) -> None:
    y = 1e-3 * np.random.default_rng(0).random(40)
    np.testing.assert_array_equal(labels.published_baseline(y, first, 5, 0), labels.published_baseline(y, 2, 5, 0))
    for length in range(4):
        assert not labels.published_baseline(y[:length], first, 5, 0)[:2].any()


def test_auto_threshold_is_the_published_one_on_the_published_motion(shared: Path) -> None:
    assert labels.auto_threshold(target(shared, "train", "Y_tilde")) == pytest.approx(0.001, rel=1e-3)
    with pytest.raises(UserError, match="no window of 120"):
        labels.auto_threshold(np.zeros(164))


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_motion_is_the_mean_absolute_difference(chunk: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    wide = frames.astype(np.float64)
    expected = np.append(np.abs(wide[1:] - wide[:-1]).mean(axis=(1, 2)) / 255, 0)
    np.testing.assert_allclose(labels.motion(frames, chunk), expected, rtol=1e-14)


def slow_burst_labels(y: np.ndarray, first: int, h: int, b: float, c: float) -> list[int]:
    out = [0] * len(y)
    for t in range(first, len(y) - 1 - h):
        w = y[t : t + h + 1]
        span = w.max() - w.min()
        out[t] = int(span >= c and y[t] <= w.min() + b * span)
    return out


@pytest.mark.parametrize(("length", "first", "horizon"), [(60, 9, 5), (16, 9, 5), (15, 9, 5), (1, 0, 1), (40, 0, 1)])
def test_burst_labels_against_their_definition(length: int, first: int, horizon: int) -> None:
    y = np.random.default_rng(length).random(length)
    made = labels.burst_labels(y, first, horizon, 0.2, 0.5)
    assert made.tolist() == slow_burst_labels(y, first, horizon, 0.2, 0.5)
    assert made.dtype == np.uint8


@pytest.mark.parametrize("horizon", [1, 4, 100])
def test_chase_labels_against_their_definition(horizon: int) -> None:
    starts = [0, 3, 11, 11, 19]
    expected = [int(any(t < s <= t + horizon for s in starts)) for t in range(20)]
    assert labels.chase_labels(starts, 20, horizon).tolist() == expected
    assert not labels.chase_labels([], 20, horizon).any()


def test_baseline_of_a_short_or_wild_recording_is_quiet() -> None:
    assert not labels.published_baseline(np.zeros(100)).any()
    wild = labels.published_baseline(np.random.default_rng(0).random(300) * 100)
    assert np.isfinite(wild).all()


def test_seconds_become_frames() -> None:
    assert labels.clip_frames_of(4, 30) == 120
    assert labels.clip_frames_of(4, 28.07, multiple=4) == 112
    assert labels.clip_frames_of(0.01, 30, multiple=4) == 4
    assert labels.horizon_frames_of(1.5, 30) == 45
    assert labels.horizon_frames_of(1.5, 28.07) == 42


def test_windows_never_cross_a_split() -> None:
    y = np.random.default_rng(1).random(60)
    made = labels.per_split(y, {"train": (0, 35), "test": (40, 60)}, lambda v: labels.burst_labels(v, 4, 5, 0.1, 0.5))
    assert made[:35].tolist() == slow_burst_labels(y[:35], 4, 5, 0.1, 0.5)
    assert made[40:].tolist() == slow_burst_labels(y[40:], 4, 5, 0.1, 0.5)
    assert not made[35:40].any()
    whole = labels.per_split(y, {}, lambda v: labels.burst_labels(v, 4, 5, 0.1, 0.5))
    assert whole.tolist() == slow_burst_labels(y, 4, 5, 0.1, 0.5)
