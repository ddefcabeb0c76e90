# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
"""Gradients that need all the steps' da at once: of the weights and bias, of the input, and of h_0."""

from __future__ import annotations

import triton
import triton.language as tl

from convlstm_fish.ops.triton_kernels.common import (
    convolve,
    convolve_adjoint_3,
    load_patches,
    round_operand,
    tile_pixels,
)


@triton.jit(do_not_specialize=["first", "T", "items", "slots", "portion", "with_h"])
def weight_gradients(
    h_ptr, factor_ptr, x_ptr, da_ptr, dw_ptr, length_ptr,
    first, T, slots, items, portion, with_h, rows,
    h_n, h_t, x_n, x_t, da_n, da_t, factor_n,
    steps: tl.constexpr, tiles: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HI: tl.constexpr, WI: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, C_IN: tl.constexpr, CP_IN: tl.constexpr, COLUMNS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, KHX: tl.constexpr, KWX: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr,
    FRESH: tl.constexpr, PRECISION: tl.constexpr, BLOCKS_H: tl.constexpr, BLOCKS_X: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, TW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum over pixels, clips and steps first .. first + steps - 1 of patches(h | x)ᵀ @ da, in portions.

    Grid: (groups of rows, portions, column blocks). A program holds BLOCKS_H blocks of BK rows of W_hh's gradient and
    BLOCKS_X of W_ih's, so that da is read once for all of them; there is more than one group only if one of the two is
    0. Each portion adds into its own (rows, COLUMNS) slice of dw; a second pass adds the slices, so that the sum has
    one order. h is that of the step before, or with ``with_h`` 0 absent from the clips' first step.
    """
    blocks: tl.constexpr = BLOCKS_H + BLOCKS_X
    row0 = tl.program_id(0) * (blocks * BK)
    part = tl.program_id(1)
    columns = tl.program_id(2) * BN + tl.arange(0, BN)
    wanted = columns < COLUMNS
    sums = ()
    for _ in tl.static_range(blocks):
        sums = sums + (tl.zeros((BK, BN), dtype=tl.float32),)  # noqa: RUF005
    start = part * portion
    stop = tl.minimum(start + portion, items)
    for item in tl.range(start, stop, num_stages=STAGES):
        tile = item % tiles
        rest = item // tiles
        s = first + rest % steps
        n = (rest // steps).to(tl.int64)
        y, x, valid = tile_pixels(tile, H, W, BM, TW, 0)
        if HAS_LENGTHS:
            length = tl.load(length_ptr + n)
            valid = valid & (s < length)
        else:
            length = T
        if REVERSE:
            t = (length - 1 - s).to(tl.int64)
            before = t + 1
        else:
            t = s.to(tl.int64)
            before = t - 1
        da = tl.load(
            da_ptr + n * da_n + (s % slots).to(tl.int64) * da_t + (y * W + x)[:, None] * COLUMNS + columns[None, :],
            mask=valid[:, None] & wanted[None, :],
            other=0.0,
        )
        da = round_operand(da, PRECISION)
        added = ()
        for b in tl.static_range(blocks):
            if b < BLOCKS_H:
                a = load_patches(
                    row0 + b * BK, h_ptr + n * h_n + before * h_t, factor_ptr + n * factor_n,
                    y, x, valid & (s + with_h > 0), H, W, C, CP, KH, KW, 1, 1, (KH - 1) // 2, (KW - 1) // 2, 1, 1,
                    False, HAS_FACTOR, BK, PRECISION,
                )  # fmt: skip
            else:
                a = load_patches(
                    row0 + (b - BLOCKS_H) * BK, x_ptr + n * x_n + t * x_t, x_ptr, y, x, valid, HI, WI,
                    C_IN, CP_IN, KHX, KWX, SY, SX, PY, PX, DY, DX, False, False, BK, PRECISION,
                )  # fmt: skip
            added = added + (tl.dot(tl.trans(a), da, sums[b], input_precision=PRECISION),)  # noqa: RUF005
        sums = added
    for b in tl.static_range(blocks):
        target = dw_ptr + (part * rows + row0 + b * BK + tl.arange(0, BK))[:, None] * COLUMNS + columns[None, :]
        value = sums[b]
        mask = tl.broadcast_to(wanted[None, :], value.shape)
        if not FRESH:
            value += tl.load(target, mask=mask, other=0.0)
        tl.store(target, value, mask=mask)


@triton.jit(do_not_specialize=["first", "T", "slots"])
def image_gradient(
    da_ptr, w_ptr, factor_ptr, out_ptr, length_ptr,
    first, T, slots, da_n, da_t, out_n, out_t, factor_n,
    H: tl.constexpr, W: tl.constexpr, HI: tl.constexpr, WI: tl.constexpr, ldw: tl.constexpr,
    C: tl.constexpr, CP_GATES: tl.constexpr, GATES: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TW: tl.constexpr, HALO: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The adjoint of a convolution on da, for every clip and the steps from ``first``: gradient of x, or of h.

    Grid: (tiles of the image * channel blocks, clips, steps). Past a clip's length it writes zeros.
    """
    blocks: tl.constexpr = (C + BC - 1) // BC
    block = tl.program_id(0) % blocks
    n = tl.program_id(1).to(tl.int64)
    s = first + tl.program_id(2)
    y, x, valid = tile_pixels(tl.program_id(0) // blocks, HI, WI, BM, TW, HALO)
    columns = block * BC + tl.arange(0, BC)
    side_by_side = block * (4 * BC) + tl.arange(0, 4 * BC)
    at = (y * WI + x)[:, None] * C + columns[None, :]
    exists = valid[:, None] & (columns < C)[None, :]
    length = tl.load(length_ptr + n) if HAS_LENGTHS else T
    acc = tl.zeros((BM, BC), dtype=tl.float32)
    t = s.to(tl.int64)
    if s < length:
        if REVERSE:
            t = (length - 1 - s).to(tl.int64)
        da = da_ptr + n * da_n + (s % slots).to(tl.int64) * da_t
        if HALO > 0:
            acc = convolve_adjoint_3(
                da, w_ptr, side_by_side, ldw, y, x, H, W, GATES, CP_GATES, KH, PY, PX,
                BM, BC, BK, STAGES, PRECISION,
            )  # fmt: skip
        else:
            acc = convolve(
                acc, (KH * KW * CP_GATES + BK - 1) // BK, da, da_ptr, (), w_ptr, columns, ldw, y, x, valid, H, W,
                GATES, CP_GATES, KH, KW, SY, SX, PY, PX, DY, DX, True, False, False, BK, STAGES, PRECISION,
            )  # fmt: skip
        if HAS_FACTOR:
            acc *= tl.load(factor_ptr + n * factor_n + at, mask=exists, other=0.0)
    tl.store(out_ptr + n * out_n + t * out_t + at, acc.to(out_ptr.dtype.element_ty), mask=exists)
