"""What the DataModules of moving digits share: where digits come from, and samples that are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from convlstm_fish.data.digits import DigitSet, drawn_digits, has_idx_labels, idx_digits
from convlstm_fish.data.modules.base import Batch, ResumableDataModule, Samples
from convlstm_fish.errors import require

DEFAULT_PATH = Path("data/mnist")
FULL_SIZES = {"train": 10_000, "validation": 1_000, "test": 10_000}
DRAWN_SIZES = {"train": 480, "validation": 48, "test": 240}


@dataclass(frozen=True)
class SequenceNumbers:
    """Samples that are numbers only: the sequence itself is made from its number on the device.

    Attributes:
        split: whose digits they show; training sequences differ from epoch to epoch.
        size: sequences in an epoch.
    """

    split: str
    size: int
    pixels: ClassVar[None] = None

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, epoch: int) -> Batch:
        """``index`` in the epoch, ``key`` in the stream, and ``split``."""
        return {"index": torch.tensor(index), "key": torch.tensor(epoch * self.size + index), "split": self.split}


class DigitStream(ResumableDataModule):
    """Base of DataModules that make their sequences from digits on the device.

    Args:
        path: folder with MNIST's IDX files, or None for ``data/mnist`` and, where that is absent, drawn digits.
        batch_size, num_workers, seed: as in the base class.
        sizes: sequences of "train" (in an epoch), "validation" and "test"; None for those of FULL_SIZES, or of
            DRAWN_SIZES with digits drawn from a font.
        image_size: side of a frame.
        evaluation_seed: of the validation and test sets.
        digit_size: side that digits are made smaller to by averaging, or None for their own.
    """

    takes_labels = False  # whether it has no use for digits without labels

    def __init__(
        self,
        path: str | None,
        batch_size: int,
        num_workers: int,
        seed: int,
        *,
        sizes: Mapping[str, int | None],
        image_size: int,
        evaluation_seed: int,
        digit_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        for split, size in sizes.items():
            require(f"{split}_size", size, size is None or size >= 1, "1 or more")
        require("evaluation_seed", evaluation_seed, evaluation_seed >= 0, "0 or more")
        self.path, self.image_size, self.evaluation_seed = path, image_size, evaluation_seed
        self._sizes = dict(sizes)
        self.digit_size = digit_size
        self._digits: DigitSet | None = None
        self._placed: dict[tuple[str, torch.device], tuple[Tensor, Tensor | None]] = {}

    @property
    def digits(self) -> DigitSet:
        """The digits, read on first use."""
        if self._digits is None:
            digits = self._find_digits()
            own = digits.images["train"].shape[-1]
            size = own if self.digit_size is None else self.digit_size
            require("digit_size", size, 1 <= size <= own, f"a size from 1 to the digits' own {own}")
            require("image_size", self.image_size, self.image_size >= size, f"{size} or more, the size of a digit")
            if size < own:
                digits = replace(digits, images={k: _smaller(v, size) for k, v in digits.images.items()})
            self._digits = digits
        return self._digits

    @property
    def draws_digits(self) -> bool:
        """Whether the digits are drawn from a font, there being none on disk, or none with the labels that it takes."""
        there = has_idx_labels(DEFAULT_PATH) if self.takes_labels else DEFAULT_PATH.is_dir()
        return self.path is None and not there

    @property
    def sizes(self) -> dict[str, int]:
        """Sequences of "train" (in an epoch), "validation" and "test"."""
        usual = DRAWN_SIZES if self.draws_digits else FULL_SIZES
        return {split: usual[split] if size is None else size for split, size in self._sizes.items()}

    def _find_digits(self) -> DigitSet:
        if not self.draws_digits:
            return idx_digits(DEFAULT_PATH if self.path is None else self.path)
        digits = drawn_digits()
        sizes = "/".join(str(size) for size in self.sizes.values())
        kind = "labelled digits" if self.takes_labels else "digits"
        _say(
            f"No {kind} on disk: using {digits.source}, {sizes} sequences to train, validate and test. "
            f"For MNIST itself put its IDX files into {DEFAULT_PATH} or give their folder: --data.path FOLDER"
        )
        return digits

    def setup(self, stage: str) -> None:
        """Read the digits."""
        super().setup(stage)
        _ = self.digits

    def samples(self, split: str) -> Samples:
        """See the base class; "predict" is "test"."""
        split = "test" if split == "predict" else split
        return SequenceNumbers(split, self.sizes[split])

    def stream_seed(self, split: str) -> int:
        """The seed of a split's sequences."""
        return self.seed if split == "train" else self.evaluation_seed

    def placed_digits(self, split: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """A split's digits and labels on a device, moved there once."""
        if (split, device) not in self._placed:
            labels = self.digits.labels
            self._placed[split, device] = (
                self.digits.images[split].to(device),
                None if labels is None else labels[split].to(device),
            )
        return self._placed[split, device]


def _smaller(images: Tensor, size: int) -> Tensor:
    """uint8 (K, S, S) averaged down to (K, size, size)."""
    return F.adaptive_avg_pool2d(images[:, None].float(), size)[:, 0].round().to(torch.uint8)


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
