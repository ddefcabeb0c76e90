"""The equations that every plain PyTorch path shares: activations, convolutions, norms, gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_fish.ops.geometry import Geometry, compute_dtype, same_padding, state_dtype

State = tuple[Tensor, Tensor]
Peephole = tuple[Tensor, Tensor, Tensor]

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def hard_sigmoid(x: Tensor) -> Tensor:
    """Keras 2's hard sigmoid, clip(0.2 x + 0.5, 0, 1)."""
    return torch.clamp(0.2 * x + 0.5, 0.0, 1.0)


def hard_sigmoid_v3(x: Tensor) -> Tensor:
    """Keras 3's hard sigmoid, relu6(x + 3) / 6."""
    return F.relu6(x + 3.0) / 6.0


RECURRENT_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": hard_sigmoid,
    "hard_sigmoid_v3": hard_sigmoid_v3,
}


class Norm(NamedTuple):
    """Layer or group normalisation inside the cell (Ba et al. 2016, arXiv:1607.06450, eq. 20 to 22).

    The two convolutions are normalised apart, each with its gain, before the bias is added; c is normalised on its way
    to h. Statistics are of one clip at one step, over the channels of a group and all pixels.
    """

    groups: int  # of the 4 * C_h channels of the gates
    groups_c: int  # of the C_h channels of c
    weight_ih: Tensor  # (4 * C_h,)
    weight_hh: Tensor  # (4 * C_h,)
    weight_c: Tensor  # (C_h,)
    bias_c: Tensor  # (C_h,)
    eps: float = 1e-5

    def to(self, dtype: torch.dtype) -> Norm:
        """The same with tensors of ``dtype``."""
        ih, hh, c, c_bias = (t.to(dtype) for t in (self.weight_ih, self.weight_hh, self.weight_c, self.bias_c))
        return Norm(self.groups, self.groups_c, ih, hh, c, c_bias, self.eps)


class Weights(NamedTuple):
    """The tensors of a call that are the same at every step, already in their compute dtypes."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    peephole: Peephole | None
    norm: Norm | None
    mask: Tensor | None


def first_state(input: Tensor, hx: State | None, hidden: int, where: Geometry) -> State:
    """(h_0, c_0) in their dtypes, zeros without ``hx``; input (N, T, C, *spatial)."""
    dtype = compute_dtype(input)
    if hx is not None:
        return hx[0].to(dtype), hx[1].to(state_dtype(dtype))
    h_0 = input.new_zeros(input.shape[0], hidden, *where.out, dtype=dtype)
    return h_0, h_0.to(state_dtype(dtype))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """A convolution whose padding may differ before and after."""
    if any(before != after for before, after in pads):
        x = F.pad(x, [p for pair in reversed(pads) for p in pair])
        pads = [(0, 0)] * len(pads)
    return _CONVOLUTIONS[len(pads)](
        x, weight, bias, stride=stride, padding=[before for before, _ in pads], dilation=dilation
    )


def recurrent_pads(weight_hh: Tensor) -> list[tuple[int, int]]:
    """The padding with which the recurrent convolution keeps the size: the extra row of an even kernel at the end."""
    return [same_padding(0, k, 1, 1) for k in weight_hh.shape[2:]]


def recurrent_convolve(h: Tensor, weight_hh: Tensor) -> Tensor:
    """The recurrent convolution: stride 1, size kept."""
    ones = (1,) * (weight_hh.dim() - 2)
    return convolve(h, weight_hh, None, ones, recurrent_pads(weight_hh), ones)


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """(C,) shaped to be added to (N, C, *spatial)."""
    return vector.view(-1, *[1] * (like.dim() - 2))


def input_part(frames: Tensor, w: Weights, where: Geometry) -> Tensor:
    """W_x * x + b of many frames at once, (frames, 4 * C_h, *out)."""
    if w.norm is None:
        return convolve(frames, w.weight_ih, w.bias, where.stride, where.pads, where.dilation)
    y = convolve(frames, w.weight_ih, None, where.stride, where.pads, where.dilation)
    y = F.group_norm(y.to(w.norm.weight_ih.dtype), w.norm.groups, w.norm.weight_ih, None, w.norm.eps)
    return y if w.bias is None else y + per_channel(w.bias, y)


def recurrent_part(h: Tensor, w: Weights) -> Tensor:
    """W_h * h of one or many states."""
    y = recurrent_convolve(h, w.weight_hh)
    if w.norm is None:
        return y
    return F.group_norm(y.to(w.norm.weight_hh.dtype), w.norm.groups, w.norm.weight_hh, None, w.norm.eps)


def gates(
    z: Tensor, c: Tensor, peephole: Peephole | None, activation: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gates i, f, g, o and the next c, from the sum ``z`` of the two convolutions and the bias.

    Shi et al. 2015 (arXiv:1506.04214), eq. 3: i and f see c_{t-1} through their peepholes, o sees c_t.
    """
    z_i, z_f, z_g, z_o = z.chunk(4, dim=1)
    if peephole is not None:
        z_i = z_i + peephole[0] * c
        z_f = z_f + peephole[1] * c
    i, f, g = activation(z_i), activation(z_f), torch.tanh(z_g)
    c = f * c + i * g
    if peephole is not None:
        z_o = z_o + peephole[2] * c
    return i, f, g, activation(z_o), c


def squash(c: Tensor, norm: Norm | None) -> Tensor:
    """tanh(c), which the output gate lets through; tanh(norm(c)) with normalisation."""
    if norm is not None:
        c = F.group_norm(c, norm.groups_c, norm.weight_c, norm.bias_c, norm.eps)
    return torch.tanh(c)
