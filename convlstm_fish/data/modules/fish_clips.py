"""Clips of a recording and whether something starts after them, for training, scoring and prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pytorch_lightning.utilities import rank_zero_warn

from convlstm_fish.data import clips
from convlstm_fish.data import labels as rules
from convlstm_fish.data.modules.augment import Augmentation
from convlstm_fish.data.modules.base import Batch, Pixels, ResumableDataModule
from convlstm_fish.data.modules.resident import PinnedFrames, ResidentFrames
from convlstm_fish.data.modules.simulated import simulate_where_absent, simulator_options
from convlstm_fish.data.recording import Recording
from convlstm_fish.errors import UserError, require

INPUT_FORMS = ("time_channels", "single_channel")
PIXELS_ON = ("auto", "device", "pinned", "host")
UNKNOWN = -1
_BRIGHT = 64  # the background of a film as it was taken, not of a recording


class ClipSamples:
    """The clips of one split, cut from the recording's frames when asked for.

    Args:
        recording: the frames.
        ends: (K,) last frame of each clip.
        labels: (K,) label of each clip.
        clip_frames: frames in a clip.
        step_frames: consecutive frames that become the channels of one step.
        image_size: height and width of the clips, selected by nearest neighbour.
        augmentation: for training clips, or None.
        seed: of the augmentation.
        with_pixels: False leaves out ``video``, for pixels that are in memory already.
    """

    def __init__(
        self,
        recording: Recording,
        ends: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        clip_frames: int,
        step_frames: int,
        image_size: tuple[int, int],
        augmentation: Augmentation | None = None,
        seed: int = 0,
        with_pixels: bool = True,
    ) -> None:
        self.recording, self.ends, self.labels = recording, ends, labels
        self.clip_frames, self.step_frames, self.image_size = clip_frames, step_frames, image_size
        self.augmentation, self.seed = augmentation, seed
        shape = clip_frames // step_frames, step_frames, *image_size
        self.pixels = Pixels("video", shape, self.read) if with_pixels else None
        self._rows, self._columns = clips.kept_pixels(recording.size, image_size)

    def __len__(self) -> int:
        return len(self.ends) * (1 if self.augmentation is None else self.augmentation.copies)

    def classes(self) -> npt.NDArray[np.int64]:
        """Label of every sample."""
        return np.repeat(self.labels, len(self) // len(self.ends))

    def _clip(self, index: int) -> int:
        return index if self.augmentation is None else index // self.augmentation.copies

    def read(self, index: int, video: npt.NDArray[np.uint8]) -> None:
        """Read the clip of sample ``index`` to ``video`` (T, C, H, W)."""
        frames = clips.clip_slice(int(self.ends[self._clip(index)]), self.clip_frames)
        self.recording.cut(frames, self._rows, self._columns, out=video.reshape(-1, *self.image_size))

    def sample(self, index: int, epoch: int) -> Batch:
        """Sample ``index``: its label and last frame, and what augmentation does to it in ``epoch``."""
        clip = self._clip(index)
        item: Batch = {
            "label": torch.tensor(int(self.labels[clip])),
            "index": torch.tensor(int(self.ends[clip])),
        }
        if self.augmentation is not None:
            item["augmentation"], item["noise_seed"] = self.augmentation.draw(self.seed, epoch, index)
        return item


class FishClips(ResumableDataModule):
    """DataModule of behaviour forecasting: clips of a recording, and whether a burst or chase starts after them.

    Batches are dicts: ``video`` (N, T, C, H, W) in [0, 1], ``label`` (N,) 0 or 1, ``index`` (N,) the last frame of each
    clip as a frame number of the recording, and except in training ``valid`` (N,), False for padding. No clip is
    stored: pixels are cut from the memory-mapped recording, travel as uint8 and become float on the device, training
    clips in mixed precision on a GPU its 16 bits.
    Clips never cross a split.

    Args:
        path: a recording: a folder made by ``prepare`` or ``simulate``, the published layout, a folder of
            numbered images, or a video.
        batch_size: clips per batch and process.
        clip_seconds: length of a clip; rounded to whole steps.
        clip_frames: length of a clip in frames, instead of ``clip_seconds``.
        input_form: "time_channels" puts ``frames_per_step`` consecutive frames into the channels of one step
            (published: 30 steps of 4), "single_channel" makes each frame a step of one channel.
        frames_per_step: frames in one step of "time_channels".
        image_size: height and width of the clips; pixels are selected by nearest neighbour as published.
        label: "burst" (the published rule), "chase" (a chase starts, for simulated recordings), or the name of a
            (T,) array of 0 and 1 in the recording.
        horizon_seconds: how far the label looks ahead.
        threshold: the burst rule's c, least range of motion that is a burst; default as the recording was prepared.
        splits: three shares for train, validation and test, instead of the recording's own.
        clip_stride: frames between the ends of two training clips.
        eval_stride: frames between the ends of two clips of validation, test and prediction.
        flips, brightness, contrast, noise, shift: augmentation of training clips, see :class:`Augmentation`.
        balanced: an epoch in which both labels are equally frequent.
        predict_split: "train", "validation", "test", or "all" for the whole recording as one series. Prediction
            includes the last frames of it, for which no label exists (their label is -1).
        pixels_on: "device" brings the recording to the GPU once and gathers the clips there; "pinned" brings it into
            pinned memory of the host, from which the GPU fetches clips while it computes; "host" cuts each clip from
            the recording's file and sends it. "auto" takes the first of them that has room, without a GPU "host".
        num_workers: processes that load; 0 loads in the training process, by threads, which copy less.
        seed: of order and augmentation.
        simulate: options of :func:`convlstm_fish.data.simulate.simulate` (minutes, seed, ...); with them a recording
            that is absent is simulated on first use.

    Raises:
        UserError: for an option or a recording that cannot be used.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 4,
        *,
        clip_seconds: float = rules.CLIP_SECONDS,
        clip_frames: int | None = None,
        input_form: str = "time_channels",
        frames_per_step: int = 4,
        image_size: Sequence[int] = (120, 160),
        label: str = "burst",
        horizon_seconds: float = rules.HORIZON_SECONDS,
        threshold: float | None = None,
        splits: Sequence[float] | None = None,
        clip_stride: int = 1,
        eval_stride: int = 1,
        flips: str = "all",
        brightness: float = 0.0,
        contrast: float = 0.0,
        noise: float = 0.0,
        shift: int = 0,
        balanced: bool = False,
        predict_split: str = "all",
        pixels_on: str = "auto",
        num_workers: int = 0,
        seed: int = 0,
        simulate: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        require("input_form", input_form, input_form in INPUT_FORMS, f"one of {', '.join(INPUT_FORMS)}")
        require("frames_per_step", frames_per_step, frames_per_step >= 1, "1 or more")
        self.step_frames = frames_per_step if input_form == "time_channels" else 1
        require("clip_seconds", clip_seconds, clip_seconds > 0, "a positive number of seconds")
        if clip_frames is not None:
            whole = clip_frames >= 1 and clip_frames % self.step_frames == 0
            require("clip_frames", clip_frames, whole, f"a positive multiple of frames_per_step {self.step_frames}")
        require("horizon_seconds", horizon_seconds, horizon_seconds > 0, "a positive number of seconds")
        size = tuple(int(n) for n in image_size)
        require("image_size", list(image_size), len(size) == 2 and min(size) >= 1, "height, width in pixels")
        require("threshold", threshold, threshold is None or threshold > 0, "a positive amount of motion")
        require("clip_stride", clip_stride, clip_stride >= 1, "1 or more")
        require("eval_stride", eval_stride, eval_stride >= 1, "1 or more")
        require(
            "predict_split",
            predict_split,
            predict_split in (*clips.SPLITS, "all"),
            f"one of {', '.join(clips.SPLITS)}, all",
        )
        require("pixels_on", pixels_on, pixels_on in PIXELS_ON, f"one of {', '.join(PIXELS_ON)}")
        self.path = path
        self.pixels_on = pixels_on
        self.clip_seconds, self._clip_frames = clip_seconds, clip_frames
        self.image_size = (size[0], size[1])
        self.label, self.horizon_seconds, self.threshold = label, horizon_seconds, threshold
        self.splits, self.clip_stride, self.eval_stride = splits, clip_stride, eval_stride
        self.augmentation = Augmentation(flips, brightness, contrast, noise, shift)
        self.balanced, self.predict_split = balanced, predict_split
        self.simulate = simulator_options(simulate)
        self._recording: Recording | None = None
        self._labels: npt.NDArray[np.uint8] | None = None
        self._resident: ResidentFrames | None = None
        self._pinned: PinnedFrames | None = None
        self._auto: str | None = None  # where pixels_on auto has put the pixels

    # -- the recording -------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Simulate the recording where it is absent and ``simulate`` is given (in one process only)."""
        simulate_where_absent(self.path, self.simulate)

    @property
    def recording(self) -> Recording:
        """The recording, opened when first asked for."""
        if self._recording is None:
            recording = Recording.open(self.path)
            self._recording = recording if self.splits is None else recording.with_splits(self.splits)
        return self._recording

    @property
    def fps(self) -> float:
        """Frames per second of the recording."""
        return self.recording.fps

    @property
    def clip_frames(self) -> int:
        """Frames in a clip."""
        if self._clip_frames is not None:
            return self._clip_frames
        return rules.clip_frames_of(self.clip_seconds, self.fps, self.step_frames)

    @property
    def horizon(self) -> int:
        """Frames that the label looks ahead."""
        return rules.horizon_frames_of(self.horizon_seconds, self.fps)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape (T, C, H, W) of one clip."""
        return self.clip_frames // self.step_frames, self.step_frames, *self.image_size

    @property
    def labels(self) -> npt.NDArray[np.uint8]:
        """Label of every frame of the recording (T,); 0 where there is none."""
        if self._labels is None:
            options = {"first": self.clip_frames - 1, "horizon": self.horizon, "c": self.threshold}
            self._labels = self.recording.labels(self.label, **options)  # type: ignore[arg-type]
        return self._labels

    def frames(self, split: str) -> npt.NDArray[np.int64]:
        """Last frame of every clip of "train", "validation", "test" or "predict", as numbers of the recording.

        Subtract ``recording.splits[split][0]`` for numbers within the split. A training clip is one entry here
        and four samples with ``flips="all"``.

        Raises:
            UserError: when the split is absent or too short for a clip.
        """
        recording = self.recording
        if split == "predict":
            start, stop = 0, len(recording)
            if self.predict_split != "all":
                start, stop = self._range(self.predict_split)
            ends = clips.clip_ends(start, stop, self.clip_frames, None, self.eval_stride)
            if len(ends) == 0:
                raise UserError(
                    f"{self.path}: {stop - start} frames to predict hold no clip of {self.clip_frames} frames; "
                    f"clip_seconds {(stop - start) // self.step_frames * self.step_frames / self.fps:.3g} fits"
                )
            return ends
        stride = self.clip_stride if split == "train" else self.eval_stride
        ends = clips.clip_ends(*self._range(split), self.clip_frames, self.horizon, stride)
        if len(ends) == 0:
            told = clips.too_short(
                str(self.path),
                recording.splits,
                len(recording),
                self.clip_frames,
                self.horizon,
                self.fps,
                self.step_frames,
            )
            raise UserError(told or f"{self.path}: {split} holds no clip")
        return ends

    def _range(self, split: str) -> tuple[int, int]:
        if split not in self.recording.splits:
            there = ", ".join(self.recording.splits) or "none"
            raise UserError(
                f"{self.path}: has no {split} split (it has: {there}); name shares such as splits 0.8,0.1,0.1"
            )
        return self.recording.splits[split]

    # -- samples -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that every split that the stage needs holds clips, before any work is done."""
        super().setup(stage)
        needed = {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, (stage,))
        for split in needed:
            self._split(split)
        brightness = float(np.median(self.recording.cut(slice(0, 1))))
        if brightness > _BRIGHT:
            rank_zero_warn(
                f"{self.path}: its first frame is bright (median {brightness:.0f} of 255), a recording has bright fish "
                f"on black; main.py prepare {self.path} --out FOLDER makes one"
            )

    def samples(self, split: str) -> ClipSamples:
        """The clips of "train", "validation", "test" or "predict"."""
        ends = self.frames(split)
        labels = self.labels[ends].astype(np.int64)
        if split == "predict":
            labels[~np.isin(ends, self._labelled())] = UNKNOWN
        return ClipSamples(
            self.recording,
            ends,
            labels,
            self.clip_frames,
            self.step_frames,
            self.image_size,
            self.augmentation if split == "train" else None,
            self.seed,
            with_pixels=self._pixels_lie_on() == "host",
        )

    def _labelled(self) -> npt.NDArray[np.int64]:
        ranges = self.recording.splits.values()
        parts = [clips.clip_ends(a, b, self.clip_frames, self.horizon) for a, b in ranges]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def classes(self) -> npt.NDArray[np.int64] | None:
        """Label of every training sample when the order has to be balanced."""
        if not self.balanced:
            return None
        samples = self._split("train")
        return samples.classes() if isinstance(samples, ClipSamples) else None

    # -- on the device -------------------------------------------------------------------------------------------

    def _pixels_lie_on(self) -> str:
        """One of PIXELS_ON, but for "auto"."""
        if not self._on_cuda():  # whose memory there is
            return "device" if self.pixels_on in ("device", "pinned") else "host"
        if self.pixels_on != "auto":
            return self.pixels_on
        # Asked once: memory is less later, by these frames and those of other processes, and samples go by the answer.
        if self._auto is None:
            device = torch.device("cuda") if self.trainer is None else self.trainer.strategy.root_device
            on_gpu = ResidentFrames.fits(len(self.recording), self.image_size, device)
            roomy = PinnedFrames.fits(len(self.recording), self.image_size, self._local_processes())
            self._auto = "device" if on_gpu else "pinned" if roomy else "host"
        return self._auto

    def _frames_on(self, device: torch.device) -> ResidentFrames:
        if self._resident is None or self._resident.frames.device != device:
            kept = clips.kept_pixels(self.recording.size, self.image_size)
            flipped = self.augmentation.flips != "none"
            flipped = flipped and ResidentFrames.fits(4 * len(self.recording), self.image_size, device)
            self._resident = ResidentFrames(self.recording, *kept, self.image_size, device, flipped)
        return self._resident

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Bring a batch to the device, with the clips that lie in pinned memory."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if "video" not in moved and device.type == "cuda" and self._pixels_lie_on() == "pinned":
            if self._pinned is None:
                self._pinned = PinnedFrames(
                    self.recording, *clips.kept_pixels(self.recording.size, self.image_size), self.image_size
                )
            sender = self._sender(device)
            moved["video"] = self._pinned.clips(batch["index"], self.clip_frames, self.step_frames, sender)
        return moved

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Make float of the pixels, and augment training clips, on the device where the batch is."""
        numbers, flipped = batch.pop("augmentation", None), False
        if "video" not in batch:
            resident = self._frames_on(batch["index"].device)
            flipped = resident.flipped and numbers is not None
            flips = self.augmentation.which_flips(numbers) if flipped else None
            batch["video"] = resident.clips(batch["index"], self.clip_frames, self.step_frames, flips)
        if numbers is not None:
            seeds = batch.pop("noise_seed")
            batch["video"] = self.augmentation.apply(batch["video"], numbers, seeds, self._input_dtype(), flipped)
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def _input_dtype(self) -> torch.dtype:
        """Of training clips: in mixed precision on a GPU what the network would make of them, half the bytes."""
        precision = None if self.trainer is None else self.trainer.precision
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16} if self._on_cuda() else {}
        return mixed.get(str(precision), self._dtype())
