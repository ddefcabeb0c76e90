"""A recording: frames with their frame rate, motion, labels and splits, however they lie on the disk."""

from __future__ import annotations

import contextlib
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from convlstm_fish.data import labels as rules
from convlstm_fish.data import store
from convlstm_fish.data.clips import PUBLISHED_RATIOS, split_ranges
from convlstm_fish.errors import UserError


class Recording:
    """Frames of one camera with what belongs to them. Open one with :meth:`open`.

    Attributes:
        path: where it was opened.
        name: its name, for tables and reports.
        frames: uint8 (T, H, W); a read-only memory map, or a sequence that decodes what is asked for.
        fps: frames per second.
        splits: half-open ranges of frames of "train", "validation" and "test", as far as there are.
        metadata: where the frames came from and what was done to them.
    """

    def __init__(
        self,
        path: Path,
        frames: Any,
        fps: float,
        splits: Mapping[str, tuple[int, int]],
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        header: Mapping[str, Any] | None = None,
        motion: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.path, self.frames, self.fps = path, frames, float(fps)
        self.splits = dict(splits)
        self.name = name or path.name
        self.metadata = dict(metadata or {})
        self._header = dict(header or {})
        self._motion = motion

    @classmethod
    def open(cls, path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Recording:
        """Open a recording in any of the forms that this library reads.

        A folder written by :class:`RecordingWriter` (``prepare`` and ``simulate`` write these); the published
        layout (``train|validation|test/%05d.png``, ``targets/``); a folder of numbered images, decoded frame
        by frame when asked for; a video file, which is decoded once from first to last frame into a
        recording in ``cache`` (default ``$XDG_CACHE_HOME/convlstm_fish``), because seeking in a video may
        return another frame than asked for.

        Raises:
            UserError: naming what is wrong.
        """
        where = Path(path)
        store.restore(where)
        if not where.exists():
            raise UserError(
                f"{where}: no such recording; expected a folder made by prepare or simulate, the published "
                "layout, a folder of numbered images or a video file"
            )
        if where.is_dir():
            if (where / store.JSON_FILE).exists():
                return cls._open_store(where)
            from convlstm_fish.data import images

            return images.open_folder(where)
        from convlstm_fish.data import video

        return video.open_cached(where, Path(cache) if cache is not None else None)

    @classmethod
    def _open_store(cls, path: Path) -> Recording:
        header = store.load_json(path)
        return cls(
            path,
            store.map_frames(path, header),
            header["fps"],
            header["splits"],
            name=header["name"],
            metadata=header["metadata"],
            header=header,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map pickles as a full copy; a worker process opens the files again instead.
        return _open_with, (str(self.path), self.splits)

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        height, width = self.size
        return f"Recording({str(self.path)!r}, {len(self)} frames of {height}x{width} at {self.fps:g} fps)"

    def with_splits(self, splits: Mapping[str, tuple[int, int]] | Sequence[float]) -> Recording:
        """The same recording, cut otherwise.

        Args:
            splits: ranges of frames by name, or three shares for train, validation and test.
        """
        if isinstance(splits, Mapping):
            ranges = store.check_splits(splits, len(self), "splits")
        else:
            ranges = split_ranges(len(self), splits)
        return Recording(
            self.path,
            self.frames,
            self.fps,
            ranges,
            name=self.name,
            metadata=self.metadata,
            header=self._header,
            motion=self._motion,
        )

    def cut(
        self,
        frames: slice,
        rows: slice | npt.NDArray[np.int64] = slice(None),
        columns: slice | npt.NDArray[np.int64] = slice(None),
    ) -> npt.NDArray[np.uint8]:
        """Copy a piece out of the recording: uint8 (n, rows, columns).

        The pages of the file that were read stop counting as memory of this process, so that reading a
        recording of any length takes no more memory than one piece. (They stay in the system's file cache.)
        """
        block = self.frames[frames]
        piece = np.array(block[:, rows][:, :, columns], dtype=np.uint8, order="C", copy=True)
        mapped = getattr(self.frames, "base", None)
        if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise"):
            start, stop, _ = frames.indices(len(self))
            frame_bytes = self.size[0] * self.size[1]
            first = (store.HEADER_BYTES + start * frame_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            length = store.HEADER_BYTES + stop * frame_bytes - first
            mapped.madvise(mmap.MADV_DONTNEED, first, length)
        return piece

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return int(self.frames.shape[1]), int(self.frames.shape[2])

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self) / self.fps

    @cached_property
    def motion(self) -> npt.NDArray[np.float64]:
        """Motion (T,), ``y[t]`` from frame t to t + 1; 0 at the last frame and at the last one of each split."""
        if self._motion is not None:
            values = self._motion.copy()
        elif "motion" in self._header.get("arrays", {}):
            values = self.array("motion").copy()
        else:
            values = rules.motion(self.frames)
        if values.shape != (len(self),) or values.dtype != np.float64:
            raise UserError(f"{self.path}: motion holds {values.shape}, expected one number per frame")
        for _, stop in self.splits.values():
            values[stop - 1] = 0.0
        values.setflags(write=False)
        return values

    def labels(
        self,
        kind: str = "burst",
        *,
        first: int | None = None,
        horizon: int | None = None,
        b: float | None = None,
        c: float | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Labels (T,) of 0 and 1: does it start within ``horizon`` frames after frame t?

        Args:
            kind: "burst" (the published rule, from the motion), "chase" (the start of a chase, for recordings
                with ``chases.npy``), or the name of a (T,) array of 0 and 1 in the recording.
            first: first frame of a split with a burst label, the length of a clip less one.
            horizon: frames ahead.
            b, c: the burst rule's share and threshold.

        What is not given is as the recording was prepared (:attr:`label_rule`): 4 s, 1.5 s, 0.1 and 0.001 unless
        ``prepare`` was told otherwise.

        Windows never cross a split.

        Raises:
            UserError: when the recording does not hold what ``kind`` needs.
        """
        rule = self.label_rule
        first = rule["first"] if first is None else first
        horizon = rule["horizon"] if horizon is None else horizon
        if kind == "burst":
            low, threshold = rule["b"] if b is None else b, rule["c"] if c is None else c
            return rules.per_split(
                self.motion, self.splits, lambda y: rules.burst_labels(y, first, horizon, low, threshold)
            )
        if kind == "chase":
            if "chases" not in self.array_names:
                raise UserError(
                    f"{self.path}: has no chases.npy, so labels 'chase' cannot be made; a simulated recording "
                    "has one, for others use labels 'burst'"
                )
            chases = self.array("chases")
            if chases.ndim != 2 or chases.dtype.kind != "i":
                raise UserError(f"{self.path}: chases.npy holds {chases.dtype} {chases.shape}, expected whole (K, 4)")
            return rules.chase_labels(chases[:, 0], len(self), horizon)
        if kind not in self.array_names:
            raise UserError(
                f"label: {kind!r} is neither 'burst' nor 'chase' nor an array of {self.path} "
                f"({', '.join(self.array_names) or 'it has none'})"
            )
        values = self.array(kind)
        if values.shape != (len(self),) or not np.isin(values, (0, 1)).all():
            raise UserError(f"label: {kind} of {self.path} is not one 0 or 1 for each of the {len(self)} frames")
        return values.astype(np.uint8)

    @property
    def label_rule(self) -> dict[str, Any]:
        """The burst rule that this recording was prepared with: first, horizon (frames), b and c."""
        published = {
            "first": rules.clip_frames_of(rules.CLIP_SECONDS, self.fps) - 1,
            "horizon": rules.horizon_frames_of(rules.HORIZON_SECONDS, self.fps),
            "b": rules.BURST_B,
            "c": rules.BURST_C,
        }
        return {**published, **self._header.get("labels", {})}

    @property
    def knows_fps(self) -> bool:
        """Whether the frame rate is known; a folder of images does not tell one."""
        return bool(self._header)

    @property
    def array_names(self) -> tuple[str, ...]:
        """Names of the arrays beside the frames, such as "motion", "labels", "positions", "chases"."""
        return tuple(self._header.get("arrays", {}))

    def array(self, name: str) -> npt.NDArray[Any]:
        """One of the arrays beside the frames, checked against its CRC32.

        Raises:
            UserError: when there is no such array or the file has changed.
        """
        entries = self._header.get("arrays", {})
        if name not in entries:
            raise UserError(f"{self.path}: has no array {name!r}; it has {', '.join(entries) or 'none'}")
        return store.load_array(self.path, name, entries[name])

    def verify(self) -> None:
        """Read everything once and compare it with the stored CRC32s.

        A folder of images has none; its frames are decoded, which finds any that are damaged.

        Raises:
            UserError: naming the first frames that differ.
        """
        if not self._header:
            for start in range(0, len(self), 64):
                self.cut(slice(start, start + 64))
            return
        chunk = self._header["chunk_frames"]
        for number, expected in enumerate(self._header["crc32"]):
            start = number * chunk
            part = self.cut(slice(start, start + chunk))
            if zlib.crc32(part.data) != expected:
                raise UserError(
                    f"{self.path / store.FRAMES_FILE}: frames {start} to {start + len(part) - 1} fail their "
                    "CRC32, the file has changed; prepare the recording again"
                )
        for name in self.array_names:
            self.array(name)


def _open_with(path: str, splits: Mapping[str, tuple[int, int]]) -> Recording:
    return Recording.open(path).with_splits(splits)


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
        splits = (
            store.check_splits(self._splits, frames, "splits")
            if isinstance(self._splits, Mapping)
            else split_ranges(frames, self._splits)
        )
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
