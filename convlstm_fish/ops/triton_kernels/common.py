# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
"""What the Triton kernels share: pixel tiles, activations, and a convolution as a matrix product.

Everything lies channels last: images are (H, W, C) and a tile is BM pixels of one clip at one step. A convolution of
a tile is the product of its (BM, taps * channels) patches, never stored, with a (taps * channels, outputs) matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_pixels(tile, H: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, TW: tl.constexpr, HALO: tl.constexpr):
    """Rows and columns of a tile's pixels, and which of them are its own.

    A patch TW wide, or (TW = 0) a run of pixels. With a HALO of 1 the patch's first and last column are its
    neighbours'.
    """
    m = tl.arange(0, BM)
    if HALO > 0:
        own: tl.constexpr = TW - 2 * HALO
        across = (W + own - 1) // own
        y = (tile // across) * (BM // TW) + m // TW
        x = (tile % across) * own + m % TW - HALO
        valid = (y < H) & (x < W) & (m % TW >= HALO) & (m % TW < TW - HALO)
    elif TW == 0:
        p = tile * BM + m
        y = p // W
        x = p - y * W
        valid = p < H * W
    else:
        across = (W + TW - 1) // TW
        y = (tile // across) * (BM // TW) + m // TW
        x = (tile % across) * TW + m % TW
        valid = (y < H) & (x < W)
    return y, x, valid


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """tanh; FAST is the hardware's, good to 11 bits."""
    if FAST:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        small = tl.exp(-2.0 * tl.abs(x))
        y = (1.0 - small) / (1.0 + small)
        y = tl.where(x < 0, -y, y)
        square = x * x  # near 0, where 1 - small has lost its digits, the first terms of the series
        series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        y = tl.where(square < 0.01, series, y)
    return y


@triton.jit
def between(x, low: tl.constexpr, high: tl.constexpr):
    """x, but at least low and at most high; what is not a number stays so."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def recurrent_activation(z, ACT: tl.constexpr, FAST: tl.constexpr):
    """Value of the gates' activation: 0 sigmoid, 1 Keras 2's hard sigmoid, 2 Keras 3's."""
    if ACT == 0:
        y = 0.5 * tanh(0.5 * z, FAST) + 0.5 if FAST else 1.0 / (1.0 + tl.exp(-z))
    elif ACT == 1:
        y = between(0.2 * z + 0.5, 0.0, 1.0)
    else:
        y = between(z + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    return y


@triton.jit
def recurrent_slope(y, ACT: tl.constexpr):
    """Derivative of the gates' activation, from its value."""
    return y * (1.0 - y) if ACT == 0 else tl.where((y > 0.0) & (y < 1.0), 0.2 if ACT == 1 else 1.0 / 6.0, 0.0)


@triton.jit
def round_operand(a, PRECISION: tl.constexpr):
    """Rounds to the nearest TF32 number: the tensor cores would cut the bits off, which biases every product."""
    if PRECISION == "tf32":
        a = ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return a


@triton.jit
def patch_offsets(
    k0, y, x, valid, H: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    TRANSPOSED: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Offsets in an (H, W, C) image, and their mask, of columns k0 .. k0 + BK - 1 of the pixels' patches.

    Column ``tap * CP + channel``; CP >= C only rounds the channels up. TRANSPOSED walks the taps of the adjoint.
    """
    k = tl.arange(0, BK)
    if CP % BK == 0:  # one tap for the whole block: the geometry is one number a pixel
        tap = k0 // CP
        ch = (k0 - tap * CP + k)[None, :]
        ky = tap // KW
        kx = tap % KW
        row = y
        col = x
        seen = valid
    else:
        tap = ((k0 + k) // CP)[None, :]
        ch = ((k0 + k) % CP)[None, :]
        ky = tap // KW
        kx = tap % KW
        row = y[:, None]
        col = x[:, None]
        seen = valid[:, None] & (tap < KH * KW)
    if TRANSPOSED:
        row = row + PY - ky * DY
        col = col + PX - kx * DX
        if SY > 1:
            seen = seen & (row % SY == 0)
            row = row // SY
        if SX > 1:
            seen = seen & (col % SX == 0)
            col = col // SX
    else:
        row = row * SY - PY + ky * DY
        col = col * SX - PX + kx * DX
    seen = seen & (row.to(tl.uint32) < H) & (col.to(tl.uint32) < W)  # unsigned: below 0 is far above H
    pixel = (row * W + col) * C
    if CP % BK == 0:
        offsets = pixel[:, None] + ch
        mask = seen[:, None]
    else:
        offsets = pixel + ch
        mask = seen
    mask = mask & (ch < C) if C != CP else tl.broadcast_to(mask, offsets.shape)
    return offsets, mask


@triton.jit
def load_patches(
    k0, image, factor, y, x, valid, H: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_FACTOR: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns k0 .. k0 + BK - 1 of the pixels' patches of image [* factor], as an operand of a product."""
    offsets, mask = patch_offsets(k0, y, x, valid, H, W, C, CP, KH, KW, SY, SX, PY, PX, DY, DX, TRANSPOSED, BK)
    a = tl.load(image + offsets, mask=mask, other=0.0)
    if HAS_FACTOR:
        a = a * tl.load(factor + offsets, mask=mask, other=0.0)
    return round_operand(a, PRECISION)


@triton.jit
def split_parts(z, BM: tl.constexpr, BC: tl.constexpr):
    """The four (BM, BC) parts of a product whose columns :func:`pack_weights` ordered: the gates i, f, g, o.

    In that order one thread holds the four parts of a channel, so that nothing moves between threads here.
    """
    z = tl.permute(tl.reshape(z, (BM, 2, 2, BC)), (0, 3, 1, 2))
    even, odd = tl.split(z)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def hold_weight(weight, columns, ldw, BLOCKS: tl.constexpr, BK: tl.constexpr):
    """All blocks of BK rows of weight[:, columns], for a program that multiplies many tiles with them."""
    at = weight + tl.arange(0, BK)[:, None] * ldw + columns[None, :]
    blocks = ()
    for j in tl.static_range(BLOCKS):
        blocks = blocks + (tl.load(at + j * BK * ldw),)  # noqa: RUF005
    return blocks


@triton.jit
def load_operands(
    FIRST: tl.constexpr, COUNT: tl.constexpr, image, factor, held, at, ldw, y, x, valid,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_FACTOR: tl.constexpr, HELD: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks FIRST .. FIRST + COUNT - 1 of the patches and of the weight, as two tuples."""
    patches = ()
    weights = ()
    for j in tl.static_range(COUNT):
        a = load_patches(
            (FIRST + j) * BK, image, factor, y, x, valid, H, W, C, CP, KH, KW, SY, SX, PY, PX, DY, DX,
            TRANSPOSED, HAS_FACTOR, BK, PRECISION,
        )  # fmt: skip
        patches = patches + (a,)  # noqa: RUF005
        weights = weights + (held[FIRST + j] if HELD else tl.load(at + (FIRST + j) * BK * ldw),)  # noqa: RUF005
    return patches, weights


@triton.jit
def convolve(
    acc, BLOCKS: tl.constexpr, image, factor, held, weight, columns, ldw, y, x, valid,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_FACTOR: tl.constexpr, HELD: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + patches(image [* factor]) @ weight[:, columns], over BLOCKS blocks of BK rows.

    With STAGES > 1 the blocks are copied ahead into shared memory, past the L1 cache. With 1 the loop is unrolled, so
    that a tap's geometry is known when it is compiled, and the blocks come through the cache a few ahead in registers:
    better where few channels make the arithmetic of addresses, not the product, the work. HELD (with 1): the weight's
    blocks are at hand.
    """
    at = weight + tl.arange(0, BK)[:, None] * ldw + columns[None, :]
    if STAGES == 1:
        AHEAD: tl.constexpr = 3
        a, b = load_operands(
            0, min(AHEAD, BLOCKS), image, factor, held, at, ldw, y, x, valid, H, W, C, CP, KH, KW, SY, SX, PY, PX,
            DY, DX, TRANSPOSED, HAS_FACTOR, HELD, BK, PRECISION,
        )  # fmt: skip
        for first in tl.static_range(0, BLOCKS, AHEAD):
            a_next, b_next = load_operands(
                first + AHEAD, max(0, min(AHEAD, BLOCKS - first - AHEAD)), image, factor, held, at, ldw, y, x, valid,
                H, W, C, CP, KH, KW, SY, SX, PY, PX, DY, DX, TRANSPOSED, HAS_FACTOR, HELD, BK, PRECISION,
            )  # fmt: skip
            for j in tl.static_range(min(AHEAD, BLOCKS - first)):
                acc = tl.dot(a[j], b[j], acc, input_precision=PRECISION)
            a = a_next
            b = b_next
    else:
        tl.static_assert(not HELD)
        for kb in tl.range(0, BLOCKS, num_stages=STAGES):
            a = load_patches(
                kb * BK, image, factor, y, x, valid, H, W, C, CP, KH, KW, SY, SX, PY, PX, DY, DX,
                TRANSPOSED, HAS_FACTOR, BK, PRECISION,
            )  # fmt: skip
            acc = tl.dot(a, tl.load(at + kb * BK * ldw), acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_row(
    block, image, y, col, inside, H: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, PY: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Block ``block`` of BK channels, counted over the rows of taps, of the pixels' column of the image."""
    per_tap: tl.constexpr = CP // BK
    row = y + PY - block // per_tap
    ch = (block % per_tap) * BK + tl.arange(0, BK)
    mask = (inside & (row.to(tl.uint32) < H))[:, None]
    mask = mask & (ch < C)[None, :] if C != CP else tl.broadcast_to(mask, (mask.shape[0], BK))
    a = tl.load(image + ((row * W + col) * C)[:, None] + ch[None, :], mask=mask, other=0.0)
    return round_operand(a, PRECISION)


@triton.jit
def convolve_adjoint_3(
    image, weight, columns, ldw, y, x, H: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, KH: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The adjoint of a convolution of stride 1 whose kernel is 3 wide, on a tile with a halo of 1.

    Each row of pixels is read once for its three taps, which lie side by side in the weight's columns (and a fourth
    of zeros), and their sums are then shifted by a pixel: a third of the reads, which is what the time goes into where
    the image has four times the channels of the result.
    """
    BLOCKS: tl.constexpr = KH * CP // BK
    at = weight + tl.arange(0, BK)[:, None] * ldw + columns[None, :]
    col = x + PX - 1
    inside = col.to(tl.uint32) < W
    acc = tl.zeros((BM, 4 * BN), dtype=tl.float32)
    if STAGES == 1:
        a = load_row(0, image, y, col, inside, H, W, C, CP, PY, BK, PRECISION)
        for kb in tl.static_range(BLOCKS):
            a_next = load_row(min(kb + 1, BLOCKS - 1), image, y, col, inside, H, W, C, CP, PY, BK, PRECISION)
            acc = tl.dot(a, tl.load(at + kb * BK * ldw), acc, input_precision=PRECISION)
            a = a_next
    else:
        for kb in tl.range(0, BLOCKS, num_stages=STAGES):
            a = load_row(kb, image, y, col, inside, H, W, C, CP, PY, BK, PRECISION)
            acc = tl.dot(a, tl.load(at + kb * BK * ldw), acc, input_precision=PRECISION)
    left, middle, right, _ = split_parts(acc, BM, BN)
    m = tl.arange(0, BM)[:, None]
    after = tl.broadcast_to(tl.minimum(m + 1, BM - 1), (BM, BN))
    before = tl.broadcast_to(tl.maximum(m - 1, 0), (BM, BN))
    return middle + tl.gather(left, after, 0) + tl.gather(right, before, 0)


@triton.jit
def pack_weights(
    source, target, ldw, C, C_IN, CP, TAPS, total,
    BC: tl.constexpr, TRANSPOSED: tl.constexpr, SIDE_BY_SIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A (4 * C, C_IN, TAPS) weight as the matrix that :func:`convolve` multiplies with, zero where it rounds up.

    Forward, row ``tap * CP + input channel`` and, in each block of 4 * BC columns, the gates i, f, g, o of a channel
    where :func:`split_parts` looks for them. TRANSPOSED, row ``tap * CP + gate row`` and column input channel; and
    SIDE_BY_SIDE, for :func:`convolve_adjoint_3`, row ``row of taps * CP + gate row`` and the row's three taps where the
    gates lie otherwise.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = at // ldw
    n = at % ldw
    tap = k // CP
    r = n % (4 * BC)
    channel = (n // (4 * BC)) * BC + r % BC
    if TRANSPOSED:
        gate_row = k % CP
        c_in = n
        exists = gate_row < 4 * C
        if SIDE_BY_SIDE:
            c_in = channel
            exists = exists & (r // BC < 3)
            tap = tap * 3 + r // BC
    else:
        c_in = k % CP
        gate_row = (r // BC) * C + channel
        exists = channel < C
    exists = exists & (c_in < C_IN) & (tap < TAPS) & (at < total)
    value = tl.load(source + (gate_row * C_IN + c_in) * TAPS + tap, mask=exists, other=0.0)
    tl.store(target + at, round_operand(value.to(target.dtype.element_ty), PRECISION), mask=at < total)
