"""The simulated tank: a recording of fish seen from above, made from a seed.

It stands in for the published 30 minute recording, which is not public: bodies, brightness and the
statistics of the motion are those of the published files, and where every fish is and who chases whom is
known. :mod:`convlstm_fish.data.swimming` holds the behaviour, :mod:`convlstm_fish.data.rendering` the camera.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from convlstm_fish.data.labels import BURST_C
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.recording_writer import RecordingWriter
from convlstm_fish.data.rendering import REFERENCE_SIZE, Bodies, Camera, background, scale_of, tank_walls
from convlstm_fish.data.swimming import Habits, School
from convlstm_fish.errors import UserError
from convlstm_fish.progress import progress

VERSION = 2
"""Rises whenever the same seed gives other bytes than before."""

_CHUNK = 32
_SMALLEST, _LARGEST = 24, 4096


def simulate(
    out: str | os.PathLike[str],
    minutes: float = 30.0,
    seed: int = 0,
    n_fish: int = 6,
    size: tuple[int, int] = (240, 320),
    fps: float = 30.0,
    *,
    habits: Habits | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Recording:
    """Simulate a tank and write it as a recording with motion, labels and splits.

    Beside the frames stand ``positions.npy``, float32 (T, n_fish, 3): x and y in pixels of the point a third
    of the length behind the snout and the heading in radians (x right, y down), and ``chases.npy``, int64
    (K, 4): first frame, end frame (exclusive), chaser, chased. The same arguments give the same bytes,
    whatever ``workers`` is.

    Args:
        out: the folder to make.
        minutes: duration.
        seed: a non-negative integer from which everything follows.
        n_fish: how many fish.
        size: height and width of the frames in pixels; the fish are scaled with it.
        fps: frames per second.
        habits: constants of the behaviour; the default matches the published motion.
        workers: drawing threads, default one per processor and at most four. Memory does not grow with
            the duration but for 12 bytes per fish and frame.
        overwrite: replace a recording that stands at ``out``.
        quiet: no progress bar.

    Returns:
        The recording, opened.

    Raises:
        UserError: for arguments that make no recording, or when ``out`` is not empty.
    """
    n_frames = _check(minutes, seed, n_fish, size, fps, workers)
    habits = habits or Habits()
    looks, scenery, chance = (np.random.default_rng(part) for part in np.random.SeedSequence(seed).spawn(3))
    bodies = Bodies.random(n_fish, looks)
    camera = Camera(size, bodies, background(size, scenery))
    school = School(n_fish, tank_walls(size), bodies.length, fps, chance, habits)
    positions = np.empty((n_frames, n_fish, 3), np.float32)
    metadata = {
        "source": "simulated tank",
        "simulator_version": VERSION,
        "seed": int(seed),
        "minutes": float(minutes),
        "n_fish": int(n_fish),
        "habits": asdict(habits),
    }
    shape = (n_frames, int(size[0]), int(size[1]))
    # Motion is a mean over pixels from one frame to the next: what is a burst shrinks with the time between
    # frames and with the share of the frame that is filled at this scale.
    filled = scale_of(size) ** 2 * REFERENCE_SIZE[0] * REFERENCE_SIZE[1] / (size[0] * size[1])
    with (
        RecordingWriter(
            out,
            shape,
            fps,
            name=f"tank-{seed}",
            metadata=metadata,
            threshold=BURST_C * filled * 30 / fps,
            overwrite=overwrite,
        ) as writer,
        progress() as bar,
    ):
        bar.live.transient = quiet
        task = bar.add_task("Simulating", total=n_frames, visible=not quiet)
        for frames in _film(school, camera, positions, workers or min(os.cpu_count() or 1, 4)):
            writer.append(frames)
            bar.advance(task, len(frames))
        chases = np.array(school.chases, np.int64).reshape(-1, 4)
        chases[:, 1] = np.minimum(chases[:, 1], n_frames)
        return writer.finish(positions=positions, chases=chases)


def _film(
    school: School, camera: Camera, positions: npt.NDArray[np.float32], workers: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """Chunks of frames in order; fills ``positions`` on the way. The fish swim here, threads draw."""
    waiting: deque[Future[npt.NDArray[np.uint8]]] = deque()
    scale = scale_of(camera.size)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(positions), _CHUNK):
            poses = school.swim(min(_CHUNK, len(positions) - start))
            chunk = positions[start : start + len(poses)]
            chunk[:, :, :2] = poses[:, :, :2] * scale
            chunk[:, :, 2] = (poses[:, :, 2] + np.pi) % (2 * np.pi) - np.pi
            waiting.append(pool.submit(camera.draw, poses))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check(minutes: Any, seed: Any, n_fish: Any, size: Any, fps: Any, workers: Any) -> int:
    """The number of frames, if the arguments make a recording."""

    def whole(value: Any) -> bool:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)

    if not (math.isfinite(fps) and 1 <= fps <= 1000):
        raise UserError(f"fps: {fps} frames per second; expected 1 to 1000")
    if not (math.isfinite(minutes) and round(minutes * 60 * fps) >= 2):
        raise UserError(
            f"minutes: {minutes} is no duration; expected a positive number of minutes, at least two frames"
        )
    if not whole(seed) or seed < 0:
        raise UserError(f"seed: {seed} is not a whole number of 0 or more")
    if not whole(n_fish) or not 1 <= n_fish <= 100:
        raise UserError(f"fish: {n_fish} fish; expected 1 to 100")
    if len(size) != 2 or not all(whole(side) and _SMALLEST <= side <= _LARGEST for side in size):
        raise UserError(f"size: {tuple(size)} is not a height and a width of {_SMALLEST} to {_LARGEST} pixels")
    if workers is not None and (not whole(workers) or workers < 1):
        raise UserError(f"workers: {workers} threads; expected 1 or more")
    return round(minutes * 60 * fps)
