"""What the launches of one call share: its sizes and options, and the weights as the kernels read them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from convlstm_fish.ops.geometry import same_padding
from convlstm_fish.ops.triton_kernels import tuning
from convlstm_fish.ops.triton_kernels.common import pack_weights
from convlstm_fish.ops.triton_kernels.launch import cdiv, launch
from convlstm_fish.ops.triton_kernels.tuning import round_channels


class Layer(NamedTuple):
    """Sizes and options of one call, from the tensors and plain arguments of the operators."""

    clips: int
    steps: int
    channels: int
    hidden: int
    size_in: tuple[int, int]
    size: tuple[int, int]
    kernel: tuple[int, int]
    kernel_x: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    activation: int
    tf32: bool
    reverse: bool

    @property
    def tiles(self) -> tuning.Tiles:
        rows = math.prod(self.kernel) * self.hidden + math.prod(self.kernel_x) * self.channels
        return tuning.choose(self.channels, self.hidden, self.dtype, rows)

    @property
    def fast(self) -> bool:
        """The hardware's tanh is good to 11 bits: enough for bfloat16 alone."""
        return self.dtype == torch.bfloat16 and not triton.knobs.runtime.interpret

    def constants(self) -> dict[str, Any]:
        """What the kernels of one step know when they are compiled."""
        return {
            "H": self.size[0],
            "W": self.size[1],
            "HI": self.size_in[0],
            "WI": self.size_in[1],
            "C": self.hidden,
            "CP": round_channels(self.hidden),
            "C_IN": self.channels,
            "CP_IN": round_channels(self.channels),
            "KH": self.kernel[0],
            "KW": self.kernel[1],
            "KHX": self.kernel_x[0],
            "KWX": self.kernel_x[1],
            **self.convolution(),
            "ACT": self.activation,
            "FAST": self.fast,
            "PRECISION": self.precision,
            "REVERSE": self.reverse,
        }

    def convolution(self) -> dict[str, int]:
        """The geometry of the input convolution."""
        return {
            "SY": self.stride[0], "SX": self.stride[1], "PY": self.pads[0], "PX": self.pads[1],
            "DY": self.dilation[0], "DX": self.dilation[1],
        }  # fmt: skip

    def recurrence(self) -> dict[str, int]:
        """The geometry of the recurrent convolution."""
        before = [same_padding(0, k, 1, 1)[0] for k in self.kernel]
        return {"SY": 1, "SX": 1, "PY": before[0], "PX": before[1], "DY": 1, "DX": 1}

    @property
    def alike(self) -> bool:
        """Whether both convolutions look at the same pixels."""
        same = self.kernel == self.kernel_x and self.size == self.size_in
        return same and self.convolution() == self.recurrence()

    @property
    def halo(self) -> int:
        """Of the backward step's tiles."""
        return self.tiles.backward.halo if can_shift(self.kernel, self.recurrence()) else 0

    @property
    def tiles_per_image(self) -> int:
        """Of the backward step."""
        tile = self.tiles.backward
        return tile_count(self.size, tile.pixels, tile.patch, self.halo)

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 and self.dtype == torch.float32 else "ieee"


def make_layer(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, size: Sequence[int], stride: Sequence[int],
    pads: Sequence[int], dilation: Sequence[int], activation: int, tf32: bool, reverse: bool,
) -> Layer:  # fmt: skip
    clips, steps, height, width, channels = x.shape
    hidden = weight_hh.shape[1]
    pair = lambda values: (int(values[0]), int(values[1]))  # noqa: E731
    return Layer(
        clips, steps, channels, hidden, (height, width), pair(size), pair(weight_hh.shape[2:]),
        pair(weight_ih.shape[2:]), pair(stride), pair(pads), pair(dilation), x.dtype, x.device,
        activation, tf32, reverse,
    )  # fmt: skip


def tile_count(size: tuple[int, int], pixels: int, patch: int, halo: int = 0) -> int:
    if patch == 0:
        return cdiv(size[0] * size[1], pixels)
    return cdiv(size[0], pixels // patch) * cdiv(size[1], patch - 2 * halo)


def pack_weight(
    weight: Tensor, layer: Layer, rows: int, block: int, transposed: bool, side_by_side: bool = False
) -> Tensor:
    """The weight (or bias) as the matrix that a kernel reads ``rows`` rows and ``block`` channels at a time.

    ``transposed`` for the adjoint; with the three taps of a row ``side_by_side`` for one that shifts.
    """
    weight = weight.detach().contiguous()
    gates, inputs = weight.shape[0], weight.shape[1] if weight.dim() > 1 else 1
    taps = all_taps = weight[0].numel() // inputs
    channels = round_channels(gates if transposed else inputs) if weight.dim() > 1 else 1
    columns = cdiv(inputs if transposed else gates // 4, block) * block
    if side_by_side:
        taps //= 3
    if side_by_side or not transposed:
        columns *= 4
    height = cdiv(taps * channels, rows) * rows
    dtype = layer.dtype if weight.dim() > 1 else torch.float32
    packed = torch.empty(height, columns, dtype=dtype, device=weight.device)
    grid = (cdiv(packed.numel(), 1024),)
    args = (weight, packed, columns, gates // 4, inputs, channels, all_taps, packed.numel())
    constants = {
        "BC": block, "TRANSPOSED": transposed, "SIDE_BY_SIDE": side_by_side,
        "PRECISION": layer.precision if weight.dim() > 1 else "ieee", "BLOCK": 1024,
    }  # fmt: skip
    launch(pack_weights, grid, args, constants, num_warps=4)
    return packed


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere, where the kernels are interpreted, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gates that are kept: they lie within 1, where float16 is the finer of the two 16-bit formats."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def peephole_kind(weight: Tensor | None) -> int:
    return 0 if weight is None else 1 if weight.dim() == 1 else 2


def can_shift(kernel: tuple[int, int], geometry: dict[str, int]) -> bool:
    """Whether :func:`convolve_adjoint_3` covers a convolution."""
    return kernel[1] == 3 and all(geometry[key] == 1 for key in ("SY", "SX", "DY", "DX"))
