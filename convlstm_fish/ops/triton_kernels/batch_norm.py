# mypy: allow-untyped-defs
"""Batch norm of channels-last frames of few channels: each pass reads its tensors once, at the memory's speed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convlstm_fish.ops.triton_kernels.launch import cdiv, launch
from convlstm_fish.ops.triton_kernels.layer import multiprocessors
from convlstm_fish.ops.triton_kernels.pooling import pooled_and_scaled

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


@triton.jit
def _add_up(sums_ptr, programs, ch, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr):
    """The two sums per channel, over all portions in one order, in float64."""
    first = tl.zeros((CP,), dtype=tl.float64)
    second = tl.zeros((CP,), dtype=tl.float64)
    for at in range(0, programs, ROWS):
        row = at + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (ch < C)[None, :]
        source = sums_ptr + row[:, None] * (2 * C) + ch[None, :]
        first += tl.sum(tl.load(source, mask=mask, other=0.0).to(tl.float64), axis=0)
        second += tl.sum(tl.load(source + C, mask=mask, other=0.0).to(tl.float64), axis=0)
    return first, second


@triton.jit(do_not_specialize=["programs", "pixels"])
def finish_forward(
    sums_ptr, x_ptr, weight_ptr, bias_ptr, out_ptr, programs, pixels, eps,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Mean, biased variance and 1 / std per channel, then y's a and b in y = a ∘ x + b: five rows of C."""
    ch = tl.arange(0, CP)
    mask = ch < C
    first, second = _add_up(sums_ptr, programs, ch, C, CP, ROWS)
    first = first / pixels
    mean = first + tl.load(x_ptr + ch, mask=mask, other=0.0).to(tl.float64)
    variance = tl.maximum(second / pixels - first * first, 0.0)
    invstd = 1.0 / tl.sqrt(variance + eps)
    a = invstd
    if HAS_WEIGHT:
        a = a * tl.load(weight_ptr + ch, mask=mask, other=0.0).to(tl.float64)
    b = -mean * a
    if HAS_BIAS:
        b = b + tl.load(bias_ptr + ch, mask=mask, other=0.0).to(tl.float64)
    tl.store(out_ptr + ch, mean.to(tl.float32), mask=mask)
    tl.store(out_ptr + C + ch, variance.to(tl.float32), mask=mask)
    tl.store(out_ptr + 2 * C + ch, invstd.to(tl.float32), mask=mask)
    tl.store(out_ptr + 3 * C + ch, a.to(tl.float32), mask=mask)
    tl.store(out_ptr + 4 * C + ch, b.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["programs", "pixels"])
def finish_backward(
    sums_ptr, weight_ptr, moments_ptr, out_ptr, programs, pixels,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """The sums of dy and of dy ∘ x̂, then dx's a, b and c in dx = a ∘ x + b + c ∘ dy: five rows of C.

    With x̂ = (x - mean) / std: dx = w / std ∘ (dy - mean(dy) - x̂ ∘ mean(dy ∘ x̂)).
    """
    ch = tl.arange(0, CP)
    mask = ch < C
    dbias, dweight = _add_up(sums_ptr, programs, ch, C, CP, ROWS)
    mean = tl.load(moments_ptr + ch, mask=mask, other=0.0).to(tl.float64)
    invstd = tl.load(moments_ptr + 2 * C + ch, mask=mask, other=0.0).to(tl.float64)
    c = invstd
    if HAS_WEIGHT:
        c = c * tl.load(weight_ptr + ch, mask=mask, other=0.0).to(tl.float64)
    a = -c * invstd * dweight / pixels
    b = -a * mean - c * dbias / pixels
    tl.store(out_ptr + ch, dbias.to(tl.float32), mask=mask)
    tl.store(out_ptr + C + ch, dweight.to(tl.float32), mask=mask)
    tl.store(out_ptr + 2 * C + ch, a.to(tl.float32), mask=mask)
    tl.store(out_ptr + 3 * C + ch, b.to(tl.float32), mask=mask)
    tl.store(out_ptr + 4 * C + ch, c.to(tl.float32), mask=mask)


def _sizes(x: Tensor) -> tuple[int, dict[str, int]]:
    """Pixels of x (frames, H, W, C), and what the kernels know when they are compiled."""
    channels = x.shape[-1]
    padded = triton.next_power_of_2(channels)
    return x.numel() // channels, {"C": channels, "CP": padded, "ROWS": max(1, _NUMBERS // padded)}


def _sums(x: Tensor, dy: Tensor | None, moments: Tensor | None) -> Tensor:
    """Two sums of each portion, (portions, 2, C)."""
    pixels, constants = _sizes(x)
    programs = min(4 * multiprocessors(x.device), cdiv(pixels, constants["ROWS"]))
    sums = torch.empty(programs, 2, constants["C"], dtype=torch.float32, device=x.device)
    mean, invstd = (None, None) if moments is None else (moments[0], moments[2])
    args = (x, dy, sums, mean, invstd, pixels, cdiv(pixels, programs))
    launch(sum_pairs, (programs,), args, constants | {"BACKWARD": dy is not None}, num_warps=4)
    return sums


def _affine(x: Tensor, dy: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    pixels, constants = _sizes(x)
    out = torch.empty_like(x)
    args = (x, dy, out, a, b, c, pixels)
    grid = (cdiv(pixels, constants["ROWS"]),)
    launch(scale_and_shift, grid, args, constants | {"BACKWARD": dy is not None}, num_warps=4)
    return out


@torch.library.custom_op("convlstm_fish::batch_norm", mutates_args=())
def _normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y of x (frames, H, W, C) contiguous; and (5, C), of which the first rows are mean and biased variance."""
    pixels, constants = _sizes(x)
    sums = _sums(x, None, None)
    moments = torch.empty(5, constants["C"], dtype=torch.float32, device=x.device)
    args = (sums, x, weight, bias, moments, sums.shape[0], pixels, eps)
    constants |= {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    launch(finish_forward, (1,), args, constants, num_warps=4)
    return _affine(x, None, moments[3], moments[4], None), moments


@_normalise.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(5, x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("convlstm_fish::batch_norm_backward", mutates_args=())
def _gradients(x: Tensor, dy: Tensor, weight: Tensor | None, moments: Tensor) -> tuple[Tensor, Tensor]:
    """dx; and (5, C), of which the first rows are the gradients of bias and weight."""
    pixels, constants = _sizes(x)
    dy = dy.contiguous()
    sums = _sums(x, dy, moments)
    found = torch.empty_like(moments)
    args = (sums, weight, moments, found, sums.shape[0], pixels)
    launch(finish_backward, (1,), args, constants | {"HAS_WEIGHT": weight is not None}, num_warps=4)
    return _affine(x, dy, found[2], found[3], found[4]), found


@_gradients.register_fake
def _(x: Tensor, dy: Tensor, weight: Tensor | None, moments: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(moments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, moments = ctx.saved_tensors
    if dy is None:
        return None, None, None, None
    dx, (dbias, dweight, *_rest) = _gradients(x, dy, weight, moments)
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
    y, moments = _normalise(frames.permute(0, 2, 3, 1).contiguous(), weight, bias, eps)
    return y.permute(0, 3, 1, 2), moments[0], moments[1]


def scale_triton(frames: Tensor, a: Tensor, b: Tensor, pool_size: int = 1) -> Tensor:
    """a ∘ frames + b, with a and b (C,) in float32; no gradient. Frames as in :func:`batch_norm_triton`.

    With ``pool_size`` of the frames' maxima over windows of that size, as :func:`max_pool_triton` takes them.
    """
    x = frames.permute(0, 2, 3, 1).contiguous()
    y = _affine(x, None, a, b, None) if pool_size == 1 else pooled_and_scaled(x, pool_size, a, b)
    return y.permute(0, 3, 1, 2)
