"""Motion of a recording, the labels made from it, and the published baseline: arithmetic without I/O.

Everything here is a function of arrays. ``y[t]`` is the motion from frame t to frame t + 1; a label answers,
for the clip that ends at frame t, whether something starts within the next ``horizon`` frames. Windows are
counted in frames; ``clip_frames_of`` and ``horizon_frames_of`` turn seconds into frames for any frame rate.
The definitions are those of the published experiment (frames at 30 per second, clips of 4 s, horizon 1.5 s).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from convlstm_fish.errors import UserError

CLIP_SECONDS = 4.0
HORIZON_SECONDS = 1.5
BURST_B = 0.1
BURST_C = 0.001

# Of the published training windows this share has ptp(w) >= 0.001 (measured on targets/train/Y_tilde.npy).
PUBLISHED_BURST_SHARE = 0.694

FloatArray = npt.NDArray[np.float64]
LabelArray = npt.NDArray[np.uint8]


def clip_frames_of(seconds: float, fps: float, multiple: int = 1) -> int:
    """Frames in ``seconds`` at ``fps``, rounded to the nearest positive multiple of ``multiple``."""
    return max(1, round(seconds * fps / multiple)) * multiple


def horizon_frames_of(seconds: float, fps: float) -> int:
    """Frames in a horizon of ``seconds`` at ``fps``, at least 1."""
    return max(1, round(seconds * fps))


def frame_differences(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> FloatArray:
    """Mean absolute difference of frames, in units of full scale.

    Args:
        first, second: uint8 (n, H, W).

    Returns:
        float64 (n,): ``mean(|second - first|) / 255`` of each pair, summed exactly in integers.
    """
    apart = np.maximum(first, second) - np.minimum(first, second)
    return apart.sum(axis=(1, 2), dtype=np.int64) / (255.0 * first.shape[1] * first.shape[2])


def motion(frames: Any, chunk_frames: int = 64) -> FloatArray:
    """Motion of a recording, ``y[t] = mean over pixels of |frame[t + 1] - frame[t]| / 255``; the last one is 0.

    Args:
        frames: uint8 (T, H, W), an array, a memory map or anything that slices into arrays.
        chunk_frames: how many frames are in memory at a time.

    Returns:
        float64 (T,).
    """
    total = len(frames)
    out = np.zeros(total)
    for start in range(0, total - 1, chunk_frames):
        block = np.asarray(frames[start : min(start + chunk_frames, total - 1) + 1])
        out[start : start + len(block) - 1] = frame_differences(block[:-1], block[1:])
    return out


def _ranges(motion: npt.ArrayLike, width: int) -> tuple[FloatArray, FloatArray]:
    """Minimum and ptp of every window of ``width`` values of ``motion``, as views: memory stays linear."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(motion, dtype=np.float64), width)
    low = windows.min(axis=1)
    return low, windows.max(axis=1) - low


def burst_labels(
    motion: npt.ArrayLike, first: int = 119, horizon: int = 45, b: float = BURST_B, c: float = BURST_C
) -> LabelArray:
    """Label 1 where the group is calm at frame t and a burst of motion follows within ``horizon`` frames.

    With ``w = y[t .. t + horizon]``: label[t] = 1 where ``ptp(w) >= c`` and ``y[t] <= min(w) + b * ptp(w)``,
    for t in ``[first, T - 2 - horizon]``; 0 elsewhere.

    Args:
        motion: (T,) motion of one split.
        first: first frame with a label, clip length minus one.
        horizon: how many frames ahead.
        b: how near the window's minimum the present has to be, as a share of the window's range.
        c: the least range that is a burst, in units of motion.

    Returns:
        uint8 (T,).
    """
    y = np.asarray(motion, dtype=np.float64)
    out = np.zeros(len(y), dtype=np.uint8)
    stop = len(y) - 1 - horizon
    if stop <= first:
        return out
    low, ptp = _ranges(y[first:-1], horizon + 1)
    out[first:stop] = (ptp >= c) & (y[first:stop] <= low + b * ptp)
    return out


def auto_threshold(motion: npt.ArrayLike, first: int = 119, horizon: int = 45) -> float:
    """A threshold ``c`` for fish of another number or size than the published six.

    Motion is a mean over pixels, so it grows with the area of all fish. This returns the range that is exceeded
    by the same share of windows as 0.001 is in the published training recording.

    Raises:
        UserError: when no window fits into ``motion``.
    """
    y = np.asarray(motion, dtype=np.float64)
    if len(y) - 1 - horizon <= first:
        raise UserError(
            f"threshold auto: {len(y)} frames hold no window of {first + 1} + {horizon} frames; shorten them"
        )
    return float(np.quantile(_ranges(y[first:-1], horizon + 1)[1], 1 - PUBLISHED_BURST_SHARE))


def chase_labels(starts: npt.ArrayLike, n_frames: int, horizon: int) -> LabelArray:
    """Label 1 at frame t where a chase starts within the next ``horizon`` frames: at t + 1 .. t + horizon.

    Args:
        starts: (K,) start frames of the chases.
        n_frames: length T of the recording.
        horizon: how many frames ahead.

    Returns:
        uint8 (T,). The last ``horizon`` frames know only what starts inside the recording.
    """
    begins = np.zeros(n_frames + 1, dtype=np.int64)
    frames = np.asarray(starts, dtype=np.int64)
    np.add.at(begins, frames[(frames >= 0) & (frames < n_frames)] + 1, 1)
    # counted[t] = chases that started before frame t
    counted = np.cumsum(begins)
    t = np.arange(n_frames)
    return (counted[np.minimum(t + 1 + horizon, n_frames)] > counted[t + 1]).astype(np.uint8)


def published_baseline(motion: npt.ArrayLike, first: int = 119, window: int = 89, last: int = 10) -> FloatArray:
    """The baseline of the publication: a probability from the recent motion alone.

    With ``v = y[t - window .. t - 1]``: ``(sigmoid(5300 (ptp(v) - 0.0006)) + sigmoid(-11000 (y[t - 1] - min(v)
    - 0.2 ptp(v)))) / 2`` for t in ``[first, T - 2 - last]``; 0 elsewhere. High where the group moved a lot in
    the last 3 seconds and has just come to rest. Where t is less than ``window``, v is what there is,
    ``y[0 .. t - 1]``; the publication has no such frames, its clips are longer than its window.

    Args:
        motion: (T,) motion of one split.
        first: first frame with a value, at least 2, so that v has a range.
        window: length of v in frames.
        last: frames left out at the end; -1 gives the very last frame a value too.

    Returns:
        float64 (T,).
    """
    y = np.asarray(motion, dtype=np.float64)
    out = np.zeros(len(y))
    stop = len(y) - 1 - last
    first = max(first, 2)
    if stop <= first:
        return out
    past = y[: stop - 1]
    # Minimum and ptp of v for t = 1 .. stop - 1: first windows that start at frame 0 and grow, then whole ones.
    low = np.minimum.accumulate(past)
    ptp = np.maximum.accumulate(past) - low
    if len(past) >= window:
        low[window - 1 :], ptp[window - 1 :] = _ranges(past, window)
    low, ptp = low[first - 1 :], ptp[first - 1 :]
    # Both exponents are small (|5300 * 0.005|), so the plain sigmoid does not overflow for real motion;
    # the clip keeps it silent for any input.
    moved = np.clip(-5300 * (ptp - 0.0006), -700, 700)
    rested = np.clip(11000 * (past[first - 1 :] - low - 0.2 * ptp), -700, 700)
    out[first:stop] = (1 / (1 + np.exp(moved)) + 1 / (1 + np.exp(rested))) / 2
    return out


def per_split(
    values: npt.NDArray[Any],
    splits: Mapping[str, tuple[int, int]],
    function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
) -> npt.NDArray[Any]:
    """Apply ``function`` to each split's part of ``values`` (T,), so that no window crosses a split.

    Frames outside every split get 0.
    """
    out: npt.NDArray[Any] | None = None
    for start, stop in splits.values():
        part = function(values[start:stop])
        if out is None:
            out = np.zeros(len(values), dtype=part.dtype)
        out[start:stop] = part
    return function(values) if out is None else out
