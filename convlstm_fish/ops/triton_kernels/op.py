"""The entry to the Triton ConvLSTM: what it takes, and the arguments as its operators take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from convlstm_fish.ops.checks import ACTIVATIONS, check_arguments
from convlstm_fish.ops.equations import Norm
from convlstm_fish.ops.geometry import Geometry, Padding
from convlstm_fish.ops.triton_kernels.layer import Layer, make_layer
from convlstm_fish.ops.triton_kernels.operators import conv_lstm_forward
from convlstm_fish.ops.triton_kernels.transpose import few_channels_last, suits
from convlstm_fish.ops.triton_kernels.unrolled import Unrolled

State = tuple[Tensor, Tensor]


def _compute_dtype(input: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the input's."""
    device = input.device.type
    if input.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return input.dtype


def unsupported(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    checkpoint_every: int | None = None,
    detach_every: int | None = None,
    norm: Norm | None = None,
    **options: Any,
) -> str | None:
    """Why :func:`conv_lstm_triton` cannot run this call, or None if it can."""
    if input.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"the input is on {input.device.type}, not on a CUDA GPU"
    if input.dim() != 5:
        return f"the Triton kernels take 2 spatial dimensions, not {input.dim() - 3}"
    dtype = _compute_dtype(input)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels compute in bfloat16, float16 or float32, not in {dtype}"
    if input.device.type == "cuda" and torch.cuda.get_device_capability(input.device) < (8, 0):
        return "the Triton kernels need a GPU of compute capability 8.0 or newer"
    if checkpoint_every is not None:
        return "checkpoint_every is for the reference; the Triton kernels compute the gates again anyway"
    if detach_every is not None:
        return "the Triton kernels do not cut the gradient (detach_every)"
    if norm is not None:
        return "the Triton kernels have no normalisation inside the cell"
    if weight_hh.dim() != 4 or weight_hh.shape[1] > 512 or weight_ih.shape[1] > 1024:
        return "the Triton kernels take up to 512 hidden and 1024 input channels"
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms do not see through the Triton kernels"
    return None


def _channels_last(image: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W) as a contiguous (N, H, W, C), cast and moved in one pass; no copy where it lies so already."""
    if suits(image):
        return few_channels_last(image, dtype)
    return image.to(dtype=dtype, memory_format=torch.channels_last).permute(0, 2, 3, 1).contiguous()


def _channels_as_last(image: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W) as a view (N, H, W, C), cast."""
    return image.to(dtype).permute(0, 2, 3, 1)


def _peephole(peephole: tuple[Tensor, Tensor, Tensor] | None, where: Geometry) -> list[Tensor | None]:
    """Three weights, (C_h,) or (H', W', C_h) each, or three None."""
    if peephole is None:
        return [None] * 3
    per_pixel = any(w.shape[1:] != (1, 1) for w in peephole)
    return [
        w.float().expand(-1, *where.out).permute(1, 2, 0).contiguous() if per_pixel else w.float().flatten()
        for w in peephole
    ]


class UnrollTriton:
    """:func:`convlstm_fish.ops.unroll` in Triton kernels; see there.

    Raises:
        ValueError: an argument that does not fit, named with its value.
        RuntimeError: the weights have changed since the first step.
    """

    def __init__(
        self,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        peephole: tuple[Tensor, Tensor, Tensor] | None,
        *,
        stride: int | Sequence[int] = 1,
        padding: Padding = "same",
        dilation: int | Sequence[int] = 1,
        recurrent_activation: str = "sigmoid",
    ) -> None:
        self.parameters = (weight_ih, weight_hh, bias, peephole)
        self.activation = recurrent_activation
        self._geometry: Any = {"stride": stride, "padding": padding, "dilation": dilation}
        self._all = [weight_ih, weight_hh, *([] if bias is None else [bias]), *(peephole or ())]
        self._versions = [p._version for p in self._all]
        self._unrolled: dict[Any, Unrolled] = {}  # by what of a call decides
        self._made: dict[tuple[Layer, bool], Unrolled] = {}  # steps with and without a state share theirs

    def __call__(self, input: Tensor, hx: State | None) -> State:
        """The state after a step on (N, C, H, W)."""
        if [p._version for p in self._all] != self._versions:
            raise RuntimeError("the weights have changed since the first step; unroll the layer again")
        dtype, tf32 = _compute_dtype(input), torch.backends.cudnn.allow_tf32
        of_state = None if hx is None else tuple((t.shape, t.dtype, t.device) for t in hx)
        key = (input.shape, input.dtype, input.device, of_state, dtype, tf32, torch.is_grad_enabled())
        if key not in self._unrolled:
            self._unrolled[key] = self._make(input, hx, dtype, tf32)
        unrolled = self._unrolled[key]
        weights = unrolled.shared.weights
        # A convolved layer copies x and h into its images, however they lie.
        lay = _channels_last if weights.convolved is None else _channels_as_last
        x = lay(input, dtype).unsqueeze(1)
        h_0 = c_0 = None
        if hx is not None:
            h_0, c_0 = lay(hx[0], dtype), _channels_last(hx[1], torch.float32)
        elif weights.convolved is None:
            frame = (weights.layer.clips, *weights.layer.size, weights.layer.hidden)
            h_0, c_0 = x.new_zeros(frame), x.new_zeros(frame, dtype=torch.float32)
        h, c = unrolled(x, h_0, c_0)
        return h.permute(0, 3, 1, 2), c.permute(0, 3, 1, 2)

    def _make(self, input: Tensor, hx: State | None, dtype: torch.dtype, tf32: bool) -> Unrolled:
        """For calls of one kind."""
        weight_ih, weight_hh, bias, peephole = self.parameters
        where = check_arguments(
            input.unsqueeze(1), hx, *self.parameters, **self._geometry, recurrent_activation=self.activation,
            recurrent_mask=None, lengths=None,
        )  # fmt: skip
        x = _channels_as_last(input, dtype).unsqueeze(1)
        layer = make_layer(
            x, weight_ih, weight_hh, where.out, where.stride, [before for before, _ in where.pads], where.dilation,
            ACTIVATIONS.index(self.activation), tf32, False,
        )  # fmt: skip
        kind = (layer, torch.is_grad_enabled())
        if kind not in self._made:
            self._made[kind] = Unrolled(layer, weight_ih, weight_hh, bias, *_peephole(peephole, where))
        return self._made[kind]


def conv_lstm_triton(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = "same",
    dilation: int | Sequence[int] = 1,
    recurrent_activation: str = "sigmoid",
    recurrent_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
    checkpoint_every: int | None = None,
    detach_every: int | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor | None, State]:
    """:func:`convlstm_fish.ops.conv_lstm` in Triton kernels; see there for the arguments.

    Both convolutions, the gates and the state of a step are one launch. Narrow layers do not keep the gates: their
    backward pass computes them again from h and c, of which c is kept in the compute dtype. ``output`` is laid out
    channels last.

    Raises:
        ValueError: an argument that does not fit, named with its value.
        RuntimeError: a call that :func:`unsupported` refuses, and a second derivative.
    """
    where: Geometry = check_arguments(
        input, hx, weight_ih, weight_hh, bias, peephole, stride=stride, padding=padding, dilation=dilation,
        recurrent_activation=recurrent_activation, recurrent_mask=recurrent_mask, lengths=lengths,
        checkpoint_every=checkpoint_every,
    )  # fmt: skip
    reason = unsupported(input, hx, weight_ih, weight_hh, bias, peephole, checkpoint_every=checkpoint_every)
    if reason is not None:
        raise RuntimeError(reason)
    dtype = _compute_dtype(input)
    clips, steps = input.shape[:2]
    x = _channels_last(input.flatten(0, 1), dtype).unflatten(0, (clips, steps))
    h_0 = c_0 = mask = None
    if hx is not None:
        h_0, c_0 = _channels_last(hx[0], dtype), _channels_last(hx[1], torch.float32)
    if recurrent_mask is not None:
        if recurrent_mask.requires_grad:
            raise RuntimeError("the Triton kernels give no gradient of recurrent_mask")
        mask = _channels_last(recurrent_mask, dtype)
    weights = _peephole(peephole, where)
    tracked = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, h_0, c_0, weight_ih, weight_hh, bias, *weights)
    )
    output, h_n, c_n, *_ = conv_lstm_forward(
        x, h_0, c_0, weight_ih, weight_hh, bias, *weights, mask,
        None if lengths is None else lengths.to(device=x.device, dtype=torch.int32),
        list(where.out), list(where.stride), [before for before, _ in where.pads], list(where.dilation),
        ACTIVATIONS.index(recurrent_activation), torch.backends.cudnn.allow_tf32, reverse,
        return_sequences or tracked, tracked,
    )  # fmt: skip
    state = (h_n.permute(0, 3, 1, 2), c_n.permute(0, 3, 1, 2))
    return (output.permute(0, 1, 4, 2, 3) if return_sequences else None), state
