"""A convolution to a few channels as one matrix product a frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _windows(padded: Tensor, kernel: Sequence[int], of_tap: tuple[int, int]) -> Tensor:
    """(N, H, W, rows, columns, O) of images with a margin; taps lie as far apart as pixels, and so much further."""
    rows, columns = kernel
    n, height, width = padded.shape[0], padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
    of_n, of_y, of_x, of_o = padded.stride(0), padded.stride(1), padded.stride(2), padded.stride(-1)
    size = (n, height, width, rows, columns, padded.shape[-1])
    return padded.as_strided(size, (of_n, of_y, of_x, of_y + of_tap[0], of_x + of_tap[1], of_o))


class _Gather(torch.autograd.Function):
    """(N, H, W, rows, columns, O) to (N, H, W, O): the sum of a pixel's taps, each from where it looks at."""

    @staticmethod
    def forward(ctx: Any, taps: Tensor) -> Tensor:
        ctx.kernel = rows, columns = taps.shape[3:5]
        padded = F.pad(taps, (0, 0, 0, 0, 0, 0, *(columns // 2,) * 2, *(rows // 2,) * 2))
        return _windows(padded, ctx.kernel, (padded.stride(3), padded.stride(4))).sum((3, 4))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found: Tensor = _Scatter.apply(gradient, ctx.kernel)
        return found


class _Scatter(torch.autograd.Function):
    """The adjoint of _Gather: what a pixel gives to each of its taps is that of the pixel that looks at it."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, kernel: Sequence[int]) -> Tensor:
        rows, columns = kernel
        padded = F.pad(pixels, (0, 0, *(columns // 2,) * 2, *(rows // 2,) * 2))
        return _windows(padded, kernel, (0, 0)).flip(3, 4)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradient), None


def convolve_frames(frames: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.conv2d(frame, weight, bias, padding="same")`` of each frame, for a weight of few outputs and odd taps.

    A pixel's products with all taps are one row of a matrix product, which reads every frame once, as it lies, and the
    taps are added afterwards, on images of as many channels as there are taps. cuDNN's convolutions to one channel take
    several times the time, and want the frames behind one another.

    Args:
        frames: T of (N, C, H, W), best laid out channels last.
        weight: (O, C, kh, kw).
        bias: (O,) or None.

    Returns:
        (N, T, O, H, W).
    """
    outputs, channels, rows, columns = weight.shape
    matrix = weight.permute(1, 2, 3, 0).reshape(channels, -1)
    count = matrix.shape[1]
    matrix = F.pad(matrix, (0, -count % 8))  # rows of 16 bytes, without which the product is slow
    # One behind the other, as their gradients then lie, which are read one by one.
    products = torch.stack([frame.permute(0, 2, 3, 1) @ matrix for frame in frames])
    steps, n, height, width = products.shape[:4]
    taps = products.flatten(0, 1)[..., :count].unflatten(-1, (rows, columns, outputs))
    found: Tensor = _Gather.apply(taps)
    if bias is not None:
        found = found + bias
    return found.view(steps, n, height, width, outputs).permute(1, 0, 4, 2, 3)
