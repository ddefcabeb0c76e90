"""Window arithmetic, by table."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from convlstm_fish.data import clips, labels
from convlstm_fish.data.clips import split_ranges
from convlstm_fish.errors import UserError


@pytest.mark.parametrize(
    ("start", "stop", "clip", "horizon", "stride", "ends"),
    [
        (0, 10, 4, 2, 1, [3, 4, 5, 6]),
        (0, 10, 4, None, 1, [3, 4, 5, 6, 7, 8, 9]),
        (100, 110, 4, 2, 2, [103, 105]),
        (0, 7, 4, 2, 1, [3]),  # frames_needed
        (0, 6, 4, 2, 1, []),
        (0, 4, 4, None, 1, [3]),
        (0, 3, 4, None, 1, []),
        (5, 12, 1, 1, 3, [5, 8]),
    ],
)
def test_clip_ends(start: int, stop: int, clip: int, horizon: int | None, stride: int, ends: list[int]) -> None:
    made = clips.clip_ends(start, stop, clip, horizon, stride)
    assert made.tolist() == ends
    assert made.dtype == np.int64
    for end in ends:
        taken = range(stop)[clips.clip_slice(end, clip)]
        assert len(taken) == clip
        assert start <= taken[0] <= taken[-1] == end
    if horizon is not None:
        assert (stop - start >= clips.frames_needed(clip, horizon)) == bool(ends)


def test_published_counts() -> None:
    # 44,956 frames: labels from 119 to T - 2 - 45; the published scores go on to T - 2 - 10.
    assert len(clips.clip_ends(0, 44956, 120, 45)) == 44791
    assert clips.clip_ends(0, 5367, 120, 10)[[0, -1]].tolist() == [119, 5355]
    assert clips.frames_needed(120, 45) == 166


def test_split_ranges() -> None:
    assert split_ranges(53916) == {"train": (0, 44956), "validation": (44956, 48549), "test": (48549, 53916)}
    assert split_ranges(100, (8, 1, 1)) == {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}
    assert split_ranges(10, (0, 0, 1)) == {"test": (0, 10)}
    for bad in [(1, 2), (0, 0, 0), (1, -1, 1), (float("nan"), 1, 1)]:
        with pytest.raises(UserError, match="three shares"):
            split_ranges(100, bad)


@pytest.mark.parametrize(("source", "target"), [(240, 120), (320, 160), (938, 120), (7, 5), (5, 7), (3, 1), (9, 9)])
def test_nearest_selects_the_pixels_of_pil(source: int, target: int) -> None:
    line = np.arange(source, dtype=np.int32)[None]
    expected = np.asarray(Image.fromarray(line).resize((target, 1), Image.Resampling.NEAREST))[0]
    rows = clips.nearest(source, target)
    assert rows.tolist() == expected.tolist()
    chosen = clips.as_slice(rows)
    assert line[0, chosen].tolist() == expected.tolist()
    if source % target == 0:
        assert isinstance(chosen, slice)


def options(text: str) -> dict[str, list[float]]:
    return {key: [float(x) for x in values.split(",")] for key, values in re.findall(r"(\w+) ([\d.,]*\d)", text)}


@pytest.mark.parametrize("frames", [20, 60, 160, 501, 1500, 3000])
@pytest.mark.parametrize("fps", [28.07, 30.0, 5.0])
def test_every_option_that_is_named_fits(frames: int, fps: float) -> None:
    shares = (0.8338, 0.0666, 0.0995)
    clip, horizon = labels.clip_frames_of(4, fps, 4), labels.horizon_frames_of(1.5, fps)
    splits = split_ranges(frames, shares)
    told = clips.too_short("tank", splits, frames, clip, horizon, fps)
    if min(b - a for a, b in splits.values()) >= clips.frames_needed(clip, horizon):
        assert told is None
        return
    assert told is not None
    assert "\n" not in told
    fits = clips.what_fits(frames, shares, clip, horizon, fps)
    assert fits or frames < 60
    for text in fits:
        assert text in told
        chosen = options(text)
        cut = split_ranges(frames, chosen.get("splits", shares))
        length = labels.clip_frames_of(chosen.get("clip_seconds", [4.0])[0], fps, 4)
        ahead = labels.horizon_frames_of(chosen.get("horizon_seconds", [1.5])[0], fps)
        assert len(cut) == 3
        assert all(len(clips.clip_ends(a, b, length, ahead)) for a, b in cut.values()), text


def test_too_short_says_how_many_frames_are_needed() -> None:
    told = clips.too_short("zebrafish", split_ranges(501), 501, 112, 42, 28.07)
    assert told is not None
    assert told.startswith(
        "zebrafish: validation has 33 frames and test has 50 frames, but clips of 112 frames (3.99 s) with a "
        "horizon of 42 (1.5 s) need 155 frames in every split, "
    )
    needed = int(re.findall(r"(\d+) in all", told)[0])
    assert min(b - a for a, b in split_ranges(needed + 10).values()) >= 155
    assert min(b - a for a, b in split_ranges(needed - 60).values()) < 155
    assert "splits 0.34,0.33,0.33" in told
    assert "nothing fits" in str(clips.too_short("x", split_ranges(9, (1, 1, 1)), 9, 112, 42, 28.07))
