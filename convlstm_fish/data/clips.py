"""Which frames end a clip, which frames a clip holds, and what fits into a recording: arithmetic without I/O.

A clip is named by its last frame t, the present: it holds the frames ``t - clip_frames + 1 .. t``, and its label
speaks of ``t + 1 .. t + horizon``. Ranges are half-open and windows stay inside one split.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from convlstm_fish.data import labels
from convlstm_fish.errors import UserError

Indices = npt.NDArray[np.int64]
SPLITS = ("train", "validation", "test")
PUBLISHED_RATIOS = (44956 / 53916, 3593 / 53916, 5367 / 53916)


def split_ranges(frames: int, ratios: Sequence[float] = PUBLISHED_RATIOS) -> dict[str, tuple[int, int]]:
    """Cut ``frames`` frames into train, validation and test, in this order.

    Args:
        frames: length of the recording.
        ratios: shares of the three; they are scaled to sum to 1 and a share of 0 leaves that split out. The
            default are the published shares (83.38 %, 6.66 %, 9.95 %).

    Raises:
        UserError: for anything but three shares of which one is positive.
    """
    shares = np.asarray(ratios, dtype=np.float64)
    if shares.shape != (3,) or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
        raise UserError(f"splits: {list(ratios)} are not three shares for train, validation, test such as 0.8,0.1,0.1")
    edges = [0, *np.rint(np.cumsum(shares / shares.sum()) * frames).astype(int).tolist()]
    return {name: (a, b) for name, a, b in zip(SPLITS, edges, edges[1:]) if b > a}


def clip_ends(start: int, stop: int, clip_frames: int, horizon: int | None, stride: int = 1) -> Indices:
    """The frames of the range ``[start, stop)`` at which a clip can end.

    Args:
        start, stop: the range of a split.
        clip_frames: frames in a clip.
        horizon: frames that the label looks ahead. The published rule leaves out one more, because the motion of
            a split's last frame is not known: the last end is ``stop - 2 - horizon``. None for clips without
            a label, which may end at any frame that has enough frames before it.
        stride: distance of two ends.

    Returns:
        int64, in order; empty where nothing fits.
    """
    last = stop if horizon is None else stop - 1 - horizon
    return np.arange(start + clip_frames - 1, last, stride, dtype=np.int64)


def clip_slice(end: int, clip_frames: int) -> slice:
    """The frames of the clip that ends at frame ``end``."""
    return slice(end - clip_frames + 1, end + 1)


def frames_needed(clip_frames: int, horizon: int) -> int:
    """The shortest range that holds one labelled clip."""
    return clip_frames + horizon + 1


def nearest(source: int, target: int) -> Indices:
    """Rows (or columns) that a nearest-neighbour resize from ``source`` to ``target`` of them selects.

    ``floor((i + 1/2) * source / target)``, the pixel under the centre of the new one, as PIL does and as the
    published clips were made: 240 to 120 selects 1, 3, 5, ...
    """
    return (2 * np.arange(target, dtype=np.int64) + 1) * source // (2 * target)


def as_slice(indices: Indices) -> slice | Indices:
    """``indices`` as a slice where they are evenly spaced: numpy then copies without an index array."""
    steps = np.unique(np.diff(indices))
    if len(indices) == 1 or (len(steps) == 1 and steps[0] > 0):
        step = int(steps[0]) if len(steps) else 1
        return slice(int(indices[0]), int(indices[-1]) + 1, step)
    return indices


@functools.cache
def kept_pixels(source: tuple[int, int], target: tuple[int, int]) -> tuple[slice | Indices, slice | Indices]:
    """Rows and columns that remain of frames of size ``source`` when they are resized to ``target``."""
    rows, columns = (as_slice(nearest(before, after)) for before, after in zip(source, target))
    return rows, columns


def _shortest(frames: int, shares: Sequence[float]) -> int:
    return min(stop - start for start, stop in split_ranges(frames, shares).values())


def _fitting_seconds(
    shortest: int, clip_frames: int, horizon: int, fps: float, multiple: int
) -> tuple[float, float] | None:
    """Clip and horizon in seconds, in the proportion asked for, that fit into ``shortest`` frames.

    They take 7 tenths of them where that is possible, so that there are some clips and not just one.
    """
    for share in (0.7, 0.8, 0.9, 1.0):
        scale = min(1.0, share * (shortest - 1) / (clip_frames + horizon))
        clip_s = np.floor(100 * clip_frames * scale / fps) / 100
        horizon_s = np.floor(100 * horizon * scale / fps) / 100
        clip = labels.clip_frames_of(clip_s, fps, multiple)
        ahead = labels.horizon_frames_of(horizon_s, fps)
        if clip_s > 0 and horizon_s > 0 and frames_needed(clip, ahead) <= shortest:
            return float(clip_s), float(horizon_s)
    return None


def what_fits(
    frames: int, shares: Sequence[float], clip_frames: int, horizon: int, fps: float, multiple: int = 4
) -> list[str]:
    """Options under which a recording of ``frames`` frames has a labelled clip in every split.

    Args:
        frames: length of the recording.
        shares: of train, validation and test as asked for.
        clip_frames, horizon: as asked for.
        fps: frames per second.
        multiple: frames in one step of a clip.

    Returns:
        The nearest options to what was asked, each as the user would write it; empty if nothing fits.
    """
    options = []
    thirds = (0.34, 0.33, 0.33)
    wanted = frames_needed(clip_frames, horizon)
    if _shortest(frames, thirds) >= wanted:
        options.append("splits 0.34,0.33,0.33")
    for name, ratio in (("splits 0.6,0.2,0.2, ", (0.6, 0.2, 0.2)), ("", tuple(shares))):
        shortest = _shortest(frames, ratio)
        found = _fitting_seconds(shortest, clip_frames, horizon, fps, multiple)
        if found is not None and (name or shortest < wanted):
            options.append(f"{name}clip_seconds {found[0]:g}, horizon_seconds {found[1]:g}")
    return options


def too_short(
    name: str,
    splits: dict[str, tuple[int, int]],
    frames: int,
    clip_frames: int,
    horizon: int,
    fps: float,
    multiple: int = 4,
) -> str | None:
    """One line when a split holds no labelled clip, saying what is needed and what would fit; else None."""
    wanted = frames_needed(clip_frames, horizon)
    short = {split: b - a for split, (a, b) in splits.items() if b - a < wanted}
    if not short:
        return None
    shares = [(splits[s][1] - splits[s][0]) if s in splits else 0 for s in SPLITS]
    total = int(np.ceil(wanted / (min(n for n in shares if n) / sum(shares))))
    fits = what_fits(frames, shares, clip_frames, horizon, fps, multiple)
    return (
        f"{name}: {' and '.join(f'{split} has {n} frames' for split, n in short.items())}, but clips of "
        f"{clip_frames} frames ({clip_frames / fps:.3g} s) with a horizon of {horizon} ({horizon / fps:.3g} s) need "
        f"{wanted} frames in every split, about {total} in all at these shares (the recording has {frames}); "
        + (f"what fits: {'; or '.join(fits)}" if fits else "nothing fits, it needs a longer recording")
    )
