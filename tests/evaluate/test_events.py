"""Alarms and bursts: by hand, and against a version that walks frame by frame."""

from __future__ import annotations

import numpy as np
import pytest

from convlstm_fish.evaluate.events import (
    AlarmClock,
    Alarms,
    Events,
    event_points,
    events_from_labels,
    events_from_onsets,
)


def series(text: str) -> np.ndarray:
    return np.array([character == "1" for character in text.replace(" ", "")])


def test_bursts_from_labels() -> None:
    #                  0123456789 0123456789 0123456789
    labels = series("0001100000 0110111000 0000000011")
    events = events_from_labels(labels, horizon_frames=4, merge_frames=1)
    # The run that the end cuts off shows no burst; the gap of one frame is bridged.
    np.testing.assert_array_equal(events.onset, [5, 17])
    np.testing.assert_array_equal(events.first, [1, 11])
    np.testing.assert_array_equal(events.last, [4, 16])
    assert len(events_from_labels(labels, 4, 0).onset) == 3
    assert len(events_from_labels(np.zeros(9, bool), 4, 1).onset) == 0
    assert len(events_from_labels(np.ones(9, bool), 4, 1).onset) == 0


def test_bursts_from_onsets_and_what_can_be_seen_of_them() -> None:
    events = events_from_onsets([30, 2, 30, 60], horizon_frames=5)
    np.testing.assert_array_equal(events.onset, [2, 30, 60])
    np.testing.assert_array_equal(events.first, [0, 25, 55])
    np.testing.assert_array_equal(events.last, [1, 29, 59])
    np.testing.assert_array_equal(events.seen_from(np.arange(10, 56)).onset, [30, 60])
    np.testing.assert_array_equal(events.seen_from(np.array([20, 29, 54])).onset, [30])


def test_alarms_by_hand() -> None:
    frames = np.arange(40)
    scores = np.zeros(40)
    scores[[3, 4, 12, 13, 14, 20, 21, 22, 23, 24, 25, 26]] = 1
    # Horizon 5: the first alarm, at 3, has no burst and stands until 8; the one at 12 announces the burst at
    # 14; at 14 the burst has come, so a new alarm is raised, which is false, as is the one at 20; it expires
    # at 25, when the next one is raised, which announces the burst at 27.
    clock = AlarmClock(frames, events_from_onsets([14, 27], 5), 5)
    found = clock.count(scores, 0.5)
    assert (found.raised, found.false, found.recalled) == (5, 3, 2)
    np.testing.assert_array_equal(found.lead_frames, [2, 2])
    assert clock.watched_frames == 40
    assert clock.count(scores, np.inf).raised == 0


def test_always_on_pays_once_a_horizon() -> None:
    frames = np.arange(1, 601)
    clock = AlarmClock(frames, events_from_onsets([300], 10), 10)
    found = clock.count(np.ones(600), 0.5)
    # At 1, 11, ..., 291, of which the last announces the burst, then at 300, 310, ..., 600.
    assert (found.raised, found.false, found.recalled) == (30 + 31, 29 + 31, 1)
    (point,) = event_points(np.linspace(0, 1, 600), clock, fps=10, allowed=(0.0,))
    assert (point.recall, point.false_alarms_per_minute) == (0.0, 0.0)
    assert point.median_lead_seconds is None
    assert np.isinf(point.threshold)


def test_a_constant_score_raises_no_alarm() -> None:
    clock = AlarmClock(np.arange(100), events_from_onsets([50], 10), 10)
    assert {p.recall for p in event_points(np.zeros(100), clock, fps=10)} == {0.0}


def walk(frames: np.ndarray, scores: np.ndarray, threshold: float, events: Events, horizon: int) -> Alarms:
    """The definition, one frame after the other."""
    onsets = sorted(events.onset.tolist())
    raised, until = [], -1
    for frame, score in zip(frames.tolist(), scores):
        if frame >= until and score >= threshold:
            raised.append(frame)
            until = min([frame + horizon, *[o for o in onsets if o > frame][:1]])
    windows = list(zip(events.first.tolist(), events.last.tolist(), events.onset.tolist()))
    false = sum(not any(a <= alarm <= b for a, b, _ in windows) for alarm in raised)
    leads = []
    for a, b, onset in windows:
        inside = [alarm for alarm in raised if a <= alarm <= b]
        if inside:
            leads.append(onset - inside[0])
    return Alarms(threshold, len(raised), false, len(leads), np.array(leads, dtype=np.int64))


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_walking(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = np.flatnonzero(rng.random(500) < 0.8) + 1
    scores = np.round(rng.random(len(frames)), 2)
    if seed % 2:
        events = events_from_onsets(rng.integers(1, 520, size=12), 20)
    else:
        events = events_from_labels(rng.random(520) < 0.05, 20, 3)
    events = events.seen_from(frames)
    clock = AlarmClock(frames, events, 20)
    for threshold in (0.3, 0.8, 0.95, 0.99):
        found, expected = clock.count(scores, threshold), walk(frames, scores, threshold, events, 20)
        assert (found.raised, found.false, found.recalled) == (expected.raised, expected.false, expected.recalled)
        np.testing.assert_array_equal(found.lead_frames, expected.lead_frames)


def test_points_keep_the_allowed_rate_and_cannot_be_bettered_on_the_grid() -> None:
    rng = np.random.default_rng(0)
    frames = np.arange(1, 3001)
    events = events_from_onsets(np.arange(100, 3000, 97), 15)
    near = np.zeros(3000)
    for onset in events.onset:
        near[onset - 16 : onset - 1] = 0.05
    scores = near + rng.random(3000)
    clock = AlarmClock(frames, events, 15)
    minutes = clock.watched_frames / 10 / 60
    recalls = []
    tried = [clock.count(scores, t) for t in np.quantile(scores, np.linspace(0, 1, 100), method="nearest")]
    for point in event_points(scores, clock, fps=10):
        at = clock.count(scores, point.threshold)
        assert at.false / minutes == point.false_alarms_per_minute <= point.allowed_per_minute
        assert at.recalled / len(events.onset) == point.recall
        affordable = [a.recalled for a in tried if a.false / minutes <= point.allowed_per_minute]
        assert at.recalled == max(affordable, default=0)
        recalls.append(point.recall)
    assert recalls == sorted(recalls)
    assert recalls[-1] > recalls[0]
