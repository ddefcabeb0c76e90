"""Moving MNIST as a DataModule: training sequences made on the device, fixed validation and test sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convlstm_fish.data.modules.base import Batch, Pixels, ResumableDataModule, Samples
from convlstm_fish.data.modules.digit_stream import DEFAULT_PATH, DigitStream
from convlstm_fish.data.moving_mnist import moving_digits
from convlstm_fish.errors import UserError, require

STANDARD_FILE = "mnist_test_seq.npy"


class StoredSequences:
    """The standard test set, ``mnist_test_seq.npy``: uint8 (20, 10000, 64, 64), read as it is needed.

    Raises:
        UserError: for a file that is absent or something else.
    """

    def __init__(self, path: Path, size: int | None) -> None:
        try:
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); torchvision.datasets.MovingMNIST(root, download=True) fetches it, "
                "or set data.test_set to generated"
            ) from error
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[0] != 20 or frames.shape[2:] != (64, 64):
            raise UserError(f"{path}: holds {frames.dtype} {frames.shape}, expected uint8 (20, sequences, 64, 64)")
        size = frames.shape[1] if size is None else size
        if frames.shape[1] < size:
            raise UserError(f"test_size: {path} has {frames.shape[1]} sequences, not {size}")
        self.path, self.size, self.frames = path, size, frames

    def __len__(self) -> int:
        return self.size

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredSequences, (self.path, self.size)  # a worker maps the file again instead of copying it

    @property
    def pixels(self) -> Pixels:
        """``frames`` uint8 (20, 64, 64)."""
        return Pixels("frames", (20, 64, 64), self.read)

    def read(self, index: int, frames: npt.NDArray[np.uint8]) -> None:
        """Read sequence ``index`` to ``frames`` (20, 64, 64)."""
        frames[...] = self.frames[:, index]

    def sample(self, index: int, epoch: int) -> Batch:
        """``index``."""
        return {"index": torch.tensor(index)}


class MovingMNIST(DigitStream):
    """Two digits that bounce about in a square: given some frames, predict the next ones.

    A training sequence is a function of (seed, its number in the run), made on the device where the network is, so the
    loader moves numbers only; an epoch never repeats. Validation and test sequences are functions of
    (evaluation_seed, index), the same in every run. The three use different digits: MNIST's training images to train,
    the first half of its test images to validate, the second to test.

    Args:
        path: folder with MNIST's IDX files (gzipped or not, or torchvision's layout). None looks into ``data/mnist``
            and, where that is absent, takes digits drawn from a font, and says so.
        batch_size: sequences per batch and process.
        context_frames: frames given.
        future_frames: frames to predict.
        train_size: sequences in an epoch; None for 10,000, or 480 with drawn digits, so that a trial is soon over.
        validation_size, test_size: sequences in the fixed sets; None for 1,000 and 10,000, or 48 and 240.
        test_set: "generated", or "standard" for the published 10,000 sequences (``mnist_test_seq.npy`` in ``path``
            or in ``path/MovingMNIST``, where torchvision puts it), of which the first test_size are used (None for
            all). Testing on them needs no digits.
        image_size: side of a frame.
        digits_per_clip: digits in a sequence.
        step_length: way of a digit per frame as a fraction of its free way.
        num_workers: processes that load; numbers need none.
        seed: of the training stream and its order.
        evaluation_seed: of the validation and test sets.

    Batches: ``video`` (N, context_frames, 1, H, W) and ``future`` (N, future_frames, 1, H, W) in [0, 1], ``index``.

    Raises:
        UserError: for options and files that make no sense.
    """

    def __init__(
        self,
        path: str | None = None,
        batch_size: int = 16,
        *,
        context_frames: int = 10,
        future_frames: int = 10,
        train_size: int | None = None,
        validation_size: int | None = None,
        test_size: int | None = None,
        test_set: str = "generated",
        image_size: int = 64,
        digits_per_clip: int = 2,
        step_length: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
        evaluation_seed: int = 2015,
    ) -> None:
        super().__init__(
            path,
            batch_size,
            num_workers,
            seed,
            sizes={"train": train_size, "validation": validation_size, "test": test_size},
            image_size=image_size,
            evaluation_seed=evaluation_seed,
        )
        for name, value in (
            ("context_frames", context_frames),
            ("future_frames", future_frames),
            ("digits_per_clip", digits_per_clip),
        ):
            require(name, value, value >= 1, "1 or more")
        require("test_set", test_set, test_set in ("generated", "standard"), "generated or standard")
        require("step_length", step_length, 0 <= step_length < 1, "a number from 0 up to 1")
        if test_set == "standard" and (image_size != 64 or context_frames + future_frames > 20):
            raise UserError(
                f"test_set: the standard sequences are 20 frames of 64x64, not {context_frames} + {future_frames} "
                f"frames of {image_size}x{image_size}"
            )
        self.context_frames, self.future_frames = context_frames, future_frames
        self.test_set, self.digits_per_clip, self.step_length = test_set, digits_per_clip, step_length

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(T, C, H, W) of ``video``."""
        return self.context_frames, 1, self.image_size, self.image_size

    def setup(self, stage: str) -> None:
        """Read the digits, or open the standard test set where it is all that is asked for."""
        if self._stored(stage):
            ResumableDataModule.setup(self, stage)
            self._split(stage)
        else:
            super().setup(stage)

    def _stored(self, split: str) -> bool:
        return self.test_set == "standard" and split in ("test", "predict")

    def samples(self, split: str) -> Samples:
        """See the base class."""
        if self._stored(split):
            root = Path(self.path) if self.path is not None else DEFAULT_PATH
            inside = root / "MovingMNIST" / STANDARD_FILE
            return StoredSequences(inside if inside.exists() else root / STANDARD_FILE, self._sizes["test"])
        return super().samples(split)

    def sequences(self, split: str, keys: Tensor) -> Tensor:
        """Sequences of "train", "validation" or "test" by number, made on the device of ``keys``.

        Returns:
            uint8 (N, context_frames + future_frames, H, W).
        """
        return moving_digits(
            self.placed_digits(split, keys.device)[0],
            keys,
            seed=self.stream_seed(split),
            frames=self.context_frames + self.future_frames,
            image_size=self.image_size,
            per_clip=self.digits_per_clip,
            step_length=self.step_length,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Make the sequences and cut them into what is given and what follows."""
        made = self.sequences(batch.pop("split")[0], batch.pop("key")) if "key" in batch else batch.pop("frames")
        frames = made[:, :, None]
        batch["video"] = frames[:, : self.context_frames]
        batch["future"] = frames[:, self.context_frames : self.context_frames + self.future_frames]
        return super().on_after_batch_transfer(batch, dataloader_idx)
