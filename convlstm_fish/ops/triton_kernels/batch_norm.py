# mypy: allow-untyped-defs
"""Batch norm of channels-last frames of few channels: each pass reads its tensors once, at the memory's speed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convlstm_fish.ops.triton_kernels.launch import launch
from convlstm_fish.ops.triton_kernels.layer import multiprocessors

_NUMBERS = 2048  # of a program at a time


@triton.jit
def _rows(start, stop, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of ROWS pixels from ``start`` in a (pixels, C) tensor, and which of them lie before ``stop``."""
    row = start + tl.arange(0, ROWS)
    ch = tl.arange(0, CP)
    return row.to(tl.int64)[:, None] * C + ch[None, :], (row < stop)[:, None] & (ch < C)[None, :]


@triton.jit(do_not_specialize=["pixels", "portion"])
def sum_pairs(
    x_ptr, dy_ptr, out_ptr, mean_ptr, invstd_ptr, pixels, portion,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Two sums over a portion of the pixels, per channel: of d and d² with d = x minus the first pixel, which keeps
    the squares small where the mean is far from 0; or BACKWARD, of dy and dy ∘ x̂."""
    ch = tl.arange(0, CP)
    first = tl.zeros((ROWS, CP), dtype=tl.float32)
    second = tl.zeros((ROWS, CP), dtype=tl.float32)
    if BACKWARD:
        base = tl.load(mean_ptr + ch, mask=ch < C, other=0.0)[None, :]
        invstd = tl.load(invstd_ptr + ch, mask=ch < C, other=0.0)[None, :]
    else:
        base = tl.load(x_ptr + ch, mask=ch < C, other=0.0).to(tl.float32)[None, :]
    start = tl.program_id(0) * portion
    stop = tl.minimum(start + portion, pixels)
    for at in range(start, stop, ROWS):
        offsets, mask = _rows(at, stop, C, CP, ROWS)
        d = tl.where(mask, tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - base, 0.0)
        if BACKWARD:
            dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            first += dy
            second += dy * d * invstd
        else:
            first += d
            second += d * d
    out = out_ptr + tl.program_id(0) * (2 * C) + ch
    tl.store(out, tl.sum(first, axis=0), mask=ch < C)
    tl.store(out + C, tl.sum(second, axis=0), mask=ch < C)


@triton.jit(do_not_specialize=["pixels"])
def scale_and_shift(
    x_ptr, dy_ptr, out_ptr, a_ptr, b_ptr, c_ptr, pixels,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """out = a ∘ x + b per channel, BACKWARD plus c ∘ dy."""
    ch = tl.arange(0, CP)
    a = tl.load(a_ptr + ch, mask=ch < C, other=0.0)[None, :]
    b = tl.load(b_ptr + ch, mask=ch < C, other=0.0)[None, :]
    offsets, mask = _rows(tl.program_id(0) * ROWS, pixels, C, CP, ROWS)
    y = a * tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + b
    if BACKWARD:
        c = tl.load(c_ptr + ch, mask=ch < C, other=0.0)[None, :]
        y += c * tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


def _sizes(x: Tensor) -> tuple[int, dict[str, int]]:
    channels = x.shape[-1]
    padded = triton.next_power_of_2(channels)
    return x.numel() // channels, {"C": channels, "CP": padded, "ROWS": max(1, _NUMBERS // padded)}


def _sums(x: Tensor, dy: Tensor | None, mean: Tensor | None, invstd: Tensor | None) -> Tensor:
    """(2, C) in float64, from portions that are added in one order."""
    pixels, constants = _sizes(x)
    programs = min(4 * multiprocessors(x.device), triton.cdiv(pixels, constants["ROWS"]))
    sums = torch.empty(programs, 2, constants["C"], dtype=torch.float32, device=x.device)
    args = (x, dy, sums, mean, invstd, pixels, triton.cdiv(pixels, programs))
    launch(sum_pairs, (programs,), args, constants | {"BACKWARD": dy is not None}, num_warps=4)
    return sums.sum(0, dtype=torch.float64)


def _affine(x: Tensor, dy: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    pixels, constants = _sizes(x)
    out = torch.empty_like(x)
    args = (x, dy, out, a, b, c, pixels)
    grid = (triton.cdiv(pixels, constants["ROWS"]),)
    launch(scale_and_shift, grid, args, constants | {"BACKWARD": dy is not None}, num_warps=4)
    return out


@torch.library.custom_op("convlstm_fish::batch_norm", mutates_args=())
def _normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and biased variance of the channels, of x (frames, H, W, C) contiguous."""
    pixels = x.numel() // x.shape[-1]
    first, second = _sums(x, None, None, None) / pixels
    mean = x[0, 0, 0].double() + first
    variance = (second - first * first).clamp_(min=0)
    a = (variance + eps).rsqrt() * (1.0 if weight is None else weight)
    b = -mean * a if bias is None else bias - mean * a
    return _affine(x, None, a.float(), b.float(), None), mean.float(), variance.float()


@_normalise.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    one = x.new_empty(x.shape[-1], dtype=torch.float32)
    return torch.empty_like(x), one, torch.empty_like(one)


@torch.library.custom_op("convlstm_fish::batch_norm_backward", mutates_args=())
def _gradients(
    x: Tensor, dy: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """dx; and (2, C) the sums of dy and of dy ∘ x̂, which are the gradients of bias and weight."""
    pixels = x.numel() // x.shape[-1]
    dy = dy.contiguous()
    invstd = (variance + eps).rsqrt()
    sums = _sums(x, dy, mean, invstd).float()
    dbias, dweight = sums
    # With x̂ = (x - mean) / std: dx = w / std ∘ (dy - mean(dy) - x̂ ∘ mean(dy ∘ x̂))
    c = invstd if weight is None else invstd * weight.float()
    a = -c * invstd * dweight / pixels
    return _affine(x, dy, a, -a * mean - c * dbias / pixels, c), sums


@_gradients.register_fake
def _(
    x: Tensor, dy: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), mean.new_empty(2, mean.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.eps = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, variance)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, mean, variance = ctx.saved_tensors
    if dy is None:
        return None, None, None, None
    dx, (dbias, dweight) = _gradients(x, dy, weight, mean, variance, ctx.eps)
    return (
        dx,
        None if weight is None else dweight.to(weight.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        None,
    )


_normalise.register_autograd(_gradient, setup_context=_setup_context)


def batch_norm_triton(
    frames: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in training of frames on a GPU that lie channels last.

    Args:
        frames: (F, C, H, W).
        weight, bias: (C,) or None.
        eps: added to the variance.

    Returns:
        The normalised frames, channels last, and mean and biased variance of the channels, (C,) in float32.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1.
    """
    y, mean, variance = _normalise(frames.permute(0, 2, 3, 1).contiguous(), weight, bias, eps)
    return y.permute(0, 3, 1, 2), mean, variance


def scale_triton(frames: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a ∘ frames + b, with a and b (C,) in float32; no gradient. Frames as in :func:`batch_norm_triton`."""
    return _affine(frames.permute(0, 2, 3, 1).contiguous(), None, a, b, None).permute(0, 3, 1, 2)
