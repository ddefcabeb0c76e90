"""Launches of the gradients over many steps: of the weights, and of the images."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from convlstm_fish.ops.triton_kernels.gradients import image_gradient, weight_gradients
from convlstm_fish.ops.triton_kernels.launch import cdiv, launch
from convlstm_fish.ops.triton_kernels.layer import Layer, can_shift, multiprocessors, pack_weight, tile_count
from convlstm_fish.ops.triton_kernels.tuning import Tile, choose_image, round_channels

# Programs that share the sum of a weight's gradient: as many as the larger GPUs run at a time. Each portion of it has
# sums of its own, up to megabytes, that have to be added up.
_PROGRAMS = 264


class WeightSums:
    """Gradients of W_hh, W_ih or both, added up chunk by chunk in portions that keep one order."""

    def __init__(self, layer: Layer, weight_hh: Tensor | None, weight_ih: Tensor | None) -> None:
        tile = layer.tiles.weight
        rows_h, rows_x = (
            0 if w is None else w.shape[2] * w.shape[3] * round_channels(w.shape[1]) for w in (weight_hh, weight_ih)
        )
        if not (rows_h and rows_x):  # the rows of one weight may be fewer than a program takes
            tile = tile._replace(rows=min(tile.rows, max(16, triton.next_power_of_2(rows_h + rows_x))))
        self.layer, self.tile, self.weight_hh, self.weight_ih = layer, tile, weight_hh, weight_ih
        self.blocks_h, self.blocks_x = cdiv(rows_h, tile.rows), cdiv(rows_x, tile.rows)
        blocks = self.blocks_h + self.blocks_x
        self.groups = 1 if weight_hh is not None and weight_ih is not None else blocks
        columns = 4 * layer.hidden
        self.column_blocks = cdiv(columns, tile.columns)
        self.tiles_per_image = tile_count(layer.size, tile.pixels, tile.patch)
        self.portions = max(1, min(self.tiles_per_image * layer.clips, _PROGRAMS // (self.groups * self.column_blocks)))
        device = layer.device
        self.sums = torch.empty(self.portions, blocks * tile.rows, columns, dtype=torch.float32, device=device)
        self.fresh = True

    def add(
        self, h: Tensor, h_t: int, with_h: bool, x: Tensor, factor: Tensor | None, da: Tensor, first: int,
        steps: int, lengths: Tensor | None,
    ) -> None:  # fmt: skip
        """Adds the steps first .. first + steps - 1, whose da lie at their number modulo da's second size.

        ``h`` holds the state of the step before, ``h_t`` numbers apart; without ``with_h`` step 0 has none.
        """
        if self.weight_ih is None and not with_h and first + steps == 1:
            return  # of the first step, before which there was nothing
        layer, tile = self.layer, self.tile
        items = self.tiles_per_image * layer.clips * steps
        args = (
            h, x if factor is None else factor, x, da, self.sums, lengths,
            first, layer.steps, da.shape[1], items, cdiv(items, self.portions), int(with_h),
            self.sums.shape[1], h.stride(0), h_t,
            x.stride(0), x.stride(1), da.stride(0), da.stride(1), 0 if factor is None else factor.stride(0),
        )  # fmt: skip
        constants = layer.constants() | {
            "steps": steps, "tiles": self.tiles_per_image, "COLUMNS": 4 * layer.hidden,
            "HAS_FACTOR": factor is not None, "HAS_LENGTHS": lengths is not None, "FRESH": self.fresh,
            "BLOCKS_H": self.blocks_h if self.groups == 1 else min(self.blocks_h, 1),
            "BLOCKS_X": self.blocks_x if self.groups == 1 else min(self.blocks_x, 1),
            "BM": tile.pixels, "BK": tile.rows, "BN": tile.columns, "TW": tile.patch, "STAGES": tile.stages,
        }  # fmt: skip
        del constants["ACT"], constants["FAST"]
        launch(weight_gradients, (self.groups, self.portions, self.column_blocks), args, constants, tile.warps)
        self.fresh = False

    def results(self) -> list[Tensor]:
        """The gradients of W_hh and W_ih, or of the one of them, in their own layout and dtype."""
        rows = torch.zeros_like(self.sums[0]) if self.fresh else self.sums.sum(0)
        cut = self.blocks_h * self.tile.rows
        parts = ((self.weight_hh, rows[:cut]), (self.weight_ih, rows[cut:]))
        return [self._unpack(weight, part) for weight, part in parts if weight is not None]

    def _unpack(self, weight: Tensor, rows: Tensor) -> Tensor:
        _, channels, height, width = weight.shape
        rounded = round_channels(channels)
        rows = rows[: height * width * rounded].view(height, width, rounded, -1)
        gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
        return gradient.copy_(rows[:, :, :channels].permute(3, 2, 0, 1))


def _fill(layer: Layer, tile: Tile, size: tuple[int, int], channels: int, steps: int) -> Tile:
    """The tile cut smaller where there are clearly fewer of them than multiprocessors."""
    # Half the pixels leave room for twice as many rows at a time.
    rows = 128 if round_channels(4 * layer.hidden) % 128 == 0 and tile.channels >= 64 else tile.rows_back
    for change in ({"pixels": 64, "rows_back": rows}, {"channels": 64}, {"channels": 32}):
        tiles = tile_count(size, tile.pixels, tile.patch) * cdiv(channels, tile.channels)
        if 10 * tiles * layer.clips * steps >= 9 * multiprocessors(layer.device):
            break
        if change.get("channels", 0) < tile.channels:
            tile = tile._replace(**change)
    return tile


class ImageWeight(NamedTuple):
    """The weight of a convolution as :func:`write_image_gradient` takes it, packed for a tile."""

    packed: Tensor
    kernel: tuple[int, int]
    geometry: dict[str, int]
    tile: Tile


def image_weight(layer: Layer, weight: Tensor, tile: Tile | None, geometry: dict[str, int]) -> ImageWeight:
    """A layer's weight packed for a tile, or for the one that suits it."""
    tile = tile or choose_image(weight.shape[1], layer.hidden, layer.dtype)
    kernel = (weight.shape[2], weight.shape[3])
    if tile.halo and not can_shift(kernel, geometry):
        tile = tile._replace(halo=0, patch=0)
    packed = pack_weight(weight, layer, tile.rows_back, tile.channels, True, tile.halo > 0)
    return ImageWeight(packed, kernel, geometry, tile)


def write_image_gradient(
    layer: Layer, weight: ImageWeight, da: Tensor, out: Tensor, out_t: int, factor: Tensor | None, first: int,
    steps: int, lengths: Tensor | None,
) -> None:  # fmt: skip
    """Writes the gradient of the images of steps first .. first + steps - 1 into ``out``."""
    height, width, channels = out.shape[-3:]
    tile = weight.tile if weight.tile.halo else _fill(layer, weight.tile, (height, width), channels, steps)
    tiles = tile_count((height, width), tile.pixels, tile.patch, tile.halo)
    grid = (tiles * cdiv(channels, tile.channels), layer.clips, steps)
    args = (
        da, weight.packed, factor, out, lengths, first, layer.steps, da.shape[1], da.stride(0), da.stride(1),
        out.stride(0), out_t, 0 if factor is None else factor.stride(0),
    )  # fmt: skip
    constants = {
        "H": layer.size[0], "W": layer.size[1], "HI": height, "WI": width, "ldw": weight.packed.shape[1],
        "C": channels, "CP_GATES": round_channels(4 * layer.hidden), "GATES": 4 * layer.hidden,
        "KH": weight.kernel[0], "KW": weight.kernel[1], **weight.geometry, "HAS_FACTOR": factor is not None,
        "HAS_LENGTHS": lengths is not None, "REVERSE": layer.reverse, "PRECISION": layer.precision,
        "BM": tile.pixels, "BC": tile.channels, "BK": tile.rows_back, "TW": tile.patch, "HALO": tile.halo,
        "STAGES": tile.stages_back,
    }  # fmt: skip
    launch(image_gradient, grid, args, constants, tile.warps, tile.registers)
