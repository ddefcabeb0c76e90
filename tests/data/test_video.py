"""Videos: decoded once and in order, or refused in one line, whatever the file is."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from convlstm_fish.data import video as video_module
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.video import VideoReader, grey, resize, sha256
from convlstm_fish.errors import UserError

SIZE = (48, 64)


def scene(count: int) -> np.ndarray:
    """Grey frames with a bright square that moves one pixel a frame."""
    frames = np.full((count, *SIZE), 40, np.uint8)
    for k in range(count):
        frames[k, 10:30, k % 40 : k % 40 + 20] = 200
    return frames


def video(path: Path, count: int = 60, fps: float = 25, codec: str | None = None) -> Path:
    codec = codec or {".avi": "MJPG", ".mp4": "mp4v"}[path.suffix]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, SIZE[::-1])
    assert writer.isOpened()
    for frame in scene(count):
        writer.write(np.repeat(frame[:, :, None], 3, axis=2))
    writer.release()
    return path


def read(path: Path, **options: bool) -> list[tuple[np.ndarray, float]]:
    with VideoReader(path, **options) as reader:
        return [(frame.copy(), seconds) for frame, seconds in reader]


@pytest.mark.parametrize("name", ["a.avi", "a.mp4", "ü\n 100%d.mp4"])
def test_a_video_is_read_in_order(tmp_path: Path, name: str) -> None:
    path = video(tmp_path / name)
    with VideoReader(path) as reader:
        assert (reader.claimed, reader.fps) == (60, 25)
        got = [(frame, seconds) for frame, seconds in reader]
        assert (reader.count, reader.size, reader.irregular()) == (60, SIZE, 0)
        reader.check_regular()
    np.testing.assert_allclose([seconds for _, seconds in got], np.arange(60) / 25, atol=1e-3)
    for (frame, _), expected in zip(got, scene(60)):
        assert np.abs(frame.astype(int) - expected).mean() < 4


def test_the_zebrafish_video(shared: Path) -> None:
    with VideoReader(shared / "video/eight_zebrafish_A.avi") as reader:
        frame, seconds = next(iter(reader))
        assert (reader.claimed, round(reader.fps, 2), frame.shape, seconds) == (501, 28.07, (938, 1160), 0)


def test_opening_a_video_decodes_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video(tmp_path / "fish.avi")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recording = Recording.open(path)
    assert (recording.name, recording.fps, recording.frames.shape) == ("fish", 25, (60, *SIZE))
    assert recording.metadata == {"source": "fish.avi", "sha256": sha256(str(path))}
    np.testing.assert_array_equal(recording.frames, np.stack([frame for frame, _ in read(path)]))
    (made,) = (tmp_path / "cache/convlstm_fish").glob("[!.]*")
    stamp = (made / "recording.json").stat().st_mtime_ns
    assert Recording.open(path).path == made
    assert (made / "recording.json").stat().st_mtime_ns == stamp
    assert len(Recording.open(video(path, 70))) == 70
    assert len(Recording.open(path, cache=tmp_path / "other")) == 70
    assert len(list((tmp_path / "other").glob("[!.]*"))) == 1


def test_processes_that_open_a_video_at_once_decode_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decode, decoded = video(tmp_path / "fish.avi"), video_module._decode, []

    def slowly(*args: Path) -> None:
        decoded.append(args)
        time.sleep(0.2)
        decode(*args)

    monkeypatch.setattr(video_module, "_decode", slowly)
    with ThreadPoolExecutor(5) as threads:  # a lock holds threads apart like processes
        opened = list(threads.map(lambda _: Recording.open(path, cache=tmp_path / "cache"), range(5)))
    assert len(decoded) == 1
    assert {(recording.path, len(recording)) for recording in opened} == {(opened[0].path, 60)}


def test_a_short_video_is_an_error_unless_allowed(tmp_path: Path) -> None:
    path = video(tmp_path / "a.avi")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a.avi: ends after \d+ of 60 frames; the file is damaged"):
        read(path)
    frames = read(path, allow_short=True)
    assert 10 < len(frames) < 50
    with pytest.raises(UserError, match="ends after"):
        Recording.open(path, cache=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_video_with_a_hole_is_an_error(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 3
    data[start : start + len(data) // 5] = bytes(len(data) // 5)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.mp4: ends after \d+ of 60 frames"):
        read(path)


def test_a_variable_frame_rate_is_refused(tmp_path: Path, variable_rate: Callable[[Path], None]) -> None:
    path = video(tmp_path / "a.mp4")
    variable_rate(path)
    with VideoReader(path) as reader:
        assert len(list(reader)) == 60
        with pytest.raises(UserError, match=r"variable frame rate \((29|30) of 60 intervals"):
            reader.check_regular()
    with pytest.raises(UserError, match="--resample"):
        Recording.open(path, cache=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.mp4", b"", "is not a video file"),
        ("a.mp4", b"<html></html>", r"is not a video file \(ASF, AVI"),
        ("a.mp4", b"ffconcat version 1.0\nfile other.mp4\n", "is not a video file"),
        ("a.avi", b"#EXTM3U\n#EXTINF:1\nhttp://localhost/x.ts\n", "is not a video file"),
        ("a.mp4", struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0), "cannot be opened as a video"),
        ("a.avi", b"RIFF\x00\x00\x00\x00AVI LIST", "cannot be opened as a video"),
        ("a.ts", (b"G" + bytes(187)) * 8, "cannot be opened as a video"),
        ("a.mts", (bytes(4) + b"G" + bytes(187)) * 8, "cannot be opened as a video"),
        ("a.ts", b"G" * 100, "is not a video file"),
    ],
)
def test_what_is_not_a_video_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_container_without_frames(tmp_path: Path) -> None:
    path = video(tmp_path / "a.avi", 1)
    data = path.read_bytes()
    at = data.index(b"movi") + 4
    path.write_bytes(data[:at])
    with pytest.raises(UserError, match=r"cannot be opened|holds no frame"):
        read(path, allow_short=True)


def test_places_that_are_not_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(UserError, match="is not a regular file"):
        Recording.open(tmp_path / "pipe.mp4")
    with pytest.raises(UserError, match="no such recording"):
        Recording.open("http://localhost/video.mp4")
    with pytest.raises(UserError, match="no such file"):
        VideoReader(tmp_path / "gone.mp4")
    odd = tmp_path / os.fsdecode(b"\xff.avi")
    odd.write_bytes(video(tmp_path / "a.avi", 2).read_bytes())
    with pytest.raises(UserError, match="not valid UTF-8"):
        VideoReader(odd)


def test_grey_and_resize() -> None:
    frame = scene(1)[0]
    np.testing.assert_array_equal(grey(frame), frame)
    np.testing.assert_array_equal(grey(frame[:, :, None]), frame)
    np.testing.assert_array_equal(grey(np.repeat(frame[:, :, None], 3, axis=2)), frame)
    green = np.zeros((2, 2, 3), np.uint8)
    green[..., 1] = 200
    assert grey(green)[0, 0] == round(0.587 * 200)
    assert resize(frame, SIZE) is frame
    half = frame.reshape(24, 2, 32, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(resize(frame, (24, 32)), half, atol=0.5)
    assert resize(frame, (96, 128)).shape == (96, 128)
