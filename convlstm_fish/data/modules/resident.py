"""A recording that lies in memory: on the GPU, where clips are gathered, or pinned, for the GPU to fetch them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convlstm_fish.data.modules.base import by_words
from convlstm_fish.data.modules.sending import Sender
from convlstm_fish.data.recording import Recording
from convlstm_fish.errors import UserError

# Frames that are read and sent at a time while the recording is brought to the device.
CHUNK = 1024

# The largest share of the free memory that "auto" lets a recording have; training and other programs need the rest.
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
            part = torch.from_numpy(recording.cut(slice(start, start + CHUNK), rows, columns)).to(device)
            for side, dims in enumerate(sides):
                self.frames[side * self.count + start :][: len(part)] = part.flip(dims)

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


class PinnedFrames:
    """The frames of a recording, resized as its clips are, in memory of the host from which a GPU fetches by itself.

    A clip is one piece of that memory, so nothing is left to do for a processor.

    Args:
        recording: the frames.
        rows, columns: which pixels are kept, see :meth:`convlstm_fish.data.recording.Recording.cut`.
        size: height and width of what is kept.
    """

    def __init__(
        self, recording: Recording, rows: slice | np.ndarray, columns: slice | np.ndarray, size: tuple[int, int]
    ) -> None:
        self.frames = torch.empty(len(recording), *size, dtype=torch.uint8)
        _pin(self.frames)
        weakref.finalize(self, _unpin, self.frames)
        for start in range(0, len(recording), CHUNK):
            part = slice(start, start + CHUNK)
            recording.cut(part, rows, columns, out=self.frames[part].numpy())

    @staticmethod
    def fits(frames: int, size: tuple[int, int], processes: int) -> bool:
        """Whether the host has room for so many frames, once for each of ``processes`` processes."""
        return processes * frames * size[0] * size[1] <= SHARE * available_memory()

    def clips(self, ends: Tensor, clip_frames: int, step_frames: int, sender: Sender) -> Tensor:
        """The clips whose last frames are ``ends`` (N,), on the host: uint8 (N, T, C, H, W) on the sender's GPU."""
        clips = [self.frames[end + 1 - clip_frames : end + 1] for end in ends.tolist()]
        return sender.send(clips).unflatten(1, (-1, step_frames))


def _pin(memory: Tensor) -> None:
    """Let GPUs read the memory by themselves. What torch pins when it allocates is rounded up to a power of two.

    Raises:
        UserError: where the system does not let so much be pinned.
    """
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 1)  # for the GPUs of all contexts
    if int(status) != 0:
        raise UserError(
            f"pixels_on pinned: {memory.nbytes / 1e9:.1f} GB of memory cannot be pinned ({status}); pixels_on host "
            "reads them from the file"
        )


def _unpin(memory: Tensor) -> None:
    torch.cuda.synchronize()  # what is being fetched
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def available_memory(proc: Path = Path("/proc"), control_groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of the host's memory that can still be taken, within the limits of this process; 0 if not known.

    Limits are those of its control groups, as containers, SLURM and systemd set them, of either version.
    """
    room = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
        room.append(1024 * int({words[0]: words[1] for words in lines}["MemAvailable:"]))
    for folder, (most, used, cached) in _control_groups(proc, control_groups):
        with contextlib.suppress(OSError, KeyError, ValueError):  # no file, or no limit ("max")
            limit, taken = (int((folder / name).read_text()) for name in (most, used))
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            room.append(limit - taken + int(statistics[cached]))
    return max(0, min(room, default=0))


def _control_groups(proc: Path, root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of this process's memory limits, and what its files are called: limit, usage, cache that can go."""
    version_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    version_2 = "memory.max", "memory.current", "inactive_file"
    with contextlib.suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                top, names = root, version_2
            elif "memory" in controllers.split(","):
                top, names = root / "memory", version_1
            else:
                continue
            group = Path(path.lstrip("/"))
            # In a container the path may be the host's, and its top is where the limit stands.
            for folder in (group, *group.parents):
                yield top / folder, names
