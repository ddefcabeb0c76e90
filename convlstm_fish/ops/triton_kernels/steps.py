# mypy: allow-untyped-defs
"""One time step of a ConvLSTM in one launch: forward, and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from convlstm_fish.ops.triton_kernels.common import (
    convolve,
    convolve_adjoint_3,
    hold_weight,
    recurrent_activation,
    recurrent_slope,
    split_parts,
    tanh,
    tile_pixels,
)


@triton.jit
def step_gates(
    x_ptr, h_ptr, mask_ptr, held_x, held_h, w_x_ptr, w_h_ptr, bias_ptr, block, y, x, valid, ldw,
    H: tl.constexpr, W: tl.constexpr, HI: tl.constexpr, WI: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, C_IN: tl.constexpr, CP_IN: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, KHX: tl.constexpr, KWX: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HELD: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BKX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The four gates before their activation: both convolutions and the bias, without the peepholes."""
    columns = block * (4 * BC) + tl.arange(0, 4 * BC)
    acc = tl.zeros((BM, 4 * BC), dtype=tl.float32)
    acc = convolve(
        acc, (KHX * KWX * CP_IN + BKX - 1) // BKX, x_ptr, x_ptr, held_x, w_x_ptr, columns, ldw, y, x, valid, HI, WI,
        C_IN, CP_IN, KHX, KWX, SY, SX, PY, PX, DY, DX, False, False, HELD, BKX, STAGES, PRECISION,
    )  # fmt: skip
    if HAS_STATE:
        acc = convolve(
            acc, (KH * KW * CP + BK - 1) // BK, h_ptr, mask_ptr, held_h, w_h_ptr, columns, ldw, y, x, valid, H, W,
            C, CP, KH, KW, 1, 1, (KH - 1) // 2, (KW - 1) // 2, 1, 1, False, HAS_MASK, HELD, BK, STAGES, PRECISION,
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns)[None, :]
    return split_parts(acc, BM, BC)


@triton.jit
def load_peephole(ptr, ch, pixel, exists, C: tl.constexpr, PEEPHOLE: tl.constexpr):
    """Peephole weights of a tile: one a channel (PEEPHOLE = 1) or one a channel and pixel (2)."""
    if PEEPHOLE == 1:
        w = tl.load(ptr + ch, mask=ch < C, other=0.0)
    else:
        w = tl.load(ptr + pixel * C + ch, mask=exists, other=0.0)
    return w


@triton.jit
def add_to(ptr, value, mask):
    """Adds to numbers that no other program touches."""
    tl.store(ptr, tl.load(ptr, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def cell_update(
    z_i, z_f, z_g, z_o, c, w_ci_ptr, w_cf_ptr, w_co_ptr, ch, pixel, exists,
    C: tl.constexpr, PEEPHOLE: tl.constexpr, HAS_STATE: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gates i, f, g, o and the next c, from what comes before the activations and the c before."""
    if HAS_STATE and PEEPHOLE > 0:
        z_i += load_peephole(w_ci_ptr, ch, pixel, exists, C, PEEPHOLE) * c
        z_f += load_peephole(w_cf_ptr, ch, pixel, exists, C, PEEPHOLE) * c
    i = recurrent_activation(z_i, ACT, FAST)
    f = recurrent_activation(z_f, ACT, FAST)
    g = tanh(z_g, FAST)
    c = f * c + i * g
    if PEEPHOLE > 0:
        z_o += load_peephole(w_co_ptr, ch, pixel, exists, C, PEEPHOLE) * c
    return i, f, g, recurrent_activation(z_o, ACT, FAST), c


@triton.jit
def store_gates(ptr, i, f, g, o, exists, C: tl.constexpr):
    """Four numbers a channel, in the order i, f, g, o."""
    tl.store(ptr, i.to(ptr.dtype.element_ty), mask=exists)
    tl.store(ptr + C, f.to(ptr.dtype.element_ty), mask=exists)
    tl.store(ptr + 2 * C, g.to(ptr.dtype.element_ty), mask=exists)
    tl.store(ptr + 3 * C, o.to(ptr.dtype.element_ty), mask=exists)


@triton.jit
def cell_gradients(
    i, f, g, o, c_before, c, dh, dc, w_ci_ptr, w_cf_ptr, w_co_ptr, dpeephole_ptr, sums_at, ch, pixel, exists,
    C: tl.constexpr, PEEPHOLE: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates before activation, and of the c before, from those of h and c; ``dpeephole`` grows."""
    squashed = tanh(c, FAST)
    da_o = dh * squashed * recurrent_slope(o, ACT)
    dc += dh * o * (1.0 - squashed * squashed)
    if PEEPHOLE > 0:
        dc += load_peephole(w_co_ptr, ch, pixel, exists, C, PEEPHOLE) * da_o
    da_i = dc * g * recurrent_slope(i, ACT)
    da_f = dc * c_before * recurrent_slope(f, ACT)
    da_g = dc * i * (1.0 - g * g)
    dc = dc * f
    if PEEPHOLE > 0:
        dc += load_peephole(w_ci_ptr, ch, pixel, exists, C, PEEPHOLE) * da_i
        dc += load_peephole(w_cf_ptr, ch, pixel, exists, C, PEEPHOLE) * da_f
        sums = dpeephole_ptr + sums_at + pixel * (3 * C) + ch
        add_to(sums, da_i * c_before, exists)
        add_to(sums + C, da_f * c_before, exists)
        add_to(sums + 2 * C, da_o * c, exists)
    return da_i, da_f, da_g, da_o, dc


@triton.jit
def add_bias_sums(ptr, da_i, da_f, da_g, da_o, channel, exists, C: tl.constexpr):
    """Adds a tile's gradients to its own sums, so that they are added in one order."""
    ptr += channel
    add_to(ptr, tl.sum(tl.where(exists, da_i, 0.0), axis=0), channel < C)
    add_to(ptr + C, tl.sum(tl.where(exists, da_f, 0.0), axis=0), channel < C)
    add_to(ptr + 2 * C, tl.sum(tl.where(exists, da_g, 0.0), axis=0), channel < C)
    add_to(ptr + 3 * C, tl.sum(tl.where(exists, da_o, 0.0), axis=0), channel < C)


@triton.jit(do_not_specialize=["s", "T", "items"])
def forward_step(
    x_ptr, h_in_ptr, h_out_ptr, c_in_ptr, c_out_ptr, c_save_ptr, gates_ptr,
    w_x_ptr, w_h_ptr, bias_ptr, w_ci_ptr, w_cf_ptr, w_co_ptr, mask_ptr, length_ptr,
    s, T, items, x_n, x_t, h_in_n, h_in_t, h_out_n, h_out_t, c_save_n, c_save_t, gates_n, gates_t, state_n,
    tiles: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HI: tl.constexpr, WI: tl.constexpr, ldw: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, C_IN: tl.constexpr, CP_IN: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, KHX: tl.constexpr, KWX: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    ACT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, PEEPHOLE: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    REVERSE: tl.constexpr, SAVE_C: tl.constexpr, SAVE_GATES: tl.constexpr, ZERO_REST: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BKX: tl.constexpr, TW: tl.constexpr, STAGES: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """h_t and c_t of BM pixels and BC channels of one clip; the s-th step that the clip does.

    Grid: (tiles * channel blocks, clips). Pointers with a stride of 0 in time hold one step.
    """
    blocks: tl.constexpr = (C + BC - 1) // BC
    held_x = ()
    held_h = ()
    if HELD:
        columns = tl.arange(0, 4 * BC)
        held_x = hold_weight(w_x_ptr, columns, ldw, (KHX * KWX * CP_IN + BKX - 1) // BKX, BKX)
        if HAS_STATE:
            held_h = hold_weight(w_h_ptr, columns, ldw, (KH * KW * CP + BK - 1) // BK, BK)
    # Not held, one tile a program: a loop of constant bounds, which is none.
    for k in tl.range(
        tl.program_id(0) if HELD else 0, items if HELD else 1, tl.num_programs(0) if HELD else 1, num_stages=1
    ):
        item = k if HELD else tl.program_id(0)
        block = item % blocks
        n = (item // blocks // tiles).to(tl.int64)
        y, x, valid = tile_pixels(item // blocks % tiles, H, W, BM, TW, 0)
        ch = (block * BC + tl.arange(0, BC))[None, :]
        pixel = (y * W + x)[:, None]
        at = pixel * C + ch
        exists = valid[:, None] & (ch < C)
        length = tl.load(length_ptr + n) if HAS_LENGTHS else T
        if s < length:
            if REVERSE:
                t = (length - 1 - s).to(tl.int64)
                before = t + 1
            else:
                t = s.to(tl.int64)
                before = t - 1
            z_i, z_f, z_g, z_o = step_gates(
                x_ptr + n * x_n + t * x_t, h_in_ptr + n * h_in_n + before * h_in_t, mask_ptr + n * state_n,
                held_x, held_h, w_x_ptr, w_h_ptr, bias_ptr, block, y, x, valid, ldw, H, W, HI, WI,
                C, CP, C_IN, CP_IN, KH, KW, KHX, KWX, SY, SX, PY, PX, DY, DX,
                HAS_STATE, HAS_BIAS, HAS_MASK, HELD, PRECISION, BM, BC, BK, BKX, STAGES,
            )  # fmt: skip
            c_before = tl.zeros((BM, BC), dtype=tl.float32)
            if HAS_STATE:
                c_before = tl.load(c_in_ptr + n * state_n + at, mask=exists, other=0.0)
            i, f, g, o, c = cell_update(
                z_i, z_f, z_g, z_o, c_before, w_ci_ptr, w_cf_ptr, w_co_ptr, ch, pixel, exists,
                C, PEEPHOLE, HAS_STATE, ACT, FAST,
            )  # fmt: skip
            h = o * tanh(c, FAST)
            tl.store(c_out_ptr + n * state_n + at, c, mask=exists)
            if SAVE_C:
                c_save = c_save_ptr + n * c_save_n + t * c_save_t
                tl.store(c_save + at, c.to(c_save_ptr.dtype.element_ty), mask=exists)
            if SAVE_GATES:
                store_gates(gates_ptr + n * gates_n + t * gates_t + pixel * (4 * C) + ch, i, f, g, o, exists, C)
            tl.store(h_out_ptr + n * h_out_n + t * h_out_t + at, h.to(h_out_ptr.dtype.element_ty), mask=exists)
        else:
            if ZERO_REST:
                zero = tl.zeros((BM, BC), dtype=h_out_ptr.dtype.element_ty)
                tl.store(h_out_ptr + n * h_out_n + s.to(tl.int64) * h_out_t + at, zero, mask=exists)


@triton.jit(do_not_specialize=["s", "T", "slot", "slot_next"])
def backward_step(
    x_ptr, h_in_ptr, c_in_ptr, gates_ptr, dout_ptr, dh_ptr, da_ptr, dc_in_ptr, dc_ptr, dpeephole_ptr, dbias_ptr,
    w_x_ptr, w_h_ptr, w_back_ptr, bias_ptr, w_ci_ptr, w_cf_ptr, w_co_ptr, mask_ptr, length_ptr,
    s, T, slot, slot_next,
    x_n, x_t, h_in_n, h_in_t, c_in_n, c_in_t, gates_n, gates_t, dout_n, dout_t, da_n, da_t, state_n,
    tiles: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HI: tl.constexpr, WI: tl.constexpr,
    ldw: tl.constexpr, ldw_back: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, CP_GATES: tl.constexpr, C_IN: tl.constexpr, CP_IN: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, KHX: tl.constexpr, KWX: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    ACT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, PEEPHOLE: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_DOUT: tl.constexpr, HAS_DH: tl.constexpr, HAS_DC: tl.constexpr, HAS_GATES: tl.constexpr,
    HAS_NEXT: tl.constexpr, REVERSE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BKX: tl.constexpr, BKB: tl.constexpr,
    TW: tl.constexpr, HALO: tl.constexpr, STAGES: tl.constexpr, STAGES_BACK: tl.constexpr,
):  # fmt: skip
    """Gradients of the s-th step's gates before activation, da (H, W, 4 * C), gates i, f, g, o; and of c_{t-1}.

    With * the convolution and ~ its adjoint, from da of the step after or what it gives for h, dc, and the gates, kept
    or computed again::

        dh = dout_t + mask ∘ (W_hh ~ da_{t+1}),   da_o = dh ∘ tanh(c_t) ∘ o',
        dc += dh ∘ o ∘ (1 - tanh²(c_t)) + w_co ∘ da_o,
        da_i = dc ∘ g ∘ i',  da_f = dc ∘ c_{t-1} ∘ f',  da_g = dc ∘ i ∘ (1 - g²),
        dc_{t-1} = dc ∘ f + w_ci ∘ da_i + w_cf ∘ da_f

    One launch a step: a tile reads its neighbours' da of the step after, which an earlier launch wrote.
    """
    blocks: tl.constexpr = (C + BC - 1) // BC
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks
    n = tl.program_id(1).to(tl.int64)
    y, x, valid = tile_pixels(tile, H, W, BM, TW, HALO)
    ch = (block * BC + tl.arange(0, BC))[None, :]
    pixel = (y * W + x)[:, None]
    at = pixel * C + ch
    exists = valid[:, None] & (ch < C)
    length = tl.load(length_ptr + n) if HAS_LENGTHS else T
    if s < length:
        if REVERSE:
            t = (length - 1 - s).to(tl.int64)
            before = t + 1
        else:
            t = s.to(tl.int64)
            before = t - 1
        dh = tl.zeros((BM, BC), dtype=tl.float32)
        if HAS_NEXT and s + 1 < length:
            da_next = da_ptr + n * da_n + slot_next.to(tl.int64) * da_t
            if HALO > 0:
                columns = block * (4 * BC) + tl.arange(0, 4 * BC)
                dh = convolve_adjoint_3(
                    da_next, w_back_ptr, columns, ldw_back, y, x, H, W, 4 * C, CP_GATES, KH,
                    (KH - 1) // 2, 1, BM, BC, BKB, STAGES_BACK, PRECISION,
                )  # fmt: skip
            else:
                dh = convolve(
                    dh, (KH * KW * CP_GATES + BKB - 1) // BKB, da_next, da_ptr, (), w_back_ptr,
                    block * BC + tl.arange(0, BC), ldw_back,
                    y, x, valid, H, W, 4 * C, CP_GATES, KH, KW, 1, 1, (KH - 1) // 2, (KW - 1) // 2, 1, 1,
                    True, False, False, BKB, STAGES_BACK, PRECISION,
                )  # fmt: skip
            if HAS_MASK:
                dh *= tl.load(mask_ptr + n * state_n + at, mask=exists, other=0.0)
        elif HAS_DH:
            dh += tl.load(dh_ptr + n * state_n + at, mask=exists, other=0.0)
        if HAS_DOUT:
            dh += tl.load(dout_ptr + n * dout_n + t * dout_t + at, mask=exists, other=0.0)
        c_before = tl.zeros((BM, BC), dtype=tl.float32)
        if HAS_STATE:
            c_before = tl.load(c_in_ptr + n * c_in_n + before * c_in_t + at, mask=exists, other=0.0)
            c_before = c_before.to(tl.float32)
        dc = tl.zeros((BM, BC), dtype=tl.float32)
        if HAS_DC:  # early: the gates take a while
            dc += tl.load(dc_in_ptr + n * state_n + at, mask=exists, other=0.0)
        if HAS_GATES:
            kept = gates_ptr + n * gates_n + t * gates_t + pixel * (4 * C) + ch
            i = tl.load(kept, mask=exists, other=0.0).to(tl.float32)
            f = tl.load(kept + C, mask=exists, other=0.0).to(tl.float32)
            g = tl.load(kept + 2 * C, mask=exists, other=0.0).to(tl.float32)
            o = tl.load(kept + 3 * C, mask=exists, other=0.0).to(tl.float32)
            c = f * c_before + i * g
        else:
            z_i, z_f, z_g, z_o = step_gates(
                x_ptr + n * x_n + t * x_t, h_in_ptr + n * h_in_n + before * h_in_t, mask_ptr + n * state_n,
                (), (), w_x_ptr, w_h_ptr, bias_ptr, block, y, x, valid, ldw, H, W, HI, WI,
                C, CP, C_IN, CP_IN, KH, KW, KHX, KWX, SY, SX, PY, PX, DY, DX,
                HAS_STATE, HAS_BIAS, HAS_MASK, False, PRECISION, BM, BC, BK, BKX, STAGES,
            )  # fmt: skip
            i, f, g, o, c = cell_update(
                z_i, z_f, z_g, z_o, c_before, w_ci_ptr, w_cf_ptr, w_co_ptr, ch, pixel, exists,
                C, PEEPHOLE, HAS_STATE, ACT, FAST,
            )  # fmt: skip
        da_i, da_f, da_g, da_o, dc = cell_gradients(
            i, f, g, o, c_before, c, dh, dc, w_ci_ptr, w_cf_ptr, w_co_ptr, dpeephole_ptr, n * state_n * 3,
            ch, pixel, exists, C, PEEPHOLE, ACT, FAST,
        )  # fmt: skip
        tl.store(dc_ptr + n * state_n + at, dc, mask=exists)
        da = da_ptr + n * da_n + slot.to(tl.int64) * da_t + pixel * (4 * C) + ch
        store_gates(da, da_i, da_f, da_g, da_o, exists, C)
        if HAS_BIAS:
            channel = block * BC + tl.arange(0, BC)
            add_bias_sums(dbias_ptr + (n * tiles + tile) * (4 * C), da_i, da_f, da_g, da_o, channel, exists, C)
