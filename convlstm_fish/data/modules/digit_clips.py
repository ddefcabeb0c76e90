"""Clips of different length to classify: which digit is it that moves?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convlstm_fish.data.modules.base import Batch
from convlstm_fish.data.modules.digit_stream import DigitStream
from convlstm_fish.data.moving_mnist import render, standard_motion, uniform_draws
from convlstm_fish.errors import UserError, require

_LENGTH_STREAM = 0x1E46  # lengths are drawn from a stream of their own


class DigitClips(DigitStream):
    """Clips with one moving digit among digits that stand still; the class is the moving one, 0 to 9.

    One frame does not tell which digit moves, and clips have different lengths, so that a network has to look at time
    and to stop where a clip does. Like MovingMNIST's, clips are functions of (seed, number), made on the device.

    Args:
        path: folder with MNIST's IDX files, labels among them. None looks into ``data/mnist`` and, where that is
            absent, takes digits drawn from a font, and says so.
        batch_size: clips per batch and process.
        frames: the shortest and the longest clip.
        still: digits that stand still.
        digit_size: side of a digit; the digits are made smaller to it by averaging.
        image_size: side of a frame.
        step_length: way of the moving digit per frame as a fraction of its free way.
        train_size, validation_size, test_size: clips in an epoch, and in the fixed sets.
        num_workers: processes that load; numbers need none.
        seed: of the training stream and its order.
        evaluation_seed: of the validation and test sets.

    Batches: ``video`` (N, longest allowed, 1, H, W) in [0, 1], zero past a clip's end, ``lengths`` (N,), ``label``
        (N,) and ``index``.

    Raises:
        UserError: for options and files that make no sense, and for digits without labels.
    """

    takes_labels = True

    def __init__(
        self,
        path: str | None = None,
        batch_size: int = 16,
        *,
        frames: Sequence[int] = (4, 8),
        still: int = 1,
        digit_size: int = 10,
        image_size: int = 20,
        step_length: float = 0.2,
        train_size: int = 8_000,
        validation_size: int = 500,
        test_size: int = 1_000,
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
            digit_size=digit_size,
        )
        require(
            "frames", list(frames), len(frames) == 2 and 1 <= frames[0] <= frames[1], "a shortest and a longest clip"
        )
        require("still", still, still >= 0, "0 or more")
        require("step_length", step_length, 0 < step_length < 1, "a number between 0 and 1")
        self.frames = (int(frames[0]), int(frames[1]))
        self.step_lengths = [step_length, *[0.0] * still]

    def setup(self, stage: str) -> None:
        """Read the digits; they need labels."""
        super().setup(stage)
        if self.digits.labels is None:
            raise UserError(
                f"data.path: {self.digits.source} come without labels (train-labels-idx1-ubyte, t10k-labels-idx1-ubyte)"
            )

    def clips(self, split: str, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clips by number, made on the device of ``keys``.

        Returns:
            uint8 (N, longest allowed, H, W), zero past a clip's end; lengths (N,); labels (N,).
        """
        images, labels = self.placed_digits(split, keys.device)
        if labels is None:
            raise ValueError(f"{self.digits.source} come without labels")
        seed = self.stream_seed(split)
        shortest, longest = self.frames
        motion = standard_motion(
            keys,
            seed=seed,
            n_digits=len(images),
            digit_size=images.shape[-1],
            image_size=self.image_size,
            frames=longest,
            per_clip=len(self.step_lengths),
            step_length=self.step_lengths,
        )
        draws = uniform_draws(seed ^ _LENGTH_STREAM, keys, 1)[:, 0]
        lengths = shortest + (draws * (longest - shortest + 1)).long()
        video = render(images, motion, self.image_size)
        exists = torch.arange(longest, device=keys.device) < lengths[:, None]
        return video * exists[:, :, None, None], lengths, labels[motion.which[:, 0]]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Make the clips."""
        video, batch["lengths"], batch["label"] = self.clips(batch.pop("split")[0], batch.pop("key"))
        batch["video"] = video[:, :, None]
        return super().on_after_batch_transfer(batch, dataloader_idx)
