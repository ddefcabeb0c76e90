"""Clips of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate


def as_lengths(lengths: Tensor | Sequence[int] | None) -> Tensor | None:
    """Lengths given as a list, as a tensor."""
    return lengths if lengths is None or isinstance(lengths, Tensor) else torch.as_tensor(lengths)


def pad_clips(clips: Sequence[Tensor], *, batch_first: bool = True) -> tuple[Tensor, Tensor]:
    """A list of clips (T_n, C, H, W) as one video, zero past their ends, and their lengths.

    Returns:
        video (N, max T_n, C, H, W), or (max T_n, N, ...) without ``batch_first``, and lengths (N,) int64: what
        :class:`ConvLSTM` takes.

    Raises:
        ValueError: no clips, an empty clip, or clips whose frames differ in shape or dtype.
    """
    if not clips:
        raise ValueError("pad_clips needs at least one clip, got none")
    kinds = {(tuple(clip.shape[1:]), clip.dtype) for clip in clips}
    if len(kinds) > 1:
        raise ValueError(f"all clips must have frames of one shape and dtype, got {sorted(map(str, kinds))}")
    if any(len(clip) == 0 for clip in clips):
        raise ValueError(f"every clip must have at least one frame, got lengths {[len(clip) for clip in clips]}")
    return pad_sequence(list(clips), batch_first=batch_first), torch.tensor([len(clip) for clip in clips])


def collate_clips(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``collate_fn`` of a DataLoader whose samples have a ``video`` (T_n, C, H, W) of any length.

    Returns:
        The batch: ``video`` and ``lengths`` from :func:`pad_clips`, every other entry collated as PyTorch does.
    """
    rest = [{key: value for key, value in sample.items() if key != "video"} for sample in samples]
    video, lengths = pad_clips([sample["video"] for sample in samples])
    return {**default_collate(rest), "video": video, "lengths": lengths}
