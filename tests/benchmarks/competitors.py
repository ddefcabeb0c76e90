"""The common ways to write a ConvLSTM, to be measured against: written here from their designs, nothing tuned for them.

Each is a layer: ``layer(video, last_only)`` with video (N, T, C, H, W) gives (N, T, C_h, H', W'), or the last step's
(N, C_h, H', W'). Input convolution "valid" or "same", recurrent convolution "same", gates i, f, g, o, no bias.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[[Tensor, bool], Tensor]


class ConcatCell(nn.Module):
    """One convolution of (x, h) side by side a step, as in ndrplz/ConvLSTM_pytorch and most that followed."""

    def __init__(self, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.conv = nn.Conv2d(channels + hidden, 4 * hidden, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = self.conv(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class Concat(nn.Module):
    """Python loop over :class:`ConcatCell`, eager or with the cell under torch.compile."""

    def __init__(self, channels: int, hidden: int, kernel: int, padding: str, compiled: bool = False) -> None:
        super().__init__()
        self.cell = ConcatCell(channels, hidden, kernel)
        self.cut = kernel // 2 if padding == "valid" else 0
        self.step: Any = torch.compile(self.cell) if compiled else self.cell

    def forward(self, video: Tensor, last_only: bool) -> Tensor:
        if self.cut:  # the same output size as a "valid" input convolution
            video = video[..., self.cut : -self.cut, self.cut : -self.cut]
        h = video.new_zeros(video.shape[0], self.cell.hidden, *video.shape[3:])
        c = h
        outputs = []
        for x in video.unbind(1):
            h, c = self.step(x, h, c)
            if not last_only:
                outputs.append(h)
        return h if last_only else torch.stack(outputs, dim=1)


class Hoisted(nn.Module):
    """The input convolution of all steps at once, channels last, then a loop over the recurrent one (as Keras)."""

    def __init__(self, channels: int, hidden: int, kernel: int, padding: str) -> None:
        super().__init__()
        self.hidden = hidden
        self.kernel = kernel
        self.x_conv = nn.Conv2d(channels, 4 * hidden, kernel, padding=padding, bias=False)
        self.h_conv = nn.Conv2d(hidden, 4 * hidden, kernel, padding=kernel // 2, bias=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, video: Tensor, last_only: bool) -> Tensor:
        frames = video.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        gates = self.x_conv(frames).unflatten(0, video.shape[:2])
        h = gates.new_zeros(gates.shape[0], self.hidden, *gates.shape[3:])
        h = c = h.contiguous(memory_format=torch.channels_last)
        outputs = []
        for z in gates.unbind(1):
            i, f, g, o = (z + self.h_conv(h)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            if not last_only:
                outputs.append(h)
        return h if last_only else torch.stack(outputs, dim=1)


class Peer(nn.Module):
    """A layer of another project: ``module:Class``, made as Class(channels, hidden, kernel), called on (N, T, C, H, W).

    It may return the sequence, or a tuple or list whose first entry is the sequence (itself perhaps in a list).
    """

    def __init__(self, where: str, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        module, _, name = where.partition(":")
        self.layer = getattr(importlib.import_module(module), name)(channels, hidden, kernel)

    def forward(self, video: Tensor, last_only: bool) -> Tensor:
        output = self.layer(video)
        while isinstance(output, tuple | list):
            output = output[0]
        return output[:, -1] if last_only else output


class Serenity(nn.Module):
    """visionary-serenity's network round any layer: ConvLSTM, max pool, batch norm, ConvLSTM, global max, linear."""

    def __init__(self, make: Callable[[int, int], nn.Module], channels: int, hidden: tuple[int, int]) -> None:
        super().__init__()
        self.first = make(channels, hidden[0])
        self.norm = nn.BatchNorm2d(hidden[0], eps=1e-3, momentum=0.01, affine=False)
        self.second = make(*hidden)
        self.head = nn.Linear(hidden[1], 1)

    def forward(self, video: Tensor) -> Tensor:
        frames = self.first(video, False).flatten(0, 1)
        frames = self.norm(F.max_pool2d(frames, 2))
        return self.head(self.second(frames.unflatten(0, video.shape[:2]), True).amax(dim=(2, 3)))


class Stack(nn.Module):
    """Layers one after the other and a 1x1 convolution: predicts the next frame from each one."""

    def __init__(self, make: Callable[[int, int], nn.Module], channels: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        widths = (channels, *hidden)
        self.layers = nn.ModuleList(make(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Conv2d(widths[-1], channels, 1)

    def forward(self, video: Tensor) -> Tensor:
        x = video
        for layer in self.layers:
            x = layer(x, False)
        return self.head(x.flatten(0, 1)).unflatten(0, video.shape[:2])


def makers(kernel: int, padding: str, peer: str | None) -> dict[str, Callable[[int, int], nn.Module]]:
    """How to make a layer (channels, hidden) of each kind, by name."""
    found: dict[str, Callable[[int, int], nn.Module]] = {
        "concat eager": lambda a, b: Concat(a, b, kernel, padding),
        "concat compiled": lambda a, b: Concat(a, b, kernel, padding, compiled=True),
        "hoisted": lambda a, b: Hoisted(a, b, kernel, padding),
    }
    if peer is not None:
        found[f"peer {peer}"] = lambda a, b: Peer(peer, a, b, kernel)
    return found
