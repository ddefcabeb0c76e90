"""Tile sizes, by channels, kernel and dtype, as measured on an H200 and an H100 (tests/benchmarks/tiles.py)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


def round_channels(channels: int) -> int:
    """Channels as the kernels lay out a weight's rows: a power of two, or a multiple of 16."""
    if channels > 8:
        return -(-channels // 16) * 16
    return 1 << (channels - 1).bit_length()


class Tile(NamedTuple):
    """How one kernel cuts its work.

    ``pixels`` in patches ``patch`` wide (0: runs of pixels), ``channels`` at a time, and so many rows of each weight at
    a time: of the recurrent one, the input's, and the adjoint's. ``stages`` 1 reads through the L1 cache, more copy
    ahead into shared memory; ``stages_back`` is the adjoint's. With a ``halo`` of 1 the adjoint shifts its sums
    instead of reading three taps. ``registers`` bounds those of a thread (0: the compiler's choice), so that more
    programs run side by side. With ``held``, so many programs a multiprocessor keep all of the forward step's
    weights in shared memory and go from tile to tile; it needs ``stages`` 1 and all ``channels`` at a time.
    """

    pixels: int
    channels: int
    rows: int
    rows_x: int = 16
    rows_back: int = 16
    patch: int = 0
    warps: int = 4
    stages: int = 1
    stages_back: int = 1
    halo: int = 0
    registers: int = 0
    held: int = 0


class WeightTile(NamedTuple):
    """How the weights' gradients are cut: pixels, columns (gates), rows at a time, and the rest as in Tile."""

    pixels: int
    columns: int
    rows: int
    patch: int = 0
    warps: int = 8
    stages: int = 1
    together: bool = True  # both weights' rows in one program


class Tiles(NamedTuple):
    """The tiles of every kernel of one layer, and whether the forward pass keeps the gates for the backward pass.

    From 64 hidden channels on, computing them again is arithmetic that costs more than their 8 bytes a channel.
    """

    forward: Tile
    backward: Tile
    image: Tile
    weight: WeightTile
    keep_gates: bool


# The weights of 16 channels that fit into shared memory five times, beside the pixels: 128 bytes a row.
_HELD_ROWS = 192


def _rows(channels: int, widest: int) -> int:
    """The most rows, up to ``widest``, that lie within one tap of so many (rounded) channels; 16 at least."""
    rows = widest
    while rows > 16 and channels % rows:
        rows //= 2
    return rows


@functools.cache
def choose_image(channels: int, hidden: int, dtype: torch.dtype) -> Tile:
    """The tile of the gradient of an image of so many channels."""
    rounded_gates = round_channels(4 * hidden)
    if dtype == torch.float32:
        return Tile(64, 16 if channels <= 16 else 32, 16, rows_back=_rows(rounded_gates, 32), stages_back=3)
    block = 16 if channels <= 16 else 32 if channels <= 32 else 64 if channels <= 64 else 128
    rows = _rows(rounded_gates, 64)
    if rounded_gates % 64 == 0 and channels <= 16:
        return Tile(128, block, 16, rows_back=32, patch=32, stages_back=3, halo=1)
    return Tile(128, block, 16, rows_back=rows, stages_back=3 if channels <= 32 or hidden <= 64 < channels else 4)


@functools.cache
def choose(channels: int, hidden: int, dtype: torch.dtype, weight_rows: int = 0) -> Tiles:
    """The tiles for ``channels`` -> ``hidden``, and weights of so many rows in all, taps times channels."""
    wide = dtype == torch.float32
    keep_gates = hidden >= 64
    image = choose_image(channels, hidden, dtype)
    rounded, rounded_x, rounded_gates = (round_channels(c) for c in (hidden, channels, 4 * hidden))
    if wide:
        block = 16 if hidden <= 16 else 32
        rows, rows_x, rows_back = _rows(rounded, 32), _rows(rounded_x, 32), _rows(rounded_gates, 32)
        step = Tile(64, block, rows, rows_x, rows_back, 0, 4, 3, 3)
        return Tiles(step, step, image, WeightTile(32, 64, 64, 0, 4, 2, False), keep_gates)
    rows, rows_x, rows_back = _rows(rounded, 64), _rows(rounded_x, 64), _rows(rounded_gates, 64)
    if hidden <= 16:
        forward = Tile(128, 16, rows, rows_x, rows_back, 0, 4, 1)
        if weight_rows <= _HELD_ROWS:
            forward = Tile(64, 16, rows, rows_x, rows_back, 0, 4, 1, registers=96, held=5)
        backward = Tile(64, 16, rows, rows_x, rows_back, 8, 4, 3, 3, registers=96)
    elif hidden <= 32:
        forward = Tile(128, 32, rows, rows_x, rows_back, 0, 8, 4)
        backward = Tile(64, 32, rows, min(rows_x * 2, 32), min(rows_back * 2, 128), 0, 4, 3, 3)
    elif hidden <= 64:
        forward = Tile(128, 64, min(rows, 32), min(rows_x, 32), rows_back, 0, 8, 5)
        backward = Tile(64, 64, rows, rows_x, rows_back, 0, 4, 3, 4)
    else:
        forward = Tile(128, 32, rows, rows_x, rows_back, 0, 4, 4)
        backward = Tile(64, 64, rows, rows_x, rows_back, 0, 4, 3, 4)
    if hidden <= 16 and channels <= 16:
        weight = WeightTile(32, 64, 64, 16, 4, 3, True)
    elif hidden <= 32:
        weight = WeightTile(64, 128, 64, 0, 4, 4, False)
    else:
        weight = WeightTile(64, 128, 128, 0, 4, 3, False)
    return Tiles(forward, backward, image, weight, keep_gates)
