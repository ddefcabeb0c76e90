"""The entry to the Triton ConvLSTM: what it takes, and the arguments as its operators take them."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from convlstm_fish.ops.checks import ACTIVATIONS, check_arguments
from convlstm_fish.ops.equations import Norm, State
from convlstm_fish.ops.geometry import Geometry, Padding, compute_dtype
from convlstm_fish.ops.triton_kernels.layer import make_layer
from convlstm_fish.ops.triton_kernels.operators import conv_lstm_forward
from convlstm_fish.ops.triton_kernels.transpose import channels_first, channels_last
from convlstm_fish.ops.triton_kernels.unrolled import Unrolled, versions


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
    dtype = compute_dtype(input)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels compute in bfloat16, float16 or float32, not in {dtype}"
    if input.device.type == "cuda" and torch.cuda.get_device_capability(input.device) < (8, 0):
        return "the Triton kernels need a GPU of compute capability 8.0 or newer"
    if checkpoint_every is not None:
        return "checkpoint_every is for the reference; the Triton kernels compute the gates again anyway"
    if detach_every is not None:
        return "the Triton kernels do not cut the gradient (detach_every)"
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms do not see through the Triton kernels"
    return _layer_unsupported(weight_ih, weight_hh, norm)


def _layer_unsupported(weight_ih: Tensor, weight_hh: Tensor, norm: Norm | None) -> str | None:
    """What of that the layer itself decides."""
    if norm is not None:
        return "the Triton kernels have no normalisation inside the cell"
    if weight_hh.dim() != 4 or weight_hh.shape[1] > 512 or weight_ih.shape[1] > 1024:
        return "the Triton kernels take up to 512 hidden and 1024 input channels"
    return None


def _peephole(peephole: tuple[Tensor, Tensor, Tensor] | None, where: Geometry) -> list[Tensor | None]:
    """Three weights, (C_h,) or (H', W', C_h) each, or three None."""
    if peephole is None:
        return [None] * 3
    per_pixel = any(w.shape[1:] != (1, 1) for w in peephole)
    return [
        w.float().expand(-1, *where.out).permute(1, 2, 0).contiguous() if per_pixel else w.float().flatten()
        for w in peephole
    ]


_UNROLLED: weakref.WeakSet[UnrollTriton] = weakref.WeakSet()


def _notice(optimizer: Optimizer, *_: Any) -> None:
    """After an optimizer's step: the fused ones do not count as changes what they do to the weights."""
    if _UNROLLED:
        changed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for each in list(_UNROLLED):
            each.stale |= each.has_any(changed)


register_optimizer_step_post_hook(_notice)


class UnrollTriton:
    """:func:`convlstm_fish.ops.unroll_stack` in Triton kernels; see there.

    Args:
        layers: all arguments of :func:`convlstm_fish.ops.unroll` by name, of each layer.

    Raises:
        ValueError: an argument that does not fit, named with its value.
        RuntimeError: the weights have changed since the first step.
    """

    def __init__(self, layers: Sequence[Mapping[str, Any]]) -> None:
        self.layers = layers
        self._first, *above = ({k: each[k] for k in ("weight_ih", "weight_hh", "norm")} for each in layers)
        self._above = next(filter(None, (_layer_unsupported(**each) for each in above)), None)
        self._all = [
            p
            for each in self.layers
            for p in (each["weight_ih"], each["weight_hh"], each["bias"], *(each["peephole"] or ()))
            if p is not None
        ]
        self._versions, self.stale = versions(self._all), False
        self._unrolled: dict[Any, Unrolled] = {}  # by what of a call decides
        self._made: dict[Any, Unrolled] = {}  # steps with and without a state share theirs
        _UNROLLED.add(self)

    def has_any(self, ids: Collection[int]) -> bool:
        """Whether one of the weights is of these."""
        return any(id(p) in ids for p in self._all)

    def unsupported(self, input: Tensor) -> str | None:
        """Why it cannot take a step on this input, or None if it can."""
        return self._above or unsupported(input.unsqueeze(1), None, **self._first)

    def __call__(self, input: Tensor | None, states: Sequence[State | None]) -> tuple[Tensor, list[State]]:
        """The last layer's h after a step on (N, C, H, W), or on the last layer's h of the states, and all states."""
        if self.stale or versions(self._all) != self._versions:
            raise RuntimeError("the weights have changed since the first step; unroll the layers again")
        x = states[-1][0] if input is None else input  # type: ignore[index]
        dtype, tf32 = compute_dtype(x), torch.backends.cudnn.allow_tf32
        key = (
            x.shape, x.dtype, x.device, dtype, tf32, torch.is_grad_enabled(), *(p.requires_grad for p in self._all),
            *(None if s is None else tuple((t.shape, t.dtype, t.device) for t in s) for s in states),
        )  # fmt: skip
        if key not in self._unrolled:
            self._unrolled[key] = self._make(x, states, dtype, tf32)
        return self._unrolled[key](input, states)

    def _make(self, input: Tensor, states: Sequence[State | None], dtype: torch.dtype, tf32: bool) -> Unrolled:
        """For calls of one kind."""
        layers, parameters = [], []
        x, any_values = input.unsqueeze(1), input.new_empty((), dtype=dtype)
        for each, hx in zip(self.layers, states):
            options = {key: value for key, value in each.items() if key != "backend"}
            where = check_arguments(x, hx, **options, recurrent_mask=None, lengths=None)
            weight_ih, weight_hh = each["weight_ih"], each["weight_hh"]
            activation = ACTIVATIONS.index(each["recurrent_activation"])
            layers.append(make_layer(
                any_values.expand(x.shape).movedim(2, -1), weight_ih, weight_hh, where.out, where.stride,
                [before for before, _ in where.pads], where.dilation, activation, tf32, False,
            ))  # fmt: skip
            parameters.append((weight_ih, weight_hh, each["bias"], *_peephole(each["peephole"], where)))
            x = any_values.expand(x.shape[0], 1, weight_hh.shape[1], *where.out)  # as the layer above reads it
        kind = (*layers, torch.is_grad_enabled(), *(p.requires_grad for p in self._all))
        if kind not in self._made:
            self._made[kind] = Unrolled(layers, parameters)
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
        checkpoint_every=checkpoint_every, detach_every=detach_every, norm=norm,
    )  # fmt: skip
    reason = unsupported(
        input, hx, weight_ih, weight_hh, bias, peephole, checkpoint_every=checkpoint_every, detach_every=detach_every,
        norm=norm,
    )  # fmt: skip
    if reason is not None:
        raise RuntimeError(reason)
    dtype = compute_dtype(input)
    clips, steps = input.shape[:2]
    x = channels_last(input.flatten(0, 1), dtype).unflatten(0, (clips, steps))
    h_0 = c_0 = mask = None
    if hx is not None:
        h_0, c_0 = channels_last(hx[0], dtype), channels_last(hx[1], torch.float32)
    if recurrent_mask is not None:
        if recurrent_mask.requires_grad:
            raise RuntimeError("the Triton kernels give no gradient of recurrent_mask")
        mask = channels_last(recurrent_mask, dtype)
    weights = _peephole(peephole, where)
    tracked = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, h_0, c_0, weight_ih, weight_hh, bias, *weights)
    )
    output, h_n, c_n, *_ = conv_lstm_forward(
        x, h_0, c_0, weight_ih, weight_hh, bias, *weights, mask,
        None if lengths is None else lengths.to(device=x.device, dtype=torch.int32),
        list(where.out), list(where.stride), [before for before, _ in where.pads], list(where.dilation),
        ACTIVATIONS.index(recurrent_activation), torch.backends.cudnn.allow_tf32, reverse,
        return_sequences, tracked,
    )  # fmt: skip
    state = (channels_first(h_n), channels_first(c_n))
    return (output.permute(0, 1, 4, 2, 3) if return_sequences else None), state
