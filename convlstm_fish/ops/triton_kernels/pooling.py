# mypy: allow-untyped-defs
"""Max pooling of channels-last frames that keeps no indices: the backward pass finds the maxima again."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convlstm_fish.ops.triton_kernels.launch import cdiv, launch


@triton.jit
def _window(
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, COVER: tl.constexpr
):  # fmt: skip
    """The windows of this program: where they start in the input, their rows and columns, whether they exist and are
    whole, and where they lie in the output.

    With COVER the cut windows at the lower and right edge count too.
    """
    rows: tl.constexpr = (H + SIZE - 1) // SIZE if COVER else H // SIZE
    columns: tl.constexpr = (W + SIZE - 1) // SIZE if COVER else W // SIZE
    programs: tl.constexpr = (rows * columns * C + BLOCK - 1) // BLOCK  # of a frame
    at = (tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK)
    frame = (tl.program_id(0) // programs).to(tl.int64)
    ch = at % C
    x = (at // C) % columns
    y = at // C // columns
    exists = y < rows
    whole = exists & ((y + 1) * SIZE <= H) & ((x + 1) * SIZE <= W)
    corner = frame * (H * W * C) + (y * SIZE * W + x * SIZE) * C + ch
    place = frame * ((H // SIZE) * (W // SIZE) * C) + (y * (W // SIZE) + x) * C + ch
    return corner, y, x, exists, whole, place


@triton.jit
def pool_forward(
    x_ptr, out_ptr, a_ptr, b_ptr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr,
    SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = max over SIZE x SIZE windows, SCALED per channel: a ∘ max + b."""
    corner, _, _, _, whole, place = _window(H, W, C, SIZE, BLOCK, False)
    source = x_ptr + corner
    best = tl.load(source, mask=whole, other=0.0).to(tl.float32)
    for k in tl.static_range(1, SIZE * SIZE):
        value = tl.load(source + ((k // SIZE) * W + k % SIZE) * C, mask=whole, other=0.0).to(tl.float32)
        best = tl.where((value > best) | (value != value), value, best)  # NaN wins, as in torch
    if SCALED:
        ch = place % C
        best = tl.load(a_ptr + ch) * best + tl.load(b_ptr + ch)
    tl.store(out_ptr + place, best.to(out_ptr.dtype.element_ty), mask=whole)


@triton.jit
def pool_backward(
    x_ptr, dout_ptr, dx_ptr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dout at the first maximum of each window, 0 elsewhere."""
    corner, y, x, exists, whole, place = _window(H, W, C, SIZE, BLOCK, True)
    source = x_ptr + corner
    target = dx_ptr + corner
    best = tl.load(source, mask=whole, other=0.0).to(tl.float32)
    chosen = tl.zeros((BLOCK,), dtype=tl.int32)
    for k in tl.static_range(1, SIZE * SIZE):
        value = tl.load(source + ((k // SIZE) * W + k % SIZE) * C, mask=whole, other=0.0).to(tl.float32)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        chosen = tl.where(better, k, chosen)
    gradient = tl.load(dout_ptr + place, mask=whole, other=0.0)
    for k in tl.static_range(SIZE * SIZE):
        inside = exists & (y * SIZE + k // SIZE < H) & (x * SIZE + k % SIZE < W)
        value = tl.where(whole & (chosen == k), gradient, 0.0)
        tl.store(target + ((k // SIZE) * W + k % SIZE) * C, value, mask=inside)


def pooled_and_scaled(x: Tensor, size: int, a: Tensor | None, b: Tensor | None) -> Tensor:
    """The maxima of x (frames, H, W, C) contiguous, times a plus b where those, (C,) in float32, are given."""
    frames, height, width, channels = x.shape
    out = x.new_empty(frames, height // size, width // size, channels)
    constants = {"H": height, "W": width, "C": channels, "SIZE": size, "SCALED": a is not None, "BLOCK": 1024}
    launch(pool_forward, (frames * cdiv(out[0].numel(), 1024),), (x, out, a, b), constants, num_warps=4)
    return out


@torch.library.custom_op("convlstm_fish::max_pool", mutates_args=())
def _pool(x: Tensor, size: int) -> Tensor:
    return pooled_and_scaled(x, size, None, None)


@_pool.register_fake
def _(x: Tensor, size: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // size, x.shape[2] // size, x.shape[3])


@torch.library.custom_op("convlstm_fish::max_pool_backward", mutates_args=())
def _pool_gradient(x: Tensor, dout: Tensor, size: int) -> Tensor:
    frames, height, width, channels = x.shape
    dx = torch.empty_like(x)
    windows = cdiv(height, size) * cdiv(width, size) * channels
    constants = {"H": height, "W": width, "C": channels, "SIZE": size, "BLOCK": 1024}
    args = (x, dout.contiguous(), dx)
    launch(pool_backward, (frames * cdiv(windows, 1024),), args, constants, num_warps=4)
    return dx


@_pool_gradient.register_fake
def _(x: Tensor, dout: Tensor, size: int) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.size = inputs[1]


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return _pool_gradient(ctx.saved_tensors[0], dout, ctx.size), None


_pool.register_autograd(_gradient, setup_context=_setup_context)


def frames_unsupported(frames: Tensor) -> str | None:
    """Why the kernels of frames (F, C, H, W) cannot run on these, or None if they can."""
    if frames.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"the frames are on {frames.device.type}, not on a CUDA GPU"
    if frames.dim() != 4 or frames.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels take (F, C, H, W) in 16 or 32 bits, not {frames.dim()} dimensions of {frames.dtype}"
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms do not see through the Triton kernels"
    return None


def max_pool_triton(frames: Tensor, size: int) -> Tensor:
    """``torch.nn.functional.max_pool2d(frames, size)``, several times as fast on channels-last frames.

    Args:
        frames: (F, C, H, W) on a GPU, laid out channels last (else it is copied).
        size: of the windows, which is also their stride.

    Returns:
        (F, C, H // size, W // size), channels last. A window's gradient goes to its first maximum.
    """
    return _pool(frames.permute(0, 2, 3, 1).contiguous(), size).permute(0, 3, 1, 2)
