"""Writing a recording, frame by frame: it is complete under its name, or absent."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from convlstm_fish.data import labels as rules
from convlstm_fish.data import store
from convlstm_fish.data.clips import PUBLISHED_RATIOS
from convlstm_fish.data.recording import Recording
from convlstm_fish.errors import UserError


class RecordingWriter:
    """Write a recording frame by frame; it appears under its name complete, or not at all.

    Use as a context manager::

        with RecordingWriter("data/tank", (n_frames, 240, 320), fps=30) as writer:
            for frames in chunks:                      # uint8 (n, 240, 320)
                writer.append(frames)
            recording = writer.finish(positions=positions, chases=chases)

    Motion, labels and CRCs are computed as frames come in. Leaving the block without ``finish``, or a crash,
    leaves no recording; the space of a killed writer is freed by the next writer of the same name.

    Args:
        path: the folder to make.
        shape: (T, H, W). The disk space of T frames is reserved at once, so a full disk is told at the start.
        fps: frames per second.
        name: default the folder's name.
        splits: ranges of frames by name, or three shares for train, validation and test.
        metadata: plain values that say where the frames come from.
        threshold: the burst rule's c, kept as the default for this recording's labels.
        clip_frames, horizon: windows of the stored labels in frames; default 4 s and 1.5 s.
        overwrite: replace a recording that has this name.

    Raises:
        UserError: if ``path`` is taken or the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: tuple[int, int, int],
        fps: float,
        *,
        name: str | None = None,
        splits: Mapping[str, tuple[int, int]] | Sequence[float] = PUBLISHED_RATIOS,
        metadata: Mapping[str, Any] | None = None,
        threshold: float = rules.BURST_C,
        clip_frames: int | None = None,
        horizon: int | None = None,
        overwrite: bool = False,
    ) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise UserError(f"{path}: a recording of shape {tuple(shape)} is empty; expected (T, H, W)")
        if not (np.isfinite(fps) and fps > 0):
            raise UserError(f"{path}: fps is {fps}, expected a positive number")
        self.path = Path(os.path.abspath(path))
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.fps, self.name = float(fps), name or self.path.name
        self._splits, self._overwrite = splits, overwrite
        self.metadata = dict(metadata or {})
        self.threshold = float(threshold)
        self.clip_frames = clip_frames or rules.clip_frames_of(rules.CLIP_SECONDS, self.fps)
        self.horizon = horizon or rules.horizon_frames_of(rules.HORIZON_SECONDS, self.fps)
        self._count = 0
        self._crcs: list[int] = []
        self._motion = np.zeros(self.shape[0])
        self._last: npt.NDArray[np.uint8] | None = None
        store.check_target(self.path, overwrite)
        self._stack = contextlib.ExitStack()
        self._folder, _ = self._stack.enter_context(store.new_folder(self.path))
        try:
            self._file = self._stack.enter_context((self._folder / store.FRAMES_FILE).open("wb"))
            store.reserve(self._file, self.path, self.shape)
            self._file.write(store.npy_header(self.shape))
        except BaseException:
            self.abort()
            raise

    @property
    def motion(self) -> npt.NDArray[np.float64]:
        """Motion of the frames written so far; 0 for the last one."""
        return self._motion[: self._count]

    def append(self, frames: npt.NDArray[np.uint8]) -> None:
        """Add frames, uint8 (n, H, W) or one (H, W).

        Raises:
            ValueError: for another dtype or size, or more frames than were announced.
        """
        block = np.ascontiguousarray(frames[None] if frames.ndim == 2 else frames)
        if block.dtype != np.uint8 or block.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"frames must be uint8 (n, {self.shape[1]}, {self.shape[2]}), got {block.dtype} {block.shape}"
            )
        if self._count + len(block) > self.shape[0]:
            raise ValueError(f"more frames than the {self.shape[0]} announced")
        for start in range(0, len(block), 64):
            self._append(block[start : start + 64])

    def _append(self, block: npt.NDArray[np.uint8]) -> None:
        if self._last is not None:
            self._motion[self._count - 1] = rules.frame_differences(self._last[None], block[:1])[0]
        self._motion[self._count : self._count + len(block) - 1] = rules.frame_differences(block[:-1], block[1:])
        self._last = block[-1].copy()
        while len(block):
            inside = self._count % store.CHUNK_FRAMES
            part, block = block[: store.CHUNK_FRAMES - inside], block[store.CHUNK_FRAMES - inside :]
            if inside:
                self._crcs[-1] = zlib.crc32(part.data, self._crcs[-1])
            else:
                self._crcs.append(zlib.crc32(part.data))
            self._file.write(part.data)
            self._count += len(part)

    def finish(self, *, allow_short: bool = False, **arrays: npt.NDArray[Any]) -> Recording:
        """Publish the recording and open it.

        Args:
            allow_short: accept fewer frames than announced.
            **arrays: further arrays to keep beside the frames, by name.

        Raises:
            ValueError: when frames are missing, or for a name that is taken.
        """
        for name in arrays:
            if name in ("frames", "motion", "labels") or not store.plain_name(name):
                raise ValueError(f"{name!r} cannot be the name of an array beside the frames")
        frames = self._count
        if frames < self.shape[0] and not (allow_short and frames):
            raise ValueError(f"{frames} frames were written, {self.shape[0]} were announced")
        self.shape = (frames, *self.shape[1:])
        self._file.seek(0)
        self._file.write(store.npy_header(self.shape))
        self._file.truncate(store.HEADER_BYTES + self.shape[0] * self.shape[1] * self.shape[2])
        self._file.flush()
        os.fsync(self._file.fileno())
        motion = self._motion[:frames]
        splits = store.choose_splits(self._splits, frames)
        labels = rules.per_split(
            motion,
            splits,
            lambda y: rules.burst_labels(y, self.clip_frames - 1, self.horizon, rules.BURST_B, self.threshold),
        )
        everything = {"motion": motion, "labels": labels, **arrays}
        header = {
            "version": store.VERSION,
            "name": self.name,
            "shape": list(self.shape),
            "dtype": "uint8",
            "fps": self.fps,
            "splits": {name: list(limits) for name, limits in splits.items()},
            "labels": {
                "kind": "burst",
                "first": self.clip_frames - 1,
                "horizon": self.horizon,
                "b": rules.BURST_B,
                "c": self.threshold,
            },
            "metadata": self.metadata,
            "chunk_frames": store.CHUNK_FRAMES,
            "crc32": self._crcs,
            "arrays": {key: store.save_array(self._folder, key, value) for key, value in everything.items()},
        }
        store.save_json(self._folder, header)
        store.publish(self._folder, self.path, self._overwrite)
        self._stack.close()
        return Recording.open(self.path)

    def abort(self) -> None:
        """Remove what was written."""
        self._stack.close()

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
