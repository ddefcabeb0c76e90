# mypy: allow-untyped-defs
"""What a step does besides its convolutions, in one launch: forward, and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from convlstm_fish.ops.triton_kernels.common import convolve, split_parts, tanh
from convlstm_fish.ops.triton_kernels.steps import add_bias_sums, cell_gradients, cell_update, store_gates


@triton.jit
def load_gates(ptr, at, exists, C: tl.constexpr):
    """Four numbers a channel, in the order i, f, g, o."""
    z_i = tl.load(ptr + at, mask=exists, other=0.0).to(tl.float32)
    z_f = tl.load(ptr + at + C, mask=exists, other=0.0).to(tl.float32)
    z_g = tl.load(ptr + at + 2 * C, mask=exists, other=0.0).to(tl.float32)
    z_o = tl.load(ptr + at + 3 * C, mask=exists, other=0.0).to(tl.float32)
    return z_i, z_f, z_g, z_o


@triton.jit
def add_bias(z_i, z_f, z_g, z_o, bias_ptr, ch, C: tl.constexpr):
    """The four gates before activation with their bias."""
    z_i += tl.load(bias_ptr + ch, mask=ch < C, other=0.0)
    z_f += tl.load(bias_ptr + C + ch, mask=ch < C, other=0.0)
    z_g += tl.load(bias_ptr + 2 * C + ch, mask=ch < C, other=0.0)
    z_o += tl.load(bias_ptr + 3 * C + ch, mask=ch < C, other=0.0)
    return z_i, z_f, z_g, z_o


@triton.jit
def update_state(
    z_ptr, x_ptr, w_x_ptr, bias_ptr, c_in_ptr, c_out_ptr, c_save_ptr, h_out_ptr, h_next_ptr,
    w_ci_ptr, w_cf_ptr, w_co_ptr, z_n, x_n, state_n, c_save_n, h_out_n, h_next_n,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, NEXT: tl.constexpr, ACT: tl.constexpr,
    FAST: tl.constexpr, PEEPHOLE: tl.constexpr, HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
    SAVE_C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    HAS_X: tl.constexpr, SAVE_Z: tl.constexpr, HI: tl.constexpr, WI: tl.constexpr, C_IN: tl.constexpr,
    CP_IN: tl.constexpr, KHX: tl.constexpr, KWX: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, ldw: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """h_t and c_t from the convolutions' sum and c_{t-1}.

    Grid: (tiles * channel blocks, clips). h goes to ``h_out``, whose pixels lie OUT numbers apart, and to ``h_next``
    with NEXT, where these are not 0. With HAS_X, z holds the recurrent convolution, or without HAS_Z nothing, and the
    input's is added here: DIRECT, product by product, of weights (KHX, KWX, C_IN, 4 * C), else by the tensor cores.
    """
    blocks: tl.constexpr = (C + BC - 1) // BC
    block = tl.program_id(0) % blocks
    n = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    pixel = run[:, None]
    ch = (block * BC + tl.arange(0, BC))[None, :]
    exists = (pixel < H * W) & (ch < C)
    at = pixel * C + ch
    c = tl.zeros((BM, BC), dtype=tl.float32)
    if HAS_STATE:
        c = tl.load(c_in_ptr + n * state_n + at, mask=exists, other=0.0)
    z_i = tl.zeros((BM, BC), dtype=tl.float32)
    z_f = z_i
    z_g = z_i
    z_o = z_i
    kept = z_ptr + n * z_n
    gates_at = pixel * (4 * C) + ch
    if HAS_Z:
        z_i, z_f, z_g, z_o = load_gates(kept, gates_at, exists, C)
    if HAS_X and DIRECT:
        for ky in tl.static_range(KHX):
            for kx in tl.static_range(KWX):
                y_in = run // W * SY + ky * DY - PY
                x_in = run % W * SX + kx * DX - PX
                inside = (run < H * W) & (y_in >= 0) & (y_in < HI) & (x_in >= 0) & (x_in < WI)
                source = x_ptr + n * x_n + (y_in * WI + x_in) * C_IN
                for k in tl.static_range(C_IN):
                    value = tl.load(source + k, mask=inside, other=0.0).to(tl.float32)[:, None]
                    w_i, w_f, w_g, w_o = load_gates(w_x_ptr, ((ky * KWX + kx) * C_IN + k) * (4 * C) + ch, ch < C, C)
                    z_i += value * w_i
                    z_f += value * w_f
                    z_g += value * w_g
                    z_o += value * w_o
    elif HAS_X:
        acc = tl.zeros((BM, 4 * BC), dtype=tl.float32)
        columns = block * (4 * BC) + tl.arange(0, 4 * BC)
        acc = convolve(
            acc, (KHX * KWX * CP_IN + BK - 1) // BK, x_ptr + n * x_n, x_ptr, (), w_x_ptr, columns, ldw, run // W,
            run % W, run < H * W, HI, WI, C_IN, CP_IN, KHX, KWX, SY, SX, PY, PX, DY, DX, False, False, False, BK, 1,
            PRECISION,
        )  # fmt: skip
        a_i, a_f, a_g, a_o = split_parts(acc, BM, BC)
        z_i += a_i
        z_f += a_f
        z_g += a_g
        z_o += a_o
    if HAS_X and SAVE_Z:
        store_gates(kept + gates_at, z_i, z_f, z_g, z_o, exists, C)
    if HAS_BIAS:
        z_i, z_f, z_g, z_o = add_bias(z_i, z_f, z_g, z_o, bias_ptr, ch, C)
    _, _, _, o, c = cell_update(
        z_i, z_f, z_g, z_o, c, w_ci_ptr, w_cf_ptr, w_co_ptr, ch, pixel, exists, C, PEEPHOLE, HAS_STATE, ACT, FAST
    )
    tl.store(c_out_ptr + n * state_n + at, c, mask=exists)
    if SAVE_C:
        tl.store(c_save_ptr + n * c_save_n + at, c.to(c_save_ptr.dtype.element_ty), mask=exists)
    h = o * tanh(c, FAST)
    if OUT > 0:
        tl.store(h_out_ptr + n * h_out_n + pixel * OUT + ch, h.to(h_out_ptr.dtype.element_ty), mask=exists)
    if NEXT > 0:
        tl.store(h_next_ptr + n * h_next_n + pixel * NEXT + ch, h.to(h_next_ptr.dtype.element_ty), mask=exists)


@triton.jit
def update_gradients(
    z_ptr, bias_ptr, c_in_ptr, dout_ptr, dfed_ptr, dh_ptr, dc_in_ptr, dc_ptr, da_ptr, dpeephole_ptr, dbias_ptr,
    w_ci_ptr, w_cf_ptr, w_co_ptr, z_n, c_in_n, dout_n, dfed_n, dh_n, state_n,
    parts: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, DOUT: tl.constexpr, DFED: tl.constexpr,
    DH: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr, PEEPHOLE: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates before activation, and of c_{t-1}, from those of h_t (up to three terms) and c_t.

    Grid: (parts * channel blocks, clips). The pixels of ``dout`` lie DOUT numbers apart, those of the other terms DFED
    and DH, 0 where there is none. A part is ROUNDS tiles, whose numbers a thread adds up for the bias before threads
    add theirs.
    """
    blocks: tl.constexpr = (C + BC - 1) // BC
    part = tl.program_id(0) // blocks
    n = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    ch = channel[None, :]
    b_i = tl.zeros((BM, BC), dtype=tl.float32)
    b_f = tl.zeros((BM, BC), dtype=tl.float32)
    b_g = tl.zeros((BM, BC), dtype=tl.float32)
    b_o = tl.zeros((BM, BC), dtype=tl.float32)
    for k in tl.range(0, ROUNDS, num_stages=1):
        pixel = ((part * ROUNDS + k) * BM + tl.arange(0, BM))[:, None]
        exists = (pixel < H * W) & (ch < C)
        at = pixel * C + ch
        dh = tl.zeros((BM, BC), dtype=tl.float32)
        if DH > 0:
            dh += tl.load(dh_ptr + n * dh_n + pixel * DH + ch, mask=exists, other=0.0)
        if DOUT > 0:
            dh += tl.load(dout_ptr + n * dout_n + pixel * DOUT + ch, mask=exists, other=0.0)
        if DFED > 0:
            dh += tl.load(dfed_ptr + n * dfed_n + pixel * DFED + ch, mask=exists, other=0.0)
        dc = tl.zeros((BM, BC), dtype=tl.float32)
        if HAS_DC:
            dc = tl.load(dc_in_ptr + n * state_n + at, mask=exists, other=0.0)
        c_before = tl.zeros((BM, BC), dtype=tl.float32)
        if HAS_STATE:
            c_before = tl.load(c_in_ptr + n * c_in_n + at, mask=exists, other=0.0).to(tl.float32)
        z_i, z_f, z_g, z_o = load_gates(z_ptr + n * z_n, pixel * (4 * C) + ch, exists, C)
        if HAS_BIAS:
            z_i, z_f, z_g, z_o = add_bias(z_i, z_f, z_g, z_o, bias_ptr, ch, C)
        i, f, g, o, c = cell_update(
            z_i, z_f, z_g, z_o, c_before, w_ci_ptr, w_cf_ptr, w_co_ptr, ch, pixel, exists, C, PEEPHOLE, HAS_STATE, ACT,
            FAST,
        )  # fmt: skip
        da_i, da_f, da_g, da_o, dc = cell_gradients(
            i, f, g, o, c_before, c, dh, dc, w_ci_ptr, w_cf_ptr, w_co_ptr, dpeephole_ptr, n * state_n * 3,
            ch, pixel, exists, C, PEEPHOLE, ACT, FAST,
        )  # fmt: skip
        tl.store(dc_ptr + n * state_n + at, dc, mask=exists)
        store_gates(da_ptr + n * (4 * state_n) + pixel * (4 * C) + ch, da_i, da_f, da_g, da_o, exists, C)
        if HAS_BIAS:
            b_i += tl.where(exists, da_i, 0.0)
            b_f += tl.where(exists, da_f, 0.0)
            b_g += tl.where(exists, da_g, 0.0)
            b_o += tl.where(exists, da_o, 0.0)
    if HAS_BIAS:
        sums = dbias_ptr + (n * parts + part) * (4 * C)
        add_bias_sums(sums, b_i, b_f, b_g, b_o, channel, channel[None, :] < C, C)


@triton.jit
def copy_pixels(
    source_ptr, target_ptr, source_n, source_t, target_n, target_t, FROM: tl.constexpr, TO: tl.constexpr,
    PIXELS: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The C channels of pixels that lie FROM numbers apart to where they lie TO apart. Grid: (tiles, clips, steps)."""
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64)
    pixel = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    ch = tl.arange(0, BC)[None, :]
    exists = (pixel < PIXELS) & (ch < C)
    value = tl.load(source_ptr + n * source_n + t * source_t + pixel * FROM + ch, mask=exists)
    tl.store(target_ptr + n * target_n + t * target_t + pixel * TO + ch, value, mask=exists)
