"""Sizes, paddings and dtypes of a call: one set of rules for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Padding = str | int | Sequence[int]


# Asked once: torch.compile of torch 2.11 cannot look into the question.
_WITH_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(device)
)


class Geometry(NamedTuple):
    """What the input convolution does, one entry per spatial dimension.

    ``pads`` holds (before, after); ``out`` is the size of the hidden state.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    out: tuple[int, ...]


def per_dim(name: str, value: int | Sequence[int], dims: int, minimum: int) -> tuple[int, ...]:
    """``value`` as one int per spatial dimension, each at least ``minimum``.

    Raises:
        ValueError: wrong count or too small a value, named.
    """
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or not all(isinstance(v, int) and v >= minimum for v in values):
        raise ValueError(f"{name} must be an int >= {minimum} or {dims} of them, got {value!r}")
    return values


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Padding (before, after) with which the output has ceil(size / stride) rows, as TensorFlow pads.

    The odd row of an uneven padding goes to the end.
    """
    extent = dilation * (kernel - 1) + 1
    # With stride 1 the size cancels out, and an exported graph keeps it free.
    total = extent - 1 if stride == 1 else max((-(-size // stride) - 1) * stride + extent - size, 0)
    return total // 2, total - total // 2


def geometry(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = "same",
    dilation: int | Sequence[int] = 1,
) -> Geometry:
    """Stride, dilation, padding and output size of the input convolution on frames of ``sizes``.

    Raises:
        ValueError: a value that is none of the documented ones, or frames smaller than the kernel.
    """
    dims = len(sizes)
    stride = per_dim("stride", stride, dims, 1)
    dilation = per_dim("dilation", dilation, dims, 1)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'padding must be "same", "valid" or ints, got {padding!r}')
        if padding == "same":
            pads = tuple(same_padding(*args) for args in zip(sizes, kernel, stride, dilation))
        else:
            pads = ((0, 0),) * dims
    else:
        pads = tuple((p, p) for p in per_dim("padding", padding, dims, 0))
    out = []
    for size, k, s, d, (before, after) in zip(sizes, kernel, stride, dilation, pads):
        room = size + before + after - d * (k - 1) - 1
        if room < 0:
            raise ValueError(
                f"frames of size {tuple(sizes)} are too small for kernel_size {tuple(kernel)}, "
                f"dilation {dilation}, padding {padding!r}"
            )
        out.append(room // s + 1)
    return Geometry(stride, dilation, pads, tuple(out))


def state_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Dtype of c and of the gates: float32 where the convolutions run in 16 bits, else theirs."""
    return torch.float32 if compute_dtype in (torch.bfloat16, torch.float16) else compute_dtype


def autocasts(input: Tensor) -> bool:
    """Whether autocast is on for the input. It leaves float64 alone."""
    device = input.device.type
    return input.dtype != torch.float64 and device in _WITH_AUTOCAST and torch.is_autocast_enabled(device)


def compute_dtype(input: Tensor) -> torch.dtype:
    """Dtype of the convolutions and of h: autocast's where it is on, else the input's."""
    return torch.get_autocast_dtype(input.device.type) if autocasts(input) else input.dtype
