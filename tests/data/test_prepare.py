"""prepare on small videos and folders, and on the zebrafish video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from convlstm_fish.data import clips, labels
from convlstm_fish.data.prepare import describe, inner_size, prepare
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.video import VideoReader
from convlstm_fish.errors import UserError

SMALL: dict[str, Any] = {"size": (24, 40)}


def scene(count: int, step: int = 3) -> np.ndarray:
    """Dark fish before a bright wall, (T, 48, 80)."""
    frames = np.random.default_rng(0).normal(180, 1.5, (count, 48, 80))
    frames[:, 2:5, 2:5] = 60  # a stone
    for t in range(count):
        for k in range(2):
            column = (step * t + 30 * k) % 70
            frames[t, 12 + 16 * k : 16 + 16 * k, column : column + 10] = 90
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def video(path: Path, frames: np.ndarray, fps: float = 20, codec: str = "MJPG") -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, frames.shape[:0:-1])
    for frame in frames:
        writer.write(np.repeat(frame[:, :, None], 3, axis=2))
    writer.release()
    return path


def folder(path: Path, frames: np.ndarray) -> Path:
    path.mkdir(parents=True)
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{k:05d}.png")
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return video(tmp_path_factory.mktemp("film") / "tank.avi", scene(120))


def test_a_video(film: Path, tmp_path: Path) -> None:
    made = prepare(film, tmp_path / "tank", size=(24, 40))
    assert (made.frames.shape, made.fps, made.name) == ((120, 24, 40), 20, "tank")
    assert made.metadata["polarity"] == "dark fish, inverted"
    assert made.metadata["background"] == "temporal median"
    assert (made.metadata["source"], made.metadata["frames_in_source"]) == ("tank.avi", 120)
    assert len(made.metadata["sha256"]) == 64
    assert made.array("background").shape == (24, 40)
    fish = made.frames[50][scene(120)[50, ::2, ::2] < 130]
    assert np.median(fish) > 100
    assert np.median(made.frames) == 0
    np.testing.assert_array_equal(made.motion[:99], labels.motion(made.frames)[:99])
    made.verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tank"]


def test_crop_and_shape(film: Path, tmp_path: Path) -> None:
    made = prepare(
        film,
        tmp_path / "tank",
        roi=(20, 8, 40, 40),
        size=(20, 40),
        invert="no",
        background_method="none",
        contrast="none",
    )
    assert made.metadata["roi"] == [20, 8, 40, 40]
    # A square in a wide frame: black at both sides.
    assert made.frames[:, :, :10].max() == made.frames[:, :, 30:].max() == 0
    expected = scene(120)[60, 8:48, 20:60].reshape(20, 2, 20, 2).mean(axis=(1, 3))
    assert np.abs(made.frames[60, :, 10:30] - expected).mean() < 3
    assert inner_size(938, 1160, (240, 320)) == (240, 297)
    assert inner_size(240, 320, (240, 320)) == (240, 320)
    assert inner_size(1, 1000, (10, 10)) == (1, 10)
    for roi in [(0, 0, 81, 48), (-1, 0, 5, 5), (0, 0, 0, 5), (0, 44, 5, 5)]:
        with pytest.raises(UserError, match=r"roi: .* does not lie within the frames, 80 wide and 48 high"):
            prepare(film, tmp_path / "other", roi=roi)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tank"]


def test_images_and_recordings(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", scene(60))
    made = prepare(images, tmp_path / "a", size=(48, 80))
    assert made.fps == 30
    assert any("30 per second is assumed" in line for line in describe(made))
    assert not any("assumed" in line for line in describe(prepare(images, tmp_path / "b", fps=25, **SMALL)))
    # What is bright on black already is kept byte for byte, with its splits.
    again = prepare(tmp_path / "a", tmp_path / "c", size=(48, 80))
    np.testing.assert_array_equal(again.frames, made.frames)
    assert again.splits == made.splits
    assert prepare(tmp_path / "a", tmp_path / "d", splits=(1, 1, 1)).splits["train"] == (0, 20)


def test_published_layout_keeps_frames_splits_and_labels(shared: Path, tmp_path: Path) -> None:
    for split, numbers in {"train": range(7), "test": range(7, 11)}.items():
        (tmp_path / "fish" / split).mkdir(parents=True)
        for k, number in enumerate(numbers):
            image = (shared / f"published/frames/{number:05d}.png").read_bytes()
            (tmp_path / f"fish/{split}/{k:05d}.png").write_bytes(image)
    made = prepare(tmp_path / "fish", tmp_path / "out")
    source = Recording.open(tmp_path / "fish")
    np.testing.assert_array_equal(made.frames, source.frames[0:11])
    np.testing.assert_array_equal(made.motion, source.motion)
    assert made.splits == {"train": (0, 7), "test": (7, 11)}
    assert made.metadata["background"] == "none"


def test_label_windows_follow_seconds(film: Path, tmp_path: Path) -> None:
    made = prepare(
        film, tmp_path / "a", clip_seconds=0.8, horizon_seconds=0.4, splits=(0.5, 0.25, 0.25), threshold=0.01, **SMALL
    )
    assert made.label_rule == {"kind": "burst", "first": 15, "horizon": 8, "b": 0.1, "c": 0.01}
    np.testing.assert_array_equal(
        made.array("labels")[:60], labels.burst_labels(labels.motion(made.frames[:60]), 15, 8, 0.1, 0.01)
    )
    told = describe(made)
    assert any(
        "clips of 16 frames (0.80 s), horizon 8 frames (0.40 s) (windows follow seconds: 20 frames per second, not 30)"
        in line
        for line in told
    )
    assert not any("need" in line for line in told)
    ends = [len(clips.clip_ends(*made.splits[name], 16, 8)) for name in ("train", "validation", "test")]
    assert f"clips: train {ends[0]}, validation {ends[1]}, test {ends[2]}, one for each frame" in "\n".join(told)


def test_a_short_recording_is_told_what_fits(film: Path, tmp_path: Path) -> None:
    told = describe(prepare(film, tmp_path / "a", **SMALL))
    assert "validation has 8 frames" in told[-1]
    assert "need 111 frames in every split" in told[-1]
    assert "what fits: splits 0.6,0.2,0.2, clip_seconds" in told[-1]


def test_auto_threshold(film: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"clip_seconds": 0.5, "horizon_seconds": 0.3, "splits": (0.6, 0.2, 0.2)}
    made = prepare(film, tmp_path / "a", threshold="auto", **options, **SMALL)
    assert made.label_rule["c"] == pytest.approx(labels.auto_threshold(labels.motion(made.frames), 9, 6))
    assert not any("--threshold auto would take" in line for line in describe(made))
    high = prepare(film, tmp_path / "b", threshold=0.5, **options, **SMALL)
    assert any("--threshold auto would take" in line for line in describe(high))
    assert any("all labels of validation and of test are the same" in line for line in describe(high))


def test_frame_rate(film: Path, tmp_path: Path) -> None:
    assert prepare(film, tmp_path / "a", fps=12.5, **SMALL).fps == 12.5
    half = prepare(
        film, tmp_path / "b", resample=10, size=(48, 80), invert="no", background_method="none", contrast="none"
    )
    every = prepare(film, tmp_path / "c", size=(48, 80), invert="no", background_method="none", contrast="none")
    assert (half.fps, len(half), half.metadata["resampled_from_fps"]) == (10, 60, 20)
    np.testing.assert_array_equal(half.frames, every.frames[::2])
    double = prepare(
        film, tmp_path / "d", resample=40, size=(48, 80), invert="no", background_method="none", contrast="none"
    )
    assert len(double) == 239
    assert {t: bool((double.frames[2 * t] == every.frames[t]).all()) for t in range(119)} == dict.fromkeys(
        range(119), True
    )


def test_a_frame_rate_that_is_given_is_that_of_a_video_too(film: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": (48, 80), "invert": "no", "background_method": "none", "contrast": "none"}
    slow = prepare(film, tmp_path / "a", fps=80, resample=20, **options)  # 120 frames filmed at 80, stored as 20
    assert (slow.fps, len(slow), slow.metadata["resampled_from_fps"]) == (20, 30, 80)
    every = prepare(film, tmp_path / "b", **options)
    np.testing.assert_array_equal(slow.frames, every.frames[::4])


def test_a_variable_frame_rate_is_resampled(tmp_path: Path, variable_rate: Callable[[Path], None]) -> None:
    path = video(tmp_path / "phone.mp4", scene(60), 25, "mp4v")
    variable_rate(path)
    with pytest.raises(UserError, match=r"variable frame rate .* prepare it with --resample 30"):
        prepare(path, tmp_path / "a")
    options: dict[str, Any] = {"size": (48, 80), "invert": "no", "background_method": "none", "contrast": "none"}
    with pytest.raises(UserError, match=r"variable frame rate .* prepare it with --resample 30 and without --fps"):
        prepare(path, tmp_path / "a", resample=25, fps=50)
    made = prepare(path, tmp_path / "b", resample=25, **options)
    with VideoReader(path) as reader:
        frames = [frame for frame, _ in reader]
    # 30 frames of 0.04 s, then 30 of 0.2 s.
    assert len(made) == pytest.approx(30 + 5 * 30, abs=3)
    np.testing.assert_array_equal(made.frames[20], frames[20])
    for k in (35, 50):
        np.testing.assert_array_equal(made.frames[30 + 5 * (k - 30)], frames[k])


def test_a_short_video_needs_permission(film: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.avi"
    broken.write_bytes(film.read_bytes()[: film.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=r"ends after \d+ of 120 frames"):
        prepare(broken, tmp_path / "a")
    made = prepare(broken, tmp_path / "a", allow_short=True, **SMALL)
    assert 40 < len(made) < 100
    assert f"the video ends after {len(made)} of 120 frames" in describe(made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "broken.avi"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"invert": "maybe"}, "invert: 'maybe' is not auto, yes or no"),
        ({"background_method": "mean"}, "background: 'mean' is not auto, median or none"),
        ({"contrast": "high"}, "contrast: 'high' is not auto, none or a positive factor"),
        ({"contrast": 0.0}, "contrast: 0.0 is not"),
        ({"size": (0, 5)}, r"size: \(0, 5\) is not height and width"),
        ({"fps": 0.0}, "fps: 0.0 is not a frame rate"),
        ({"resample": -1.0}, "resample: -1.0 is not a frame rate"),
        ({"threshold": "low"}, "threshold: 'low' is not auto or a positive"),
        ({"threshold": 0.0}, "threshold: 0.0 is not"),
        ({"splits": (1.0, 2.0)}, "not three shares"),
        ({"clip_seconds": 0.0}, "clip_seconds 0 and horizon_seconds 1.5 must be positive"),
    ],
)
def test_wrong_options(film: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(film, tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


def test_wrong_places(film: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        prepare(tmp_path / "gone.avi", tmp_path / "a")
    with pytest.raises(UserError, match="exists and is not empty"):
        prepare(film, film.parent)
    still = folder(tmp_path / "still", np.full((5, 20, 30), 99, np.uint8))
    with pytest.raises(UserError, match=r"still: invert auto: nothing stands out"):
        prepare(still, tmp_path / "a")


@pytest.mark.slow
def test_the_zebrafish_video_looks_like_the_published_frames(shared: Path, tmp_path: Path) -> None:
    made = prepare(shared / "video/eight_zebrafish_A.avi", tmp_path / "zebrafish")
    assert (made.frames.shape, round(made.fps, 2)) == ((501, 240, 320), 28.07)
    assert made.metadata["polarity"] == "dark fish, inverted"
    published = np.stack([np.asarray(Image.open(p)) for p in (shared / "published/frames").glob("*.png")])
    fish, theirs = made.frames[made.frames > 20], published[published > 20]
    for percent in (10, 50, 90, 99):
        assert np.percentile(fish, percent) == pytest.approx(np.percentile(theirs, percent), abs=15)
    assert np.percentile(made.frames, 99) == 0
    # Eight fish: blobs of more than 15 pixels in a frame in which none touch.
    assert (cv2.connectedComponentsWithStats((made.frames[0] > 40).astype(np.uint8))[2][1:, 4] > 15).sum() == 8
    assert "need 155 frames in every split" in describe(made)[-1]
