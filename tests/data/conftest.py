"""A small recording that all tests of data may read, and a video of variable frame rate."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convlstm_fish.data.recording import Recording
from convlstm_fish.data.recording_writer import RecordingWriter


@pytest.fixture(scope="session")
def tank(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """400 frames of 24x32 at 10 per second: blobs that rest and dart, with chases, bright on black."""
    rng = np.random.default_rng(5)
    frames = np.zeros((400, 24, 32), np.uint8)
    place, speed = np.array([[6.0, 8], [16, 20], [10, 26]]), np.zeros((3, 2))
    for t in range(len(frames)):
        if rng.random() < 0.08:
            speed += rng.normal(0, 2, (3, 2))
        speed *= 0.7
        place = np.clip(place + speed, 2, [21, 29])
        for k, (row, column) in enumerate(place.astype(int)):
            frames[t, row - 1 : row + 2, column - 2 : column + 2] = 150 + 30 * k
    path: Path = tmp_path_factory.mktemp("recordings") / "tank"
    with RecordingWriter(path, frames.shape, 10, splits=(0.6, 0.2, 0.2), clip_frames=8, horizon=5) as writer:
        writer.append(frames)
        return writer.finish(chases=np.array([[t, t + 3, 0, 1] for t in range(20, 400, 37)]))


def five_times_slower_from_the_middle(path: Path) -> None:
    """Give the second half of an MP4's frames five times the duration, by a second entry in its stts box."""
    data = path.read_bytes()
    at = data.index(b"stts") - 4
    size, entries, count, delta = (
        *struct.unpack(">I", data[at : at + 4]),
        *struct.unpack(">III", data[at + 12 : at + 24]),
    )
    assert (size, entries) == (24, 1)
    box = struct.pack(">I4sIIIIII", 32, b"stts", 0, 2, count // 2, delta, count - count // 2, 5 * delta)
    out = bytearray(data[:at] + box + data[at + 24 :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        place = data.index(name) - 4
        out[place : place + 4] = struct.pack(">I", struct.unpack(">I", data[place : place + 4])[0] + 8)
    path.write_bytes(out.replace(b"edts", b"free"))  # the edit list would end the film at its old duration


@pytest.fixture
def variable_rate() -> Callable[[Path], None]:
    """Makes the frame rate of an MP4 file variable."""
    return five_times_slower_from_the_middle
