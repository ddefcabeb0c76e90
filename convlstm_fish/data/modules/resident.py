"""A recording that lies on the GPU: clips are gathered there, and no pixel travels while training runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convlstm_fish.data.modules.base import by_words
from convlstm_fish.data.recording import Recording

# Frames that are read and sent at a time while the recording is brought to the device.
CHUNK = 1024

# The largest share of the free device memory that "auto" lets a recording have; training needs the rest.
SHARE = 0.25


class ResidentFrames:
    """The frames of a recording, resized as its clips are, as one uint8 tensor on a device.

    Args:
        recording: the frames.
        rows, columns: which pixels are kept, see :meth:`convlstm_fish.data.recording.Recording.cut`.
        size: height and width of what is kept.
        device: where the frames are to lie.
        mirrored: keep the frames' mirror images as well, for clips that are flipped as they are gathered.
    """

    def __init__(
        self,
        recording: Recording,
        rows: slice | np.ndarray,
        columns: slice | np.ndarray,
        size: tuple[int, int],
        device: torch.device,
        mirrored: bool = False,
    ) -> None:
        self.sides = torch.empty(1 + mirrored, len(recording), *size, dtype=torch.uint8, device=device)
        for start in range(0, len(recording), CHUNK):
            part = slice(start, min(start + CHUNK, len(recording)))
            self.sides[0, part] = torch.from_numpy(recording.cut(part, rows, columns)).to(device)
            if mirrored:
                self.sides[1, part] = self.sides[0, part].flip(-1)

    @staticmethod
    def fits(frames: int, size: tuple[int, int], device: torch.device, mirrored: bool = False) -> bool:
        """Whether so many frames leave a GPU enough memory to train; never on a CPU, which has them mapped anyway."""
        if device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(device)
        return (1 + mirrored) * frames * size[0] * size[1] <= SHARE * free

    def clips(self, ends: Tensor, clip_frames: int, step_frames: int, flips: Tensor | None = None) -> Tensor:
        """The clips whose last frames are ``ends`` (N,), on the same device: uint8 (N, T, C, H, W).

        With ``flips`` (N, 2), whether each is turned upside down, and mirrored: in the one pass that gathers them.
        """
        frames = ends[:, None] + torch.arange(1 - clip_frames, 1, device=ends.device)
        if flips is None:
            pixels = by_words(self.sides[0])[frames]
        else:
            count, height = self.sides.shape[1:3]
            upside_down, mirrored = flips.view(-1, 1, 2).unbind(-1)
            row = torch.arange(height, device=ends.device)
            row = torch.where(upside_down, row.flip(0), row)
            at = (frames + mirrored * count)[:, :, None] * height + row[:, None]
            pixels = by_words(self.sides).flatten(0, 2)[at]
        return pixels.view(torch.uint8).unflatten(1, (-1, step_frames))
