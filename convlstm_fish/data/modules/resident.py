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
        flipped: keep the frames flipped in all ways as well, so that flipped clips are gathered like others.
    """

    def __init__(
        self,
        recording: Recording,
        rows: slice | np.ndarray,
        columns: slice | np.ndarray,
        size: tuple[int, int],
        device: torch.device,
        flipped: bool = False,
    ) -> None:
        self.count = len(recording)
        sides = ((), (-2,), (-1,), (-2, -1)) if flipped else ((),)
        self.frames = torch.empty(len(sides) * self.count, *size, dtype=torch.uint8, device=device)
        for start in range(0, self.count, CHUNK):
            stop = min(start + CHUNK, self.count)
            part = torch.from_numpy(recording.cut(slice(start, stop), rows, columns)).to(device)
            for side, dims in enumerate(sides):
                self.frames[side * self.count :][start:stop] = part.flip(dims)

    @staticmethod
    def fits(frames: int, size: tuple[int, int], device: torch.device) -> bool:
        """Whether so many frames leave a GPU enough memory to train; never on a CPU, which has them mapped anyway."""
        if device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(device)
        return frames * size[0] * size[1] <= SHARE * free

    @property
    def flipped(self) -> bool:
        """Whether clips can be gathered flipped."""
        return len(self.frames) > self.count

    def clips(self, ends: Tensor, clip_frames: int, step_frames: int, flips: Tensor | None = None) -> Tensor:
        """The clips whose last frames are ``ends`` (N,), on the same device: uint8 (N, T, C, H, W).

        With ``flips`` (N, 2), whether each is turned upside down, and mirrored; only where frames are ``flipped``.
        """
        window = torch.arange(1 - clip_frames, 1, device=ends.device)
        if flips is not None:
            ends = ends + self.count * (flips[:, 0] + 2 * flips[:, 1])
        pixels = by_words(self.frames)[ends[:, None] + window].view(torch.uint8)
        return pixels.unflatten(1, (-1, step_frames))
