"""A recording: frames with their frame rate, motion, labels and splits, however they lie on the disk."""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convlstm_fish.data import labels as rules
from convlstm_fish.data import store
from convlstm_fish.errors import UserError

_READ_BYTES = 1 << 21  # at a time, to stay in the cache until they are cut
_of_thread = threading.local()


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
        file: int | None = None,
    ) -> None:
        self.path, self.frames, self.fps = path, frames, float(fps)
        self.splits = dict(splits)
        self.name = name or path.name
        self.metadata = dict(metadata or {})
        self._header = dict(header or {})
        self._motion = motion
        self._file = file  # descriptor of the file behind a memory map

    @classmethod
    def open(cls, path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Recording:
        """Open a recording in any of the forms that this library reads.

        A folder written by :class:`~convlstm_fish.data.recording_writer.RecordingWriter` (``prepare`` and
        ``simulate`` write these); the published layout (``train|validation|test/%05d.png``, ``targets/``); a
        folder of numbered images, decoded frame by frame when asked for; a video file, which is decoded once
        from first to last frame into a recording in ``cache`` (default ``$XDG_CACHE_HOME/convlstm_fish``),
        because seeking in a video may return another frame than asked for.

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
        frames, file = store.map_frames(path, header)
        return cls(
            path,
            frames,
            header["fps"],
            header["splits"],
            name=header["name"],
            metadata=header["metadata"],
            header=header,
            file=file,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map pickles as a full copy; a worker process opens the files again instead.
        return _open_with, (str(self.path), self.splits, self._header.get("crc32"))

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
        return Recording(
            self.path,
            self.frames,
            self.fps,
            store.choose_splits(splits, len(self)),
            name=self.name,
            metadata=self.metadata,
            header=self._header,
            motion=self._motion,
            file=self._file,
        )

    def cut(
        self,
        frames: slice,
        rows: slice | npt.NDArray[np.int64] = slice(None),
        columns: slice | npt.NDArray[np.int64] = slice(None),
        out: npt.NDArray[np.uint8] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Copy a piece out of the recording: uint8 (n, rows, columns), to ``out`` where it is given.

        A memory-mapped file is read past its map, a few frames at a time: pages that come into memory of the process
        cost more than the copy, would count as its own, and are waited for by other threads.

        Raises:
            UserError: when the file has become shorter.
        """
        height, width = self.size
        wanted = range(*frames.indices(len(self)))
        kept = _chosen(rows, height), _chosen(columns, width)
        if out is None:
            out = np.empty((len(wanted), *map(len, kept)), np.uint8)
        if self._file is None or not hasattr(os, "preadv"):
            out[...] = self.frames[frames][:, rows][:, :, columns]
            return out
        # All of each frame is read to where it belongs, other pixels are chosen on the way.
        whole = out.flags.c_contiguous and all(isinstance(p, range) and p == range(n) for p, n in zip(kept, self.size))
        together = max(1, _READ_BYTES // (height * width)) if wanted.step == 1 else 1
        for at in range(0, len(wanted), together):
            place = out[at : at + together]
            read = place if whole else _scratch((len(place), height, width))
            if not _fill(self._file, read, store.HEADER_BYTES + wanted[at] * height * width):
                last = wanted[at + len(place) - 1]
                raise UserError(f"{self.path / store.FRAMES_FILE}: ends before frame {last}; prepare it again")
            if not whole:
                place[...] = read[:, rows][:, :, columns]
        return out

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


def _open_with(path: str, splits: Mapping[str, tuple[int, int]], crc32: list[int] | None) -> Recording:
    recording = Recording.open(path)
    if recording._header.get("crc32") != crc32:
        raise UserError(f"{path}: has been replaced by another recording since it was opened; start again")
    return recording.with_splits(splits)


def _fill(file: int, frames: npt.NDArray[np.uint8], start: int) -> bool:
    """Read contiguous frames from a byte of a file on; False where it ends before."""
    rest = frames.data.cast("B")
    while len(rest):
        count = os.preadv(file, [rest], start)
        if count == 0:
            return False
        rest, start = rest[count:], start + count
    return True


def _scratch(shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Where this thread reads to, whichever the recording; new memory each time would cost as much as the reading."""
    size = math.prod(shape)
    if len(getattr(_of_thread, "scratch", ())) < size:
        _of_thread.scratch = np.empty(size, np.uint8)
    scratch: npt.NDArray[np.uint8] = _of_thread.scratch[:size]
    return scratch.reshape(shape)


def _chosen(places: slice | npt.NDArray[np.int64], size: int) -> range | npt.NDArray[np.int64]:
    return range(*places.indices(size)) if isinstance(places, slice) else places
