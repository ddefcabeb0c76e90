"""Clips of different lengths in one batch, packed so that no work is spent on padding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Schedule(NamedTuple):
    """Which clips take part in which step, the longest clip first.

    The first ``active[t]`` clips of ``order`` are at least t + 1 steps long. ``frames`` (sum of lengths,) lists what
    exists, time step by time step, as positions among the flattened (N * T) frames. Where all clips have all steps,
    ``order`` and ``frames`` are None.
    """

    active: list[int]
    order: Tensor | None
    frames: Tensor | None

    @property
    def starts(self) -> list[int]:
        """Where each step's frames begin in the packed ones, and where the last step's end."""
        starts = [0]
        for count in self.active:
            starts.append(starts[-1] + count)
        return starts


def schedule(lengths: Tensor | None, clips: int, steps: int, device: torch.device) -> Schedule:
    """The order of work for clips of ``lengths``, as torch.nn.utils.rnn.PackedSequence has it."""
    if lengths is None:
        return Schedule([clips] * steps, None, None)
    sizes = lengths.tolist()
    order = sorted(range(clips), key=lambda clip: -sizes[clip])
    active = [sum(size > t for size in sizes) for t in range(max(sizes))]
    frames = [clip * steps + t for t, count in enumerate(active) for clip in order[:count]]
    return Schedule(active, torch.tensor(order, device=device), torch.tensor(frames, device=device))


def valid_steps(lengths: Tensor, steps: int, device: torch.device) -> Tensor:
    """(N, T), true for the steps that a clip has."""
    return torch.arange(steps, device=device) < lengths.to(device)[:, None]


def blank_padding(x: Tensor, valid: Tensor) -> Tensor:
    """(N, T, ...) with zeros in the steps that are not ``valid``."""
    return torch.where(valid.view(*valid.shape, *[1] * (x.dim() - 2)), x, 0.0)


def pack(x: Tensor, plan: Schedule) -> Tensor:
    """(N, T, ...) to the frames that exist, (sum of lengths, ...), time step by time step."""
    if plan.frames is None:
        return x.transpose(0, 1).flatten(0, 1)
    return x.flatten(0, 1).index_select(0, plan.frames)


def unpack(packed: Tensor, plan: Schedule, clips: int, steps: int) -> Tensor:
    """The inverse of :func:`pack`; steps past the end of a clip are zero."""
    if plan.frames is None:
        return packed.unflatten(0, (steps, clips)).transpose(0, 1)
    flat = packed.new_zeros(clips * steps, *packed.shape[1:])
    return flat.index_copy(0, plan.frames, packed).unflatten(0, (clips, steps))


def sort(x: Tensor, plan: Schedule) -> Tensor:
    """(N, ...) with the longest clip first."""
    return x if plan.order is None else x.index_select(0, plan.order)


def unsort(x: Tensor, plan: Schedule) -> Tensor:
    """The inverse of :func:`sort`."""
    return x if plan.order is None else x.index_select(0, torch.argsort(plan.order))
