"""Augmentation of clips on the device, the same for all frames of a clip.

What happens to a clip is drawn where the clip is read, from (seed, epoch, clip), as a few numbers that travel
with the uint8 pixels; the device applies the numbers of a whole batch at once. A resumed run therefore repeats
every pixel. ``torchvision.transforms.v2.functional`` takes one factor for a whole tensor, which would cost one
launch per clip and operation; the tests hold this file against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convlstm_fish.data.modules.base import by_words, to_unit
from convlstm_fish.data.order import augmentation_generator
from convlstm_fish.errors import require

FLIPS = ("all", "random", "none")
COLUMNS = ("flip_rows", "flip_columns", "shift_rows", "shift_columns", "brightness", "contrast")


@dataclass(frozen=True)
class Augmentation:
    """How training clips are varied.

    Args:
        flips: "all" makes every clip four samples of an epoch (as it is, upside down, mirrored, both), "random"
            draws one of the four, "none" leaves clips as they are.
        brightness: pixels are multiplied by a factor from [1 - brightness, 1 + brightness].
        contrast: differences from the clip's mean are multiplied by a factor from [1 - contrast, 1 + contrast].
        noise: standard deviation of Gaussian noise added to each pixel, as a share of full scale.
        shift: clips move by up to this many pixels up, down, left and right; black moves in.
    """

    flips: str = "all"
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    shift: int = 0

    def __post_init__(self) -> None:
        require("flips", self.flips, self.flips in FLIPS, f"one of {', '.join(FLIPS)}")
        for name in ("brightness", "contrast"):
            value = getattr(self, name)
            require(name, value, 0 <= value <= 1, "a number from 0 to 1")
        require("noise", self.noise, 0 <= self.noise <= 1, "a number from 0 to 1")
        require("shift", self.shift, self.shift >= 0, "0 or more pixels")

    @property
    def copies(self) -> int:
        """Samples of an epoch per clip."""
        return 4 if self.flips == "all" else 1

    @property
    def _draws_nothing(self) -> bool:
        """Whether all numbers are known; not to draw saves most of the time that a clip without pixels takes."""
        return self.flips != "random" and not (self.brightness or self.contrast or self.noise or self.shift)

    def draw(self, seed: int, epoch: int, index: int) -> tuple[Tensor, int]:
        """The numbers for one sample: ``COLUMNS`` as float32 (6,), and a seed for its noise."""
        if self._draws_nothing:
            flip = index % self.copies
            return torch.tensor([flip & 1, flip >> 1, 0, 0, 1, 1], dtype=torch.float32), 0
        generator = augmentation_generator(seed, epoch, index)
        # Always the same draws in the same order, so that one option does not change what another one does.
        flip, shift = int(generator.integers(4)), generator.integers(-self.shift, self.shift + 1, 2)
        factors = 1 + generator.uniform(-1, 1, 2) * (self.brightness, self.contrast)
        noise_seed = int(generator.integers(2**62))
        if self.flips != "random":
            flip = index % 4 if self.flips == "all" else 0
        numbers = np.array([flip & 1, flip >> 1, *shift, *factors], dtype=np.float32)
        return torch.from_numpy(numbers), noise_seed

    def which_flips(self, numbers: Tensor) -> Tensor:
        """Whether each clip is turned upside down, and mirrored: (N, 2), from (N, 6) numbers."""
        return numbers[:, :2] > 0  # the first two COLUMNS; a list of them would have to travel to the device

    def apply(
        self, video: Tensor, numbers: Tensor, noise_seeds: list[int], dtype: torch.dtype, flipped: bool = False
    ) -> Tensor:
        """Apply to a batch.

        Args:
            video: uint8 (N, T, C, H, W).
            numbers: (N, 6) on the same device, from :meth:`draw`.
            noise_seeds: N seeds.
            dtype: of the result.
            flipped: the clips are flipped as the numbers say already.

        Returns:
            (N, T, C, H, W) in [0, 1].
        """
        column = {name: numbers[:, k].view(-1, 1, 1, 1, 1) for k, name in enumerate(COLUMNS)}
        if self.flips != "none" and not flipped:
            words = by_words(video)  # rows keep their pixels in order
            upside_down, left_to_right = self.which_flips(numbers).view(-1, 2, 1, 1, 1, 1).unbind(1)
            words = torch.where(upside_down, words.flip(-2), words)
            mirrored = words.view(torch.uint8).flip(-1).view(words.dtype)
            video = torch.where(left_to_right, mirrored, words).view(torch.uint8)
        if self.shift:
            video = _shift(_shift(video, column["shift_rows"], -2), column["shift_columns"], -1)
        plain = not (self.brightness or self.contrast or self.noise)
        wide = dtype if plain else torch.promote_types(dtype, torch.float32)  # rounded once, at the end
        out = to_unit(video, wide)
        if self.brightness:
            out = (out * column["brightness"].to(wide)).clamp_(0, 1)
        if self.contrast:
            mean = out.mean(dim=(1, 2, 3, 4), keepdim=True)
            out = torch.lerp(mean, out, column["contrast"].to(wide)).clamp_(0, 1)
        if self.noise:
            generator = torch.Generator(out.device)
            for clip, seed in zip(out, noise_seeds):
                noise = torch.randn(clip.shape, generator=generator.manual_seed(seed), device=out.device)
                clip.add_(noise.to(wide), alpha=self.noise)
            out.clamp_(0, 1)
        return out.to(dtype)


def _shift(video: Tensor, by: Tensor, dim: int) -> Tensor:
    """Move each clip by its own number of pixels along ``dim``; what moves in is black."""
    size = video.shape[dim]
    shape = [1, 1, 1, 1, 1]
    shape[dim] = size
    source = torch.arange(size, device=video.device).view(shape) - by.to(torch.int64)
    inside = (source >= 0) & (source < size)
    moved = video.gather(dim, source.clamp(0, size - 1).expand_as(video))
    return moved.mul_(inside)
