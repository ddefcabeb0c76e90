"""Writing the frame store: a recording is whole or absent, and holds what was promised."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from convlstm_fish.data.clips import split_ranges
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.recording_writer import RecordingWriter
from convlstm_fish.errors import UserError


def some_frames(count: int = 600, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width), dtype=np.uint8)


def write(path: Path, frames: np.ndarray, chunk: int = 100, **options: object) -> Recording:
    with RecordingWriter(path, frames.shape, 10.0, **options) as writer:  # type: ignore[arg-type]
        for start in range(0, len(frames), chunk):
            writer.append(frames[start : start + chunk])
        return writer.finish(positions=np.arange(6, dtype=np.float32).reshape(2, 3))


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("chunk", [1, 100, 256, 600])
def test_round_trip(tmp_path: Path, chunk: int) -> None:
    frames = some_frames()
    made = write(tmp_path / "tank", frames, chunk, metadata={"source": "x.avi"})
    again = Recording.open(str(tmp_path / "tank"))
    for recording in (made, again):
        assert isinstance(recording.frames, np.memmap)
        assert not recording.frames.flags.writeable
        np.testing.assert_array_equal(recording.frames, frames)
        assert (recording.name, recording.fps, recording.size, len(recording)) == ("tank", 10.0, (6, 8), 600)
        assert recording.seconds == 60
        assert recording.metadata == {"source": "x.avi"}
        assert recording.splits == split_ranges(600)
        np.testing.assert_array_equal(recording.array("positions"), [[0, 1, 2], [3, 4, 5]])
        recording.verify()
    assert listing(tmp_path) == ["tank"]
    # The frames are a plain npy file for anybody else.
    np.testing.assert_array_equal(np.load(tmp_path / "tank/frames.npy"), frames)


def test_same_frames_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, some_frames(), 100 if name == "a" else 37, name="tank")
    for file in listing(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": (0, 20), "test": (10, 30)}, "train and test overlap at frame 10"),
        ({"train": (0, 51)}, "outside the 50 frames"),
        ({"train": (5, 5)}, "outside the 50 frames or empty"),
        ({"holdout": (0, 5)}, "unknown split 'holdout'"),
        ({"train": (0, 5, 6)}, "expected .first frame, frame after the last."),
    ],
)
def test_wrong_splits_are_refused(tmp_path: Path, splits: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path / "tank", some_frames(50), splits=splits)
    assert listing(tmp_path) == []


def test_the_writer_refuses_what_it_was_not_promised(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "a", (5, 4, 4), 30) as writer:
        writer.append(np.zeros((4, 4), np.uint8))
        with pytest.raises(ValueError, match=r"uint8 \(n, 4, 4\), got float32"):
            writer.append(np.zeros((1, 4, 4), np.float32))
        with pytest.raises(ValueError, match=r"got uint8 \(1, 4, 5\)"):
            writer.append(np.zeros((1, 4, 5), np.uint8))
        with pytest.raises(ValueError, match="more frames than the 5"):
            writer.append(np.zeros((5, 4, 4), np.uint8))
        with pytest.raises(ValueError, match="1 frames were written, 5"):
            writer.finish()
        for name in ("frames", "labels", "../x"):
            with pytest.raises(ValueError, match="cannot be the name of an array"):
                writer.finish(allow_short=True, **{name: np.zeros(1)})
        short = writer.finish(allow_short=True)
    assert len(short) == 1
    short.verify()
    with pytest.raises(UserError, match="fps is 0"):
        RecordingWriter(tmp_path / "b", (5, 4, 4), 0)
    with pytest.raises(UserError, match="is empty"):
        RecordingWriter(tmp_path / "b", (0, 4, 4), 1)


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    write(tmp_path / "tank", some_frames(50))
    with pytest.raises(UserError, match=r"exists and is not empty.*--overwrite"):
        write(tmp_path / "tank", some_frames(60))
    assert len(write(tmp_path / "tank", some_frames(60), overwrite=True)) == 60
    assert listing(tmp_path) == ["tank"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").touch()
    with pytest.raises(UserError, match="is not a recording"):
        write(tmp_path / "photos", some_frames(50), overwrite=True)
    assert listing(tmp_path / "photos") == ["holiday.jpg"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        write(tmp_path / "file", some_frames(50))


def test_an_error_inside_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got uint8"), RecordingWriter(tmp_path / "a", (5, 4, 4), 30) as writer:
        writer.append(np.zeros((2, 9, 9), np.uint8))
    assert listing(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve disk space")
def test_a_full_disk_is_told_before_the_first_frame(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no room for 1000000\.00 GB"):
        RecordingWriter(tmp_path / "a", (10**9, 1000, 1000), 30)
    assert listing(tmp_path) == []


KILLED = """
    import sys, time
    import numpy as np
    from convlstm_fish.data.recording_writer import RecordingWriter
    with RecordingWriter(sys.argv[1], (1000, 50, 50), 30, overwrite=True) as writer:
        for n in range(1000):
            writer.append(np.full((50, 50), n % 256, np.uint8))
            if n == 500:
                print("half", flush=True)
                time.sleep(60)
"""


def test_a_killed_writer_leaves_the_old_recording_and_its_space_is_freed(tmp_path: Path) -> None:
    write(tmp_path / "tank", some_frames(50))
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "tank")], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"half\n"
    # A second writer leaves the folder of a living one alone.
    write(tmp_path / "tank", some_frames(51), overwrite=True)
    assert len(listing(tmp_path)) == 2
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert len(Recording.open(tmp_path / "tank")) == 51
    write(tmp_path / "tank", some_frames(52), overwrite=True)
    assert listing(tmp_path) == ["tank"]


def test_writing_is_fast_enough_for_the_simulator(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (512, 240, 320), dtype=np.uint8)
    start = time.perf_counter()
    write(tmp_path / "tank", frames)
    # 30 minutes are 54,000 frames; 0.2 ms a frame measured, the limit leaves room for a busy machine.
    assert (time.perf_counter() - start) / len(frames) < 0.005
