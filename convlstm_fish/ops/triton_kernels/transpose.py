# mypy: allow-untyped-defs
"""Frames of few channels laid out channels last, and cast, in one pass at the speed of memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convlstm_fish.ops.triton_kernels.launch import cdiv, launch

_MOST_CHANNELS = 8


@triton.jit(do_not_specialize=["pixels", "total"])
def transpose(x_ptr, out_ptr, pixels, total, C: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr):
    """out[frame, pixel, channel] = x[frame, channel, pixel]; pixels of a frame, and in all."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ch = tl.arange(0, CP)[None, :]
    source = x_ptr + ((at // pixels) * (C * pixels) + at % pixels)[:, None] + ch * pixels
    exists = (at < total)[:, None] & (ch < C)
    value = tl.load(source, mask=exists, other=0.0)
    tl.store(out_ptr + at[:, None] * C + ch, value.to(out_ptr.dtype.element_ty), mask=exists)


@torch.library.custom_op("convlstm_fish::channels_last", mutates_args=())
def few_channels_last(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """(F, C, H, W) contiguous as (F, H, W, C) contiguous, cast; for what :func:`suits`. It has no derivative."""
    count, channels, height, width = frames.shape
    out = frames.new_empty(count, height, width, channels, dtype=dtype)
    total = count * height * width
    constants = {"C": channels, "CP": triton.next_power_of_2(channels), "BLOCK": 1024}
    launch(transpose, (cdiv(total, 1024),), (frames, out, height * width, total), constants, num_warps=4)
    return out


@few_channels_last.register_fake
def _(frames: Tensor, dtype: torch.dtype) -> Tensor:
    count, channels, height, width = frames.shape
    return frames.new_empty(count, height, width, channels, dtype=dtype)


def suits(frames: Tensor) -> bool:
    """Whether :func:`few_channels_last` takes these frames, and they are not laid out so already."""
    few = 1 < frames.shape[1] <= _MOST_CHANNELS
    return few and not frames.requires_grad and frames.is_contiguous() and frames.is_floating_point()


def channels_first(image: Tensor) -> Tensor:
    """A view (N, C, H, W) of (N, H, W, C), as torch's convolutions and callers take it."""
    return image.permute(0, 3, 1, 2)


def channels_last(image: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W) as a contiguous (N, H, W, C), cast and moved in one pass; no copy where it lies so already."""
    if suits(image):
        return few_channels_last(image, dtype)
    return image.to(dtype=dtype, memory_format=torch.channels_last).permute(0, 2, 3, 1).contiguous()
