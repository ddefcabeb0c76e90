"""A recording that is opened: motion, labels and pieces of it, and anything foreign or damaged refused in one line."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from convlstm_fish.data import labels
from convlstm_fish.data import recording as recording_module
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.recording_writer import RecordingWriter
from convlstm_fish.errors import UserError


def some_frames(count: int = 600, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width), dtype=np.uint8)


def write(path: Path, frames: np.ndarray, **options: object) -> Recording:
    with RecordingWriter(path, frames.shape, 10.0, **options) as writer:  # type: ignore[arg-type]
        writer.append(frames)
        return writer.finish(positions=np.arange(6, dtype=np.float32).reshape(2, 3))


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
        np.testing.assert_array_equal(recording.cut(slice(start, start + 100)), frames[start : start + 100])
        np.testing.assert_array_equal(
            recording.cut(slice(start, start + 9, 3), slice(None, None, -1)), frames[start : start + 9 : 3, ::-1]
        )
        placed = np.zeros((2, 100, 30, 80), np.uint8)
        recording.cut(slice(start, start + 100), slice(1, None, 2), out=placed[1])
        np.testing.assert_array_equal(placed[1], frames[start : start + 100, 1::2])
        assert not placed[0].any()
    whole = recording.cut(slice(10, 12))
    np.testing.assert_array_equal(whole, frames[10:12])
    whole[:] = 0  # a copy, not the file
    assert resident() - before < 4000  # of 14,400 kB


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs preadv")
def test_a_file_system_that_reads_by_little_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = some_frames(50, 60, 80)
    recording, preadv = write(tmp_path / "tank", frames), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, at: preadv(file, [into[0][:1000]], at))
    np.testing.assert_array_equal(recording.cut(slice(0, 50)), frames)
    np.testing.assert_array_equal(recording.cut(slice(3, 50), slice(0, 9)), frames[3:, :9])


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path: Path) -> None:
    recording = write(tmp_path / "tank", some_frames(50))
    os.truncate(tmp_path / "tank" / "frames.npy", 128 + 20 * math.prod(recording.size))
    assert len(recording.cut(slice(10, 20))) == 10
    with pytest.raises(UserError, match=r"frames\.npy: ends before frame 20; prepare it again$"):
        recording.cut(slice(10, 21))


def test_a_recording_that_is_replaced_while_it_is_open(tmp_path: Path) -> None:
    frames = some_frames(50)
    recording = write(tmp_path / "tank", frames)
    pickled = pickle.dumps(recording)
    with RecordingWriter(tmp_path / "tank", (50, *recording.size), 10, overwrite=True) as writer:
        writer.append(255 - frames)
        writer.finish()
    np.testing.assert_array_equal(recording.cut(slice(10, 20)), frames[10:20])
    with pytest.raises(UserError, match="tank: has been replaced by another recording since it was opened"):
        pickle.loads(pickled)


def test_recordings_of_a_thread_share_the_memory_that_they_are_read_to(tmp_path: Path) -> None:
    for name, height in (("a", 60), ("b", 20), ("c", 61)):
        frames = some_frames(40, height, 80)
        piece = write(tmp_path / name, frames).cut(slice(3, 40), slice(0, None, 3), slice(1, 79))
        np.testing.assert_array_equal(piece, frames[3:, ::3, 1:79])
    assert len(recording_module._of_thread.scratch) <= recording_module._READ_BYTES


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
