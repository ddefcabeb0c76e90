"""The frame store: what is written is read, and anything else is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from convlstm_fish.data import labels
from convlstm_fish.data.recording import Recording, RecordingWriter, split_ranges
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


def test_motion_and_labels_follow_the_splits(tmp_path: Path) -> None:
    frames = some_frames()
    splits = {"train": (0, 400), "test": (400, 600)}
    recording = write(tmp_path / "tank", frames, splits=splits, threshold=0.004)
    expected = np.concatenate([labels.motion(frames[:400]), labels.motion(frames[400:])])
    np.testing.assert_array_equal(recording.motion, expected)
    # 10 frames per second: clips of 40 frames and a horizon of 15.
    made = np.concatenate([labels.burst_labels(expected[a:b], 39, 15, c=0.004) for a, b in splits.values()])
    assert 0 < made.sum() < 500
    np.testing.assert_array_equal(recording.labels(), made)
    np.testing.assert_array_equal(np.load(tmp_path / "tank/labels.npy"), made)
    other = labels.burst_labels(expected[:400], 9, 5, 0.3, 0.002)
    np.testing.assert_array_equal(recording.labels(first=9, horizon=5, b=0.3, c=0.002)[:400], other)


def test_chase_and_own_labels(tmp_path: Path) -> None:
    own = np.zeros(50, np.int64)
    own[[3, 7]] = 1
    with RecordingWriter(tmp_path / "a", (50, 2, 2), 10) as writer:
        writer.append(np.zeros((50, 2, 2), np.uint8))
        recording = writer.finish(chases=np.array([[20, 25, 0, 1]]), attacks=own, wrong=own + 1)
    assert np.flatnonzero(recording.labels("chase")).tolist() == list(range(5, 20))
    assert np.flatnonzero(recording.labels("chase", horizon=2)).tolist() == [18, 19]
    assert np.flatnonzero(recording.labels("attacks")).tolist() == [3, 7]
    with pytest.raises(UserError, match="not one 0 or 1"):
        recording.labels("wrong")
    with pytest.raises(UserError, match=r"neither 'burst' nor 'chase' nor an array of .*attacks"):
        recording.labels("atacks")
    with pytest.raises(UserError, match="has no array 'gone'"):
        recording.array("gone")
    with RecordingWriter(tmp_path / "c", (50, 2, 2), 10, clip_frames=5, horizon=3) as writer:
        writer.append(np.zeros((50, 2, 2), np.uint8))
        flat = writer.finish(chases=np.array([20, 25]))
    with pytest.raises(UserError, match=r"chases.npy holds int64 \(2,\), expected whole \(K, 4\)"):
        flat.labels("chase")
    assert flat.label_rule == {"kind": "burst", "first": 4, "horizon": 3, "b": 0.1, "c": 0.001}
    bare = write(tmp_path / "b", some_frames(50))
    with pytest.raises(UserError, match=r"has no chases.npy"):
        bare.labels("chase")


def test_a_worker_opens_the_files_again_instead_of_copying_them(tmp_path: Path) -> None:
    recording = write(tmp_path / "tank", some_frames())
    pickled = pickle.dumps(recording)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert isinstance(copy.frames, np.memmap)
    np.testing.assert_array_equal(copy.frames, recording.frames)
    other = recording.with_splits((1, 0, 1))
    assert other.splits == {"train": (0, 300), "test": (300, 600)}
    assert pickle.loads(pickle.dumps(other)).splits == other.splits
    # The motion at the end of a split of the stored recording is known again when the split ends elsewhere.
    stop = recording.splits["train"][1]
    assert recording.motion[stop - 1] == 0
    np.testing.assert_array_equal(np.delete(other.motion, 299), np.delete(labels.motion(recording.frames), 299))
    assert other.motion[299] == 0


def test_cut_copies_and_gives_the_memory_back(tmp_path: Path) -> None:
    frames = some_frames(3000, 60, 80)
    recording = write(tmp_path / "tank", frames)

    def resident() -> int:
        text = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else "RssFile: 0 kB"
        return int(text.split("RssFile:")[1].split()[0])

    before = resident()
    for start in range(0, 3000, 100):
        piece = recording.cut(slice(start, start + 100), slice(1, None, 2), np.array([5, 0, 79]))
        np.testing.assert_array_equal(piece, frames[start : start + 100, 1::2][:, :, [5, 0, 79]])
    whole = recording.cut(slice(10, 12))
    np.testing.assert_array_equal(whole, frames[10:12])
    whole[:] = 0  # a copy, not the file
    assert resident() - before < 4000  # of 14,400 kB


def test_same_frames_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, some_frames(), 100 if name == "a" else 37, name="tank")
    for file in listing(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_split_ranges() -> None:
    assert split_ranges(53916) == {"train": (0, 44956), "validation": (44956, 48549), "test": (48549, 53916)}
    assert split_ranges(100, (8, 1, 1)) == {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}
    assert split_ranges(10, (0, 0, 1)) == {"test": (0, 10)}
    for bad in [(1, 2), (0, 0, 0), (1, -1, 1), (float("nan"), 1, 1)]:
        with pytest.raises(UserError, match="three shares"):
            split_ranges(100, bad)


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
    from convlstm_fish.data.recording import RecordingWriter
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


def test_a_kill_between_the_two_renames_of_a_replacement_is_repaired(tmp_path: Path) -> None:
    write(tmp_path / "tank", some_frames(50))
    os.rename(tmp_path / "tank", tmp_path / ".tank.replaced")
    assert len(Recording.open(tmp_path / "tank")) == 50


def edit(folder: Path, **changes: object) -> None:
    path = folder / "recording.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, this program reads version 1"),
        ({"version": None}, "no version"),
        ({"shape": [600, 8, 6]}, "header does not say uint8"),
        ({"shape": [601, 6, 8]}, "has 28928 bytes, 601 frames of 6x8 need 28976"),
        ({"shape": [600, 6]}, "shape is .600, 6., expected three"),
        ({"dtype": "float32"}, 'dtype is "float32"'),
        ({"fps": 0}, "fps is 0"),
        ({"fps": True, "name": 3}, "name is 3"),
        ({"splits": {"train": [0, 601]}}, "outside the 600 frames"),
        ({"splits": []}, "splits is"),
        ({"crc32": [1]}, "crc32 is"),
        ({"chunk_frames": 0}, "chunk_frames is 0"),
        ({"arrays": {"../x": {"shape": [1], "dtype": "<f8", "crc32": 1}}}, "arrays is"),
        ({"metadata": 1}, "metadata is 1"),
        ({"labels": {"first": 1.5, "horizon": 3, "b": 0.1, "c": 0.1}}, "labels is"),
        ({"labels": {"first": 1, "horizon": 3, "b": 0.1, "c": "low"}}, "labels is"),
    ],
)
def test_a_foreign_header_is_one_line(tmp_path: Path, change: dict, message: str) -> None:
    write(tmp_path / "tank", some_frames())
    edit(tmp_path / "tank", **change)
    with pytest.raises(UserError, match=message) as caught:
        Recording.open(tmp_path / "tank")
    assert "\n" not in str(caught.value)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "tank"
    recording = write(folder, some_frames())

    def flip(name: str, position: int) -> None:
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 1
        (folder / name).write_bytes(data)

    flip("frames.npy", 128 + 300 * 48)
    with pytest.raises(UserError, match=r"frames 256 to 511 fail their CRC32"):
        Recording.open(folder).verify()
    flip("frames.npy", 128 + 300 * 48)
    flip("motion.npy", 200)
    with pytest.raises(UserError, match=r"motion.npy: fails its CRC32"):
        _ = Recording.open(folder).motion
    flip("motion.npy", 200)
    recording.verify()
    np.save(folder / "positions.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"positions.npy: holds <f8 \[3\].*says <f4 \[2, 3\]"):
        recording.array("positions")
    np.save(folder / "positions.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not a readable array"):
        recording.array("positions")
    del recording
    os.truncate(folder / "frames.npy", 20000)
    with pytest.raises(UserError, match="has 20000 bytes"):
        Recording.open(folder)
    (folder / "frames.npy").unlink()
    with pytest.raises(UserError, match="no such file"):
        Recording.open(folder)
    os.mkfifo(folder / "frames.npy")
    with pytest.raises(UserError, match="not a regular file"):
        Recording.open(folder)
    (folder / "recording.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Recording.open(folder)
    with pytest.raises(UserError, match="no such recording"):
        Recording.open(tmp_path / "nowhere")


def test_writing_is_fast_enough_for_the_simulator(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (512, 240, 320), dtype=np.uint8)
    start = time.perf_counter()
    write(tmp_path / "tank", frames)
    # 30 minutes are 54,000 frames; 0.2 ms a frame measured, the limit leaves room for a busy machine.
    assert (time.perf_counter() - start) / len(frames) < 0.005
