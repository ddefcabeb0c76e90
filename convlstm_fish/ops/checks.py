"""The checks of every argument at the door: what does not fit is refused, with its value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convlstm_fish.ops.equations import RECURRENT_ACTIVATIONS, Norm
from convlstm_fish.ops.geometry import Geometry, Padding, autocasts, geometry

ACTIVATIONS = tuple(RECURRENT_ACTIVATIONS)


def _expect(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {meaning} = {shape}, got {tuple(value.shape)}")


def check_arguments(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: tuple[Tensor, Tensor, Tensor] | None,
    *,
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    recurrent_activation: str,
    recurrent_mask: Tensor | None,
    lengths: Tensor | None,
    checkpoint_every: int | None = None,
    detach_every: int | None = None,
    norm: Norm | None = None,
) -> Geometry:
    """Refuse every call that :func:`convlstm_fish.ops.conv_lstm` does not document, naming the value.

    Returns:
        The geometry of the input convolution.

    Raises:
        ValueError: a shape or option that does not fit.
        TypeError: input that is not floating point.
    """
    if not 4 <= input.dim() <= 6:
        raise ValueError(f"input must be (N, T, C, *spatial) with 1 to 3 spatial dimensions, got {tuple(input.shape)}")
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}")
    clips, steps, channels = input.shape[:3]
    sizes = tuple(input.shape[3:])
    dims = len(sizes)
    if steps < 1 or clips < 1:
        raise ValueError(f"input must hold at least one clip of one step, got shape {tuple(input.shape)}")
    if weight_ih.dim() != dims + 2 or weight_ih.shape[0] % 4 or weight_ih.shape[1] != channels:
        raise ValueError(
            f"weight_ih must have shape (4 * hidden_channels, {channels}, *kernel) with {dims} kernel sizes, "
            f"got {tuple(weight_ih.shape)}"
        )
    hidden = weight_ih.shape[0] // 4
    if weight_hh.dim() != dims + 2 or tuple(weight_hh.shape[:2]) != (4 * hidden, hidden):
        raise ValueError(
            f"weight_hh must have shape (4 * hidden_channels, hidden_channels, *kernel) = "
            f"({4 * hidden}, {hidden}, ...) with {dims} kernel sizes, got {tuple(weight_hh.shape)}"
        )
    if bias is not None:
        _expect("bias", bias, (4 * hidden,), "(4 * hidden_channels,)")
    if recurrent_activation not in ACTIVATIONS:
        raise ValueError(f"recurrent_activation must be one of {ACTIVATIONS}, got {recurrent_activation!r}")
    for name, weight in (("weight_ih", weight_ih), ("weight_hh", weight_hh), ("bias", bias)):
        if weight is not None and weight.dtype != input.dtype and not autocasts(input):
            raise ValueError(f"{name} is {weight.dtype} and input {input.dtype}: cast one of them, or use autocast")
    where = geometry(sizes, weight_ih.shape[2:], stride, padding, dilation)
    if peephole is not None:
        if len(peephole) != 3:
            raise ValueError(f"peephole must be (weight_ci, weight_cf, weight_co), got {len(peephole)} tensors")
        for name, weight in zip(("weight_ci", "weight_cf", "weight_co"), peephole):
            if tuple(weight.shape) not in ((hidden,) + (1,) * dims, (hidden, *where.out)):
                raise ValueError(
                    f"{name} must have shape {(hidden,) + (1,) * dims} (per channel) or "
                    f"{(hidden, *where.out)} (per pixel), got {tuple(weight.shape)}"
                )
    state = (clips, hidden, *where.out)
    if hx is not None:
        if not isinstance(hx, tuple | list) or len(hx) != 2:
            raise ValueError("hx must be (h_0, c_0)")
        _expect("h_0", hx[0], state, "(N, hidden_channels, *out)")
        _expect("c_0", hx[1], state, "(N, hidden_channels, *out)")
    if recurrent_mask is not None:
        _expect("recurrent_mask", recurrent_mask, state, "(N, hidden_channels, *out)")
    names = ("weight_ih", "weight_hh", "bias", "recurrent_mask", "h_0", "c_0", "weight_ci", "weight_cf", "weight_co")
    values = (weight_ih, weight_hh, bias, recurrent_mask, *(hx or (None, None)), *(peephole or ()))
    for name, value in zip(names, values):
        if value is not None and value.device != input.device:
            raise ValueError(f"{name} is on {value.device} and input on {input.device}: move one of them")
    if lengths is not None:
        check_lengths(lengths, clips, steps)
    for name, every in (("checkpoint_every", checkpoint_every), ("detach_every", detach_every)):
        if every is not None and every < 1:
            raise ValueError(f"{name} must be at least 1 step, got {every}")
    if norm is not None:
        check_norm(norm, hidden)
    return where


def check_norm(norm: Norm, hidden: int) -> None:
    """Refuse groups that do not divide the channels, and gains of the wrong size."""
    if norm.groups < 1 or (4 * hidden) % norm.groups or norm.groups_c < 1 or hidden % norm.groups_c:
        raise ValueError(
            f"norm groups must divide the channels: {norm.groups} of {4 * hidden} gate channels, "
            f"{norm.groups_c} of {hidden} channels of c"
        )
    for name, channels in (
        ("weight_ih", 4 * hidden),
        ("weight_hh", 4 * hidden),
        ("weight_c", hidden),
        ("bias_c", hidden),
    ):
        _expect(f"norm.{name}", getattr(norm, name), (channels,), "(channels,)")


def check_lengths(lengths: Tensor, clips: int, steps: int) -> None:
    """Refuse lengths that are not one whole number from 1 to T for each clip."""
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or tuple(lengths.shape) != (clips,):
        what = f"{lengths.dtype} {tuple(lengths.shape)}" if isinstance(lengths, Tensor) else repr(lengths)
        raise ValueError(f"lengths must be a whole-number tensor of shape ({clips},), got {what}")
    if torch.compiler.is_compiling():
        return  # the values are not known while a graph is being made
    low, high = int(lengths.min()), int(lengths.max())
    if low < 1 or high > steps:
        raise ValueError(f"lengths must lie in 1..{steps} (the steps of input), got {low if low < 1 else high}")
