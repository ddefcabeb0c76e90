"""Evaluation of a model's probabilities on one split of a recording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from convlstm_fish.data.labels import CLIP_SECONDS, HORIZON_SECONDS, clip_frames_of, horizon_frames_of
from convlstm_fish.data.recording import Recording
from convlstm_fish.errors import UserError
from convlstm_fish.evaluate.evaluation import LabelsAtHorizon, evaluate
from convlstm_fish.evaluate.result import Evaluation


def evaluate_recording(
    recording: Recording,
    frames: npt.ArrayLike,
    probabilities: npt.ArrayLike | Mapping[str, npt.ArrayLike],
    *,
    split: str = "test",
    label: str = "burst",
    horizon_seconds: float = HORIZON_SECONDS,
    clip_frames: int | None = None,
    threshold: float | None = None,
    **options: Any,
) -> Evaluation:
    """:func:`convlstm_fish.evaluate.evaluate` with everything that a recording knows.

    Motion and labels are the split's; the LSTM on the motion series is trained on the training split, where
    there is one; with labels "chase" the chases are the events and give the labels of other horizons.

    Args:
        recording: the recording.
        frames: (K,) ascending last frames of the scored clips, as numbers of the recording.
        probabilities: (K,) or several by name.
        split: the split that the frames lie in.
        label: kind of label, as in ``Recording.labels``.
        horizon_seconds: how far the labels look ahead.
        clip_frames: length of a clip, by default 4 s; burst labels start at the first whole clip.
        threshold: the burst rule's c, by default the recording's.
        options: the rest of ``evaluate``'s, such as ``name`` or ``block_seconds``.

    Raises:
        UserError: where the recording has no such split or label, or the frames lie outside the split.
    """
    if split not in recording.splits:
        there = ", ".join(recording.splits) or "none"
        raise UserError(f"{recording.path}: has no {split} split (it has: {there})")
    start, stop = recording.splits[split]
    at = np.asarray(frames)
    if at.size and (at.min() < start or at.max() >= stop):
        raise UserError(f"frames: {at.min()} to {at.max()} reach outside the {split} split, {start} to {stop - 1}")
    horizon = horizon_frames_of(horizon_seconds, recording.fps)
    first = (clip_frames or clip_frames_of(CLIP_SECONDS, recording.fps)) - 1
    labels = recording.labels(label, first=first, horizon=horizon, c=threshold)
    if "train" in recording.splits and split != "train":
        a, b = recording.splits["train"]
        options = {"train_motion": recording.motion[a:b], "train_labels": labels[a:b], **options}
    onsets: npt.NDArray[np.int64] | None = None
    at_horizon: LabelsAtHorizon | None = None
    if label in ("burst", "chase"):

        def at_horizon(frames_ahead: int) -> npt.ArrayLike:
            return recording.labels(label, first=0, horizon=frames_ahead, c=threshold)[start:stop]

    if label == "chase":
        chases = np.asarray(recording.array("chases"), dtype=np.int64)[:, 0]
        onsets = chases[(chases > start) & (chases < stop)] - start
    return evaluate(
        at - start,
        labels[start:stop],
        probabilities,
        recording.motion[start:stop],
        fps=recording.fps,
        horizon_seconds=horizon_seconds,
        event=label,
        onsets=onsets,
        labels_at_horizon=at_horizon,
        **options,
    )
