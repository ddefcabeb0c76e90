"""The weights as the kernels read them."""

from __future__ import annotations

import functools
from functools import cached_property

import torch
from torch import Tensor

from convlstm_fish.ops.hopper_kernels.compiled import aligned
from convlstm_fish.ops.hopper_kernels.plan import Shape


def _order(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column at each place of a matrix in the 8 x 16 byte matrices that a product reads."""
    at = torch.arange(rows * columns)
    step, rest = at // (16 * columns), at % (16 * columns)
    row = step * 16 + rest // (8 * columns) * 8 + rest % 8
    column = rest % (8 * columns) // 64 * 8 + rest % 64 // 8
    return row, column


def _channel(column: Tensor) -> Tensor:
    """The channel of a column: such that each thread holds 4 neighbouring ones of 16."""
    return column // 16 * 16 + column % 8 // 2 * 4 + column % 16 // 8 * 2 + column % 2


def _flat(gate_row: Tensor, channel: Tensor, tap: Tensor, channels: int) -> Tensor:
    """The place in a flattened (4 * C_h, channels, 3, 3) weight."""
    return (gate_row * channels + channel) * 9 + tap


@functools.cache
def _forward_index(shape: Shape, device: torch.device) -> Tensor:
    """Where each number of the forward matrix lies in W_ih, W_hh and a zero, flattened one after the other."""
    row, column = _order(shape.rows, shape.gates)
    # The gates of 16 channels at a time.
    gate_row = column % 64 // 16 * shape.hidden + column // 64 * 16 + _channel(column % 16)
    cut = shape.steps_x * 16
    many = shape.gates * shape.channels * 9
    zero = many + shape.gates * shape.hidden * 9
    if shape.channels == 4:
        tap_x = row // 16 * 3 + row % 16 // 4
        of_x = torch.where(row % 16 < 12, _flat(gate_row, row % 4, tap_x, 4), zero)
    else:
        of_x = _flat(gate_row, row % shape.channels, row // shape.channels, shape.channels)
    of_h = many + _flat(gate_row, (row - cut) % shape.hidden, (row - cut) // shape.hidden, shape.hidden)
    return torch.where(row < cut, of_x, of_h).to(device)


@functools.cache
def _adjoint_index(shape: Shape, with_x: bool, device: torch.device) -> Tensor:
    """The same of the adjoint matrix: a column a channel of h, then of x."""
    row, column = _order(9 * shape.gates, shape.hidden + shape.columns_x * with_x)
    channel = _channel(column)
    gate_row, tap = row % shape.gates, 8 - row // shape.gates
    many = shape.gates * shape.channels * 9
    of_h = many + _flat(gate_row, channel, tap, shape.hidden)
    of_x = _flat(gate_row, channel - shape.hidden, tap, shape.channels)
    of_x = torch.where(channel - shape.hidden < shape.channels, of_x, many + shape.gates * shape.hidden * 9)
    return torch.where(channel < shape.hidden, of_h, of_x).to(device)


class Parameters:
    """The parameters of a layer; each matrix is made when it is first asked for.

    Args:
        shape: of the layer.
        dtype: of the kernels' operands.
        weight_ih: (4 * C_h, C, 3, 3).
        weight_hh: (4 * C_h, C_h, 3, 3).
        bias: (4 * C_h,) or None.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None
    ) -> None:
        self.device = weight_ih.device
        # The channels alone decide where a number goes: one index serves frames of every size.
        self._layout = Shape(shape.channels, shape.hidden, (0, 0), (0, 0), (0, 0), 0, False, False, False)
        self.bias = None if bias is None else aligned(bias.detach().float().contiguous())
        parts = [weight_ih.detach().flatten(), weight_hh.detach().flatten(), weight_ih.new_zeros(1)]
        self._flat = torch.cat([part.to(dtype) for part in parts])

    @cached_property
    def forward(self) -> Tensor:
        """Both weights for the gates."""
        return self._flat[_forward_index(self._layout, self.device)]

    @cached_property
    def adjoint(self) -> Tensor:
        """W_hh for the gradient of h."""
        return self._flat[_adjoint_index(self._layout, False, self.device)]

    @cached_property
    def adjoint_both(self) -> Tensor:
        """Both for the gradients of h and x."""
        return self._flat[_adjoint_index(self._layout, True, self.device)]
