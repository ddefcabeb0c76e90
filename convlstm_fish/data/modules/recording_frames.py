"""Sequences of a recording's frames to predict: some frames are given, the next ones follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convlstm_fish.data import clips, store
from convlstm_fish.data.modules.augment import Augmentation
from convlstm_fish.data.modules.base import Batch, Pixels, ResumableDataModule, Samples
from convlstm_fish.data.modules.simulated import simulate_where_absent, simulator_options
from convlstm_fish.data.recording import Recording
from convlstm_fish.errors import UserError, require

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def open_recordings(path: str | Path) -> list[Recording]:
    """One recording in any form that `Recording.open` reads, or every video and recording in a folder, by name.

    Raises:
        UserError: for a path that holds neither.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / store.JSON_FILE).exists():
        inside = sorted(
            child
            for child in folder.iterdir()
            if not child.name.startswith(".")  # what a killed writer left, or a Mac
            and ((child.suffix.lower() in VIDEO_SUFFIXES and child.is_file()) or (child / store.JSON_FILE).exists())
        )
        if inside:
            return [Recording.open(child) for child in inside]
    return [Recording.open(folder)]


@dataclass(frozen=True)
class FrameSamples:
    """The sequences of one split of one or several recordings.

    Attributes:
        recordings: where the frames lie.
        starts: (K, 2) int64: number of the recording and first frame of each sequence.
        offsets: of each recording's frames in ``index``, which counts on through the recordings.
        frames: frames of a sequence.
        frame_step: every so many frames of the recording is one of the sequence.
        image_size: height and width, selected by nearest neighbour.
        augmentation: of training sequences, or None.
        seed: of the augmentation.
    """

    recordings: Sequence[Recording]
    starts: np.ndarray
    offsets: Sequence[int]
    frames: int
    frame_step: int
    image_size: tuple[int, int]
    augmentation: Augmentation | None
    seed: int

    def __len__(self) -> int:
        return len(self.starts) * (1 if self.augmentation is None else self.augmentation.copies)

    @property
    def pixels(self) -> Pixels:
        """``frames`` uint8 (T, 1, H, W)."""
        return Pixels("frames", (self.frames, 1, *self.image_size), self.read)

    def _start(self, index: int) -> tuple[int, int]:
        which, start = self.starts[index if self.augmentation is None else index // self.augmentation.copies].tolist()
        return which, start

    def read(self, index: int, frames: npt.NDArray[np.uint8]) -> None:
        """Read the frames of sequence ``index`` to ``frames`` (T, 1, H, W)."""
        which, start = self._start(index)
        recording = self.recordings[which]
        wanted = slice(start, start + (self.frames - 1) * self.frame_step + 1, self.frame_step)
        recording.cut(wanted, *clips.kept_pixels(recording.size, self.image_size), out=frames[:, 0])

    def sample(self, index: int, epoch: int) -> Batch:
        """Sequence ``index``: ``index``, its first frame, and what augmentation does to it."""
        which, start = self._start(index)
        item: Batch = {"index": torch.tensor(self.offsets[which] + start)}
        if self.augmentation is not None:
            item["augmentation"], item["noise_seed"] = self.augmentation.draw(self.seed, epoch, index)
        return item


class RecordingFrames(ResumableDataModule):
    """DataModule of frame prediction on recordings: the next frames of fish, or of any video.

    Sequences are cut from the frames when asked for and never cross a split; pixels travel as uint8.

    Args:
        path: a recording (a folder made by ``prepare`` or ``simulate``, the published layout, a folder of numbered
            images, a video), or a folder of videos and recordings, each with its own splits.
        batch_size: sequences per batch and process.
        context_frames: frames given.
        future_frames: frames to predict.
        frame_step: frames of the recording from one frame of a sequence to the next; 3 makes 10 of 30 fps.
        image_size: height and width of the frames; pixels are selected by nearest neighbour.
        stride: frames of the recording between the starts of two training sequences.
        eval_stride: the same for validation, test and prediction.
        flips: "none", "random", or "all" four flips of each training sequence.
        splits: three shares for train, validation and test, instead of each recording's own.
        num_workers: processes that load; 0 loads in the training process, by threads, which copy less.
        seed: of order and augmentation.
        simulate: options of :func:`convlstm_fish.data.simulate.simulate` (minutes, seed, ...); with them a recording
            that is absent is simulated on first use.

    Batches: ``video`` (N, context_frames, 1, H, W) and ``future`` (N, future_frames, 1, H, W) in [0, 1], ``index`` (N,)
        the first frame of each sequence; in a folder of recordings frames are counted on from one to the next.
        Prediction goes through whole recordings up to their last frame and needs no future: its batches have
        ``future_frames``, a number, instead.

    Raises:
        UserError: for an option or a recording that cannot be used.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 8,
        *,
        context_frames: int = 10,
        future_frames: int = 10,
        frame_step: int = 1,
        image_size: Sequence[int] = (120, 160),
        stride: int = 1,
        eval_stride: int = 10,
        flips: str = "none",
        splits: Sequence[float] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        simulate: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        for name, value in (
            ("context_frames", context_frames),
            ("future_frames", future_frames),
            ("frame_step", frame_step),
            ("stride", stride),
            ("eval_stride", eval_stride),
        ):
            require(name, value, value >= 1, "1 or more")
        size = tuple(int(n) for n in image_size)
        require("image_size", list(image_size), len(size) == 2 and min(size) >= 1, "height, width in pixels")
        self.path, self.splits = path, splits
        self.context_frames, self.future_frames, self.frame_step = context_frames, future_frames, frame_step
        self.image_size = (size[0], size[1])
        self.stride, self.eval_stride = stride, eval_stride
        self.augmentation = None if flips == "none" else Augmentation(flips=flips)
        self.simulate = simulator_options(simulate)
        self._recordings: list[Recording] | None = None

    def prepare_data(self) -> None:
        """Simulate the recording where it is absent and ``simulate`` is given (in one process only)."""
        simulate_where_absent(self.path, self.simulate)

    @property
    def recordings(self) -> list[Recording]:
        """The recordings, opened when first asked for."""
        if self._recordings is None:
            opened = open_recordings(self.path)
            self._recordings = opened if self.splits is None else [r.with_splits(self.splits) for r in opened]
        return self._recordings

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(T, C, H, W) of ``video``."""
        return self.context_frames, 1, *self.image_size

    def setup(self, stage: str) -> None:
        """Check that every split that the stage needs holds sequences, before any work is done."""
        super().setup(stage)
        for split in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, (stage,)):
            self._split(split)

    def samples(self, split: str) -> Samples:
        """The sequences of "train", "validation", "test" or "predict", whose last one ends with its recording."""
        training, predicting = split == "train", split == "predict"
        total = self.context_frames + (0 if predicting else self.future_frames)
        span = (total - 1) * self.frame_step + 1
        starts, longest = [], 0
        for number, recording in enumerate(self.recordings):
            first, stop = (0, len(recording)) if predicting else recording.splits.get(split, (0, 0))
            longest = max(longest, stop - first)
            own = np.arange(first, stop - span + 1, self.stride if training else self.eval_stride)
            if predicting and len(own):
                own += stop - span - own[-1]
            starts.append(np.stack([np.full_like(own, number), own], axis=1))
        if not sum(map(len, starts)):
            raise UserError(
                f"{self.path}: {split} has at most {longest} frames in one piece, a sequence of {total} frames with "
                f"frame_step {self.frame_step} needs {span}: give fewer frames, a smaller step or other splits"
            )
        return FrameSamples(
            self.recordings,
            np.concatenate(starts),
            np.cumsum([0, *(len(r) for r in self.recordings[:-1])]).tolist(),
            total,
            self.frame_step,
            self.image_size,
            self.augmentation if training else None,
            self.seed,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Cut sequences into what is given and what follows; make float of the pixels; flip training sequences."""
        frames = batch.pop("frames")
        if self.augmentation is not None and "augmentation" in batch:
            numbers, seeds = batch.pop("augmentation"), batch.pop("noise_seed")
            frames = self.augmentation.apply(frames, numbers, seeds, self._dtype())
        batch["video"], future = frames[:, : self.context_frames], frames[:, self.context_frames :]
        if future.shape[1]:
            batch["future"] = future
        else:
            batch["future_frames"] = self.future_frames
        return super().on_after_batch_transfer(batch, dataloader_idx)
