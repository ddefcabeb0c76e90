"""The baseline panel: what a forecast has to beat before it can be said to have skill."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convlstm_fish.data.labels import published_baseline
from convlstm_fish.errors import UserError
from convlstm_fish.evaluate.metrics import Bools, Floats
from convlstm_fish.evaluate.motion_lstm import MotionLSTMConfig, train_motion_lstm

PUBLISHED_FPS = 30.0
PUBLISHED_WINDOW = 89
PUBLISHED_CLIP = 120

ALWAYS_NEGATIVE = "always negative"
LAST_DIFFERENCE = "minus the last frame difference"
PUBLISHED = "published algorithmic baseline"
PERSISTENCE = "persistence"
MOTION_LSTM = "two-layer LSTM on the motion series"


@dataclass(frozen=True)
class Scorer:
    """One thing that is scored: a model or a baseline.

    Attributes:
        name: how the table calls it.
        description: what exactly it predicts.
        is_model: False for the members of the panel.
        scores: (K,) one score per scored frame, larger meaning more likely 1; None where there is none.
        is_probability: whether the scores claim to be probabilities, so that calibration is defined.
        missing: why there are no scores, None where there are.
    """

    name: str
    description: str
    is_model: bool
    scores: Floats | None
    is_probability: bool
    missing: str | None = None


def scaled_frames(frames_at_30: int, fps: float) -> int:
    """A number of frames of the published 30 per second as frames at ``fps``, at least 1."""
    return max(1, round(frames_at_30 * fps / PUBLISHED_FPS))


def _last_difference(frames: npt.NDArray[np.int64], motion: Floats) -> Scorer:
    return Scorer(
        name=LAST_DIFFERENCE,
        description="-y[t-1]: the calmer the group is between the last two frames, the likelier a burst",
        is_model=False,
        scores=-motion[frames - 1],
        is_probability=False,
    )


def _published(frames: npt.NDArray[np.int64], motion: Floats, fps: float) -> Scorer:
    window = scaled_frames(PUBLISHED_WINDOW, fps)
    description = (
        f"much motion within the last {window} frames and little in the last one, through two sigmoids whose "
        f"constants were chosen for the published camera"
    )
    short = int((frames < window).sum())
    if short:
        description += (
            f"; the first {short} scored frames have fewer than {window} frames before them, there it is all the "
            f"motion since the start of the split"
        )
    if frames[0] < 2:
        missing = f"needs 2 values of motion before the first scored frame, which is frame {frames[0]}"
        return Scorer(PUBLISHED, description, False, None, True, missing)
    return Scorer(PUBLISHED, description, False, published_baseline(motion, 2, window, last=-1)[frames], True)


def _persistence(frames: npt.NDArray[np.int64], labels: Bools, horizon_frames: int) -> Scorer:
    newest_known = frames - 1 - horizon_frames
    scores = np.where(newest_known >= 0, labels[np.maximum(newest_known, 0)], 0.0)
    return Scorer(
        name=PERSISTENCE,
        description=f"the newest label that is already known at frame t, label[t-{1 + horizon_frames}]: the next "
        f"{horizon_frames} frames will bring what the last {horizon_frames} brought",
        is_model=False,
        scores=scores,
        is_probability=True,
    )


def _motion_lstm(
    frames: npt.NDArray[np.int64],
    motion: Floats,
    train_motion: Floats | None,
    train_labels: Bools | None,
    fps: float,
    horizon_frames: int,
    config: MotionLSTMConfig,
) -> Scorer:
    name = MOTION_LSTM if config.num_layers == 2 else f"{config.num_layers}-layer LSTM on the motion series"
    description = "a recurrent network trained on the motion of the training split, without any image"
    if train_motion is None or train_labels is None:
        return Scorer(name, description, False, None, True, "not run: needs the training motion and labels")
    at = np.arange(len(train_motion))
    # Before a full clip and after the last full horizon the label arrays hold 0 because nothing is known.
    labelled = (at >= scaled_frames(PUBLISHED_CLIP, fps) - 1) & (at <= len(train_motion) - 2 - horizon_frames)
    try:
        network = train_motion_lstm(train_motion, train_labels, labelled, fps=fps, config=config)
    except UserError as error:
        return Scorer(name, description, False, None, True, str(error))
    return Scorer(name, description, False, network.predict(motion)[frames], True)


def baseline_panel(
    frames: npt.NDArray[np.int64],
    labels: Bools,
    motion: Floats,
    *,
    fps: float,
    horizon_frames: int,
    train_motion: Floats | None,
    train_labels: Bools | None,
    motion_lstm: MotionLSTMConfig,
) -> list[Scorer]:
    """The members of the panel on the scored frames; one that cannot be computed says why.

    Args:
        frames: (K,) scored frames.
        labels: (T,) labels of the split.
        motion: (T,) its motion.
        fps: frames per second.
        horizon_frames: how far the labels look ahead.
        train_motion, train_labels: those of the training split, for the LSTM.
        motion_lstm: the LSTM's configuration.
    """
    return [
        Scorer(
            name=ALWAYS_NEGATIVE,
            description="probability 0 at every frame",
            is_model=False,
            scores=np.zeros(len(frames)),
            is_probability=True,
        ),
        _last_difference(frames, motion),
        _published(frames, motion, fps),
        _persistence(frames, labels, horizon_frames),
        _motion_lstm(frames, motion, train_motion, train_labels, fps, horizon_frames, motion_lstm),
    ]
