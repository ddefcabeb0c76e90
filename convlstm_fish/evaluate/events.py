"""Forecasts as alarms: how many bursts are announced, how early, and at what price in false alarms.

A label says that a burst starts within the horizon, so an alarm raised at frame a says so too: it stands
until the burst comes or the horizon has passed, and only then can the next one be raised. An alarm that is
raised within no burst's warning window is false. A forecast that is always on therefore pays for it with one
false alarm per horizon of calm.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convlstm_fish.evaluate.metrics import Bools, Floats

Frames = npt.NDArray[np.int64]

FALSE_ALARMS_PER_MINUTE = (1.0, 2.0, 5.0, 10.0)
MERGE_SECONDS = 0.5
_GRID = 100


@dataclass(frozen=True)
class Events:
    """Bursts, and the frames at which an alarm for each is right.

    Attributes:
        first, last: (E,) first and last frame of each warning window.
        onset: (E,) the frame at which the burst starts.
    """

    first: Frames
    last: Frames
    onset: Frames

    def seen_from(self, frames: Frames) -> Events:
        """Those whose warning window holds at least one of ``frames`` (ascending)."""
        seen = np.searchsorted(frames, self.last, side="right") > np.searchsorted(frames, self.first)
        return Events(self.first[seen], self.last[seen], self.onset[seen])


def events_from_labels(labels: Bools, horizon_frames: int, merge_frames: int) -> Events:
    """Bursts as the labels tell them: a burst starts where a run of label 1 ends.

    Runs that are at most ``merge_frames`` apart are one, because the burst rule flickers in a noisy calm. The
    warning window reaches back over the run and at least over one horizon. A run that the end of the series
    cuts off shows no start of a burst and is left out.
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([0], labels.astype(np.int8), [0]))))
    starts, ends = edges[::2], edges[1::2]
    if len(starts):
        apart = starts[1:] - ends[:-1] > merge_frames
        starts = starts[np.concatenate(([True], apart))]
        ends = ends[np.concatenate((apart, [True]))]
    whole = ends < len(labels)
    starts, ends = starts[whole], ends[whole]
    return Events(np.maximum(0, np.minimum(starts, ends - horizon_frames)), ends - 1, ends)


def events_from_onsets(onsets: npt.ArrayLike, horizon_frames: int) -> Events:
    """Bursts with known start frames; each may be announced within one horizon before its start."""
    onset = np.unique(np.asarray(onsets, dtype=np.int64))
    return Events(np.maximum(0, onset - horizon_frames), onset - 1, onset)


@dataclass(frozen=True)
class Alarms:
    """What a threshold gives.

    Attributes:
        threshold: an alarm is raised where the score is at least this.
        raised: number of alarms.
        false: those that announce no burst.
        recalled: bursts with an alarm in their warning window.
        lead_frames: (recalled,) frames from the first such alarm to the start of the burst.
    """

    threshold: float
    raised: int
    false: int
    recalled: int
    lead_frames: Frames


class AlarmClock:
    """Raises alarms on one set of frames and counts them against one set of bursts.

    Args:
        frames: (K,) ascending scored frames.
        events: bursts that can be seen from them.
        horizon_frames: how long an alarm stands.
    """

    def __init__(self, frames: Frames, events: Events, horizon_frames: int) -> None:
        self.frames = frames
        self.events = events
        self.horizon_frames = horizon_frames
        end = int(max(frames[-1], events.onset.max(initial=0))) + 2
        cover = np.zeros(end, dtype=np.int64)
        np.add.at(cover, events.first, 1)
        np.add.at(cover, events.last + 1, -1)
        self._announces = np.cumsum(cover) > 0
        # After the last burst an alarm stands for the whole horizon.
        onsets = np.append(np.sort(events.onset), frames[-1] + horizon_frames + 1)
        next_onset = onsets[np.searchsorted(onsets, frames, side="right")]
        self._stands_until = np.minimum(next_onset, frames + horizon_frames)

    @property
    def watched_frames(self) -> int:
        """Frames during which an alarm could have been raised: gaps count as one horizon at most."""
        return int(np.minimum(np.diff(self.frames), self.horizon_frames).sum()) + 1

    def count(self, scores: Floats, threshold: float) -> Alarms:
        """Alarms where ``scores`` (K,) reach ``threshold``."""
        above = scores >= threshold
        armed = self.frames[above].tolist()
        until = self._stands_until[above].tolist()
        raised: list[int] = []
        i = 0
        while i < len(armed):
            raised.append(armed[i])
            i = bisect_left(armed, until[i], i + 1)
        alarms = np.array(raised, dtype=np.int64)
        false = int((~self._announces[alarms]).sum())
        # The first alarm inside each burst's window, if there is one.
        nearest = np.searchsorted(alarms, self.events.first)
        padded = np.append(alarms, np.iinfo(np.int64).max)
        heard = padded[nearest] <= self.events.last
        lead = self.events.onset[heard] - padded[nearest][heard]
        return Alarms(threshold, len(raised), false, int(heard.sum()), lead)


@dataclass(frozen=True)
class EventPoint:
    """The most bursts announced at no more than a given rate of false alarms.

    Attributes:
        allowed_per_minute: the given rate.
        threshold: the one that does it; ``inf`` where only silence keeps the rate.
        recall: share of the bursts that are announced.
        false_alarms_per_minute: what it costs.
        median_lead_seconds: median time from the alarm to the burst; None where none is announced.
    """

    allowed_per_minute: float
    threshold: float
    recall: float
    false_alarms_per_minute: float
    median_lead_seconds: float | None


def event_points(
    scores: Floats, clock: AlarmClock, fps: float, allowed: tuple[float, ...] = FALSE_ALARMS_PER_MINUTE
) -> tuple[EventPoint, ...]:
    """Recall and lead time at each allowed rate of false alarms, over up to 100 thresholds of ``scores``.

    The thresholds are quantiles of the scores themselves; a constant score tells no frame from another and
    raises no alarm. ``clock`` must hold at least one burst.
    """
    grid = np.unique(np.quantile(scores, np.linspace(0, 1, _GRID), method="nearest"))[::-1]
    if len(grid) == 1:
        grid = grid[:0]
    minutes = clock.watched_frames / fps / 60
    tried = [clock.count(scores, float(threshold)) for threshold in (np.inf, *grid)]
    points = []
    for rate in allowed:
        best = max((a for a in tried if a.false / minutes <= rate), key=lambda a: a.recalled)
        points.append(
            EventPoint(
                allowed_per_minute=rate,
                threshold=best.threshold,
                recall=best.recalled / len(clock.events.onset),
                false_alarms_per_minute=best.false / minutes,
                median_lead_seconds=float(np.median(best.lead_frames)) / fps if best.recalled else None,
            )
        )
    return tuple(points)
