"""``evaluate``: models and the baseline panel, scored on the same frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt

from convlstm_fish.data.labels import BURST_C, HORIZON_SECONDS, burst_labels, horizon_frames_of
from convlstm_fish.errors import UserError
from convlstm_fish.evaluate.baselines import Scorer, baseline_panel
from convlstm_fish.evaluate.bootstrap import MIN_BLOCKS, bootstrap_auc, percentile_interval
from convlstm_fish.evaluate.calibration import calibrate
from convlstm_fish.evaluate.checks import (
    frame_indices,
    label_series,
    model_scorers,
    motion_series,
    positive_number,
)
from convlstm_fish.evaluate.events import (
    MERGE_SECONDS,
    AlarmClock,
    Events,
    event_points,
    events_from_labels,
    events_from_onsets,
)
from convlstm_fish.evaluate.metrics import Bools, Floats, compute_metrics, rank_auc
from convlstm_fish.evaluate.motion_lstm import MotionLSTMConfig
from convlstm_fish.evaluate.result import Difference, Evaluation, Row
from convlstm_fish.evaluate.verdict import verdict

# The clip of 4 s and the horizon of 1.5 s: two frames further apart than this share neither input nor label.
BLOCK_SECONDS = 5.5
RESAMPLES = 1000
CONFIDENCE = 0.95
HORIZON_STEP_SECONDS = 0.1
HORIZON_END_SECONDS = 3.0

LabelsAtHorizon = Callable[[int], npt.ArrayLike]


def evaluate(
    frames: npt.ArrayLike,
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike | Mapping[str, npt.ArrayLike],
    motion: npt.ArrayLike,
    *,
    fps: float,
    name: str = "model",
    horizon_seconds: float = HORIZON_SECONDS,
    event: str = "burst",
    onsets: npt.ArrayLike | None = None,
    labels_at_horizon: LabelsAtHorizon | None = None,
    burst_c: float = BURST_C,
    train_motion: npt.ArrayLike | None = None,
    train_labels: npt.ArrayLike | None = None,
    motion_lstm: MotionLSTMConfig | None = None,
    block_seconds: float = BLOCK_SECONDS,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Evaluation:
    """Score probabilities against labels, beside the baseline panel.

    Args:
        frames: (K,) ascending indices of the scored frames within the split, each in [1, T - 1].
        labels: (T,) 0 or 1 for every frame of the split.
        probabilities: (K,) probability of label 1 at each scored frame, or several such by name; the
            first one gets ``Evaluation.verdict``.
        motion: (T,) motion of the split, y[t] between frames t and t + 1.
        fps: frames per second.
        name: what to call the model where ``probabilities`` is a single array.
        horizon_seconds: how far the labels look ahead.
        event: what the table and the report call that which a label announces.
        onsets: start frames of the events, where they are known; otherwise a burst starts where a run of
            label 1 ends.
        labels_at_horizon: labels (T,) for a horizon in frames, for the skill against horizon; without it the
            burst rule on ``motion``. Whichever it is has to give ``labels`` at their own horizon, or the
            skill against horizon is not defined.
        burst_c: the burst rule's c.
        train_motion, train_labels: (S,) those of the training split, for the LSTM on the motion series.
        motion_lstm: that LSTM's configuration.
        block_seconds: length of a bootstrap block.
        resamples: number of bootstrap resamples.
        confidence: of the intervals.
        seed: of the resampling.

    Returns:
        Every figure of the table and the report. Where a figure has no meaning, such as an AUC of one
        class, the row says so.

    Raises:
        UserError: where arrays do not fit each other or hold values that are no labels, probabilities or
            motion.
    """
    fps = positive_number("fps", fps)
    horizon = horizon_frames_of(positive_number("horizon_seconds", horizon_seconds), fps)
    positive_number("block_seconds", block_seconds)
    if resamples < 1:
        raise UserError(f"resamples: must be at least 1, got {resamples}")
    if not 0 < confidence < 1:
        raise UserError(f"confidence: must lie between 0 and 1, got {confidence}")
    y = motion_series("motion", motion)
    truth = label_series("labels", labels, len(y), "motion")
    at = frame_indices(frames, len(y))
    models = model_scorers(probabilities, name, len(at))
    if (train_motion is None) != (train_labels is None):
        raise UserError("train_motion and train_labels: give both or neither")
    train_y = None if train_motion is None else motion_series("train_motion", train_motion)
    train_truth = None
    if train_y is not None and train_labels is not None:
        train_truth = label_series("train_labels", train_labels, len(train_y), "train_motion")
    lstm = motion_lstm or MotionLSTMConfig()

    panel = baseline_panel(
        at,
        truth,
        y,
        fps=fps,
        horizon_frames=horizon,
        train_motion=train_y,
        train_labels=train_truth,
        motion_lstm=lstm,
    )
    taken = {scorer.name for scorer in panel} & {model.name for model in models}
    if taken:
        raise UserError(f"probabilities: the name {min(taken)!r} belongs to a baseline; choose another")
    scorers = models + panel

    positive = truth[at]
    events = _events(truth, onsets, horizon, round(MERGE_SECONDS * fps)).seen_from(at)
    clock = AlarmClock(at, events, horizon)
    horizons, per_horizon, horizon_undefined = _labels_per_horizon(
        at, truth, y, fps, horizon, labels_at_horizon, burst_c
    )
    rows = [_row(s, at, positive, clock, fps, per_horizon) for s in scorers]

    scored = [row.scorer for row in rows if row.metrics is not None]
    block_frames = max(1, round(block_seconds * fps))
    span = int(at[-1] - at[0]) + 1
    intervals_undefined = None
    resampled: dict[str, Floats] = {}
    if not scored:
        intervals_undefined = rows[0].undefined
    elif span < MIN_BLOCKS * block_frames:
        intervals_undefined = (
            f"the scored frames span {span / fps:.1f} s, which is fewer than {MIN_BLOCKS} blocks of {block_seconds:g} s"
        )
    else:
        values = bootstrap_auc(
            at,
            [s.scores for s in scored if s.scores is not None],
            positive,
            block_frames=block_frames,
            resamples=resamples,
            seed=seed,
        )
        resampled = {s.name: v for s, v in zip(scored, values)}
    rows = [_with_interval(row, resampled, confidence) for row in rows]
    model_rows, panel_rows = rows[: len(models)], rows[len(models) :]
    differences = {row.name: _differences(row, panel_rows, resampled, confidence) for row in model_rows}

    return Evaluation(
        rows=tuple(rows),
        differences=tuple(d for row in model_rows for d in differences[row.name]),
        verdicts={row.name: verdict(row, panel_rows, differences[row.name], confidence) for row in model_rows},
        frames=at,
        labels=truth,
        motion=y,
        fps=fps,
        horizon_frames=horizon,
        events=events,
        watched_seconds=clock.watched_frames / fps,
        horizons=horizons,
        horizon_undefined=horizon_undefined,
        intervals_undefined=intervals_undefined,
        settings={
            "fps": fps,
            "horizon_seconds": horizon_seconds,
            "block_seconds": block_seconds,
            "resamples": resamples,
            "confidence": confidence,
            "seed": seed,
            "motion_lstm": asdict(lstm) if train_y is not None else None,
        },
        notes=_notes(at, positive, len(y), horizon, fps, events, onsets is not None, event),
        event=event,
    )


def _events(labels: Bools, onsets: npt.ArrayLike | None, horizon: int, merge_frames: int) -> Events:
    if onsets is None:
        return events_from_labels(labels, horizon, merge_frames)
    starts = np.asarray(onsets)
    if starts.ndim != 1 or (starts.size and not np.issubdtype(starts.dtype, np.integer)):
        raise UserError(f"onsets: must be a list of start frames, got {starts.dtype} of shape {starts.shape}")
    return events_from_onsets(starts[(starts > 0) & (starts < len(labels))], horizon)


def _labels_per_horizon(
    frames: npt.NDArray[np.int64],
    labels: Bools,
    motion: Floats,
    fps: float,
    horizon: int,
    labels_at_horizon: LabelsAtHorizon | None,
    burst_c: float,
) -> tuple[tuple[float, ...], list[tuple[Bools, Bools]], str | None]:
    """Horizons in seconds; for each, which scored frames have a full horizon and the labels of those."""
    steps = round(HORIZON_END_SECONDS / HORIZON_STEP_SECONDS) + 1
    seconds = np.arange(steps) * HORIZON_STEP_SECONDS
    # At a low frame rate several steps are the same number of frames.
    counts = np.unique(np.rint(seconds * fps).astype(np.int64))
    rule = labels_at_horizon or (lambda ahead: burst_labels(motion, first=0, horizon=ahead, c=burst_c))

    def at(ahead: int) -> tuple[Bools, Bools]:
        known = frames <= len(labels) - 2 - ahead
        values = label_series(f"labels at a horizon of {ahead} frames", rule(ahead), len(labels), "motion")
        return known, values[frames[known]]

    known, expected = at(horizon)
    if not np.array_equal(expected, labels[frames[known]]):
        source = "labels_at_horizon gives" if labels_at_horizon else f"the burst rule with c = {burst_c:g} gives"
        return (), [], f"the labels are not what {source} at their own horizon, so those of others are unknown"
    return tuple((counts / fps).tolist()), [at(ahead) for ahead in counts.tolist()], None


def _row(
    scorer: Scorer,
    frames: npt.NDArray[np.int64],
    positive: Bools,
    clock: AlarmClock,
    fps: float,
    per_horizon: list[tuple[Bools, Bools]],
) -> Row:
    if scorer.scores is None:
        return Row(scorer, undefined=scorer.missing)
    scores = scorer.scores
    calibration = calibrate(scores, positive) if scorer.is_probability else None
    events = event_points(scores, clock, fps) if len(clock.events.onset) else ()
    horizon_auc = tuple(
        None if np.isnan(value) else float(value)
        for known, labels in per_horizon
        for value in rank_auc(scores[known], labels[None])
    )
    undefined, metrics = None, None
    if positive.all() or not positive.any():
        undefined = f"not defined, all {len(frames)} scored frames have label {int(positive[0])}"
    else:
        metrics = compute_metrics(scores, positive)
    return Row(scorer, undefined, metrics, calibration=calibration, events=events, horizon_auc=horizon_auc)


def _with_interval(row: Row, resampled: dict[str, Floats], confidence: float) -> Row:
    if row.name not in resampled:
        return row
    return replace(row, auc_interval=percentile_interval(resampled[row.name], confidence))


def _differences(model: Row, panel: list[Row], resampled: dict[str, Floats], confidence: float) -> list[Difference]:
    out = []
    for row in panel:
        if model.metrics is None or row.metrics is None:
            continue
        interval = None
        if model.name in resampled:
            interval = percentile_interval(resampled[model.name] - resampled[row.name], confidence)
        out.append(Difference(model.name, row.name, model.metrics.auc - row.metrics.auc, interval))
    return out


def _notes(
    frames: npt.NDArray[np.int64],
    positive: Bools,
    length: int,
    horizon: int,
    fps: float,
    events: Events,
    known_onsets: bool,
    event: str,
) -> tuple[str, ...]:
    notes = [
        f"{len(frames)} frames scored, {frames[0]} to {frames[-1]}, at {fps:g} frames per second; "
        f"{positive.sum()} of them ({positive.mean():.2%}) have label 1.",
        "Best accuracy and Youden's J are at thresholds chosen on these same frames, as in the published "
        "experiment: a threshold fixed beforehand does no better.",
    ]
    unknown = int((frames > length - 2 - horizon).sum())
    if unknown:
        notes.append(
            f"{unknown} scored frames are so near the end that their future is not fully recorded; their "
            f"labels are taken as given."
        )
    source = "given as start frames" if known_onsets else "taken to start where a run of label 1 ends"
    notes.append(f"{event.capitalize()}s that could be announced: {len(events.onset)}; they are {source}.")
    return tuple(notes)
