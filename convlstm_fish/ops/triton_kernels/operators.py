"""The Triton ConvLSTM over a sequence as torch operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convlstm_fish.ops.triton_kernels import convolved
from convlstm_fish.ops.triton_kernels.layer import gate_dtype, make_layer
from convlstm_fish.ops.triton_kernels.passes import run_backward, run_forward
from convlstm_fish.ops.triton_kernels.weights import NO_SECOND_DERIVATIVE, Gradients, Weights, chunk_steps


def _last(sequence: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The step that each clip does last, as a tensor of its own."""
    if reverse:
        return sequence[:, 0].clone()
    if lengths is None:
        return sequence[:, -1].clone()
    clips = torch.arange(sequence.shape[0], device=sequence.device)
    return sequence[clips, lengths.long() - 1]


@torch.library.custom_op("convlstm_fish::conv_lstm", mutates_args=())
def conv_lstm_forward(
    x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None,
    w_ci: Tensor | None, w_cf: Tensor | None, w_co: Tensor | None, mask: Tensor | None, lengths: Tensor | None,
    size: list[int], stride: list[int], pads: list[int], dilation: list[int], activation: int, tf32: bool,
    reverse: bool, sequences: bool, tracked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs the steps. Channels last throughout: x (N, T, H, W, C), states (N, H', W', C_h), mask the same.

    Returns:
        h of every step (N, T, H', W', C_h), empty where neither ``sequences`` nor the backward pass asks for it; h_n;
        c_n; and for the backward pass, empty unless ``tracked``: c of every step; for wide layers the gates
        (N, T, H', W', 4 * C_h), in :func:`gate_dtype`'s, or for convolved ones those before activation
        (T, N, H', W', 4 * C_h); and the images; see their run_forward.
    """
    layer = make_layer(x, weight_ih, weight_hh, size, stride, pads, dilation, activation, tf32, reverse)
    plain = mask is None and lengths is None
    weights = Weights(layer, weight_ih, weight_hh, bias, w_ci, w_cf, w_co, plain=plain)
    images = x.new_empty(0)
    if weights.convolved is not None:
        keep_h = sequences  # its backward pass finds h in the images
        h, c, cells, gates, images = convolved.run_forward(weights.convolved, x, h_0, c_0, keep_h, tracked)
    else:
        keep_h = sequences or tracked
        h, c, cells, gates = run_forward(layer, weights, x, h_0, c_0, mask, lengths, keep_h, tracked)
    if keep_h:
        return h, _last(h, lengths, reverse), c, cells, gates, images
    if lengths is None:
        h_n = h[:, (layer.steps - 1) % 2].clone()
    else:
        h_n = h[torch.arange(layer.clips, device=x.device), (lengths.long() - 1) % 2]
    return x.new_empty(0), h_n, c, cells, gates, images


@conv_lstm_forward.register_fake
def _(
    x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None,
    w_ci: Tensor | None, w_cf: Tensor | None, w_co: Tensor | None, mask: Tensor | None, lengths: Tensor | None,
    size: list[int], stride: list[int], pads: list[int], dilation: list[int], activation: int, tf32: bool,
    reverse: bool, sequences: bool, tracked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layer = make_layer(x, weight_ih, weight_hh, size, stride, pads, dilation, activation, tf32, reverse)
    clips, steps, frame = layer.clips, layer.steps, (*size, layer.hidden)
    covered = mask is None and lengths is None and convolved.covers(layer)
    is_convolved = tracked and covered
    gates = x.new_empty(0, dtype=x.dtype if covered else gate_dtype(x.dtype))
    if is_convolved:
        gates = x.new_empty(steps, clips, *size, 4 * layer.hidden)
    elif tracked and layer.tiles.keep_gates:
        gates = x.new_empty((clips, steps, *size, 4 * layer.hidden), dtype=gate_dtype(x.dtype))
    return (
        x.new_empty((clips, steps, *frame) if sequences or (tracked and not is_convolved) else (0,)),
        x.new_empty((clips, *frame)),
        x.new_empty((clips, *frame), dtype=torch.float32),
        x.new_empty((clips, steps, *frame) if tracked else (0,)),
        gates,
        x.new_empty(
            (steps - (h_0 is None), clips, *size, convolved.image_channels(layer) + layer.hidden)
            if is_convolved
            else (0,)
        ),
    )


@torch.library.custom_op("convlstm_fish::conv_lstm_backward", mutates_args=())
def _backward(
    dout: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, h: Tensor, cells: Tensor, gates: Tensor,
    images: Tensor, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weight_ih: Tensor, weight_hh: Tensor,
    bias: Tensor | None, w_ci: Tensor | None, w_cf: Tensor | None, w_co: Tensor | None, mask: Tensor | None,
    lengths: Tensor | None, size: list[int], stride: list[int], pads: list[int], dilation: list[int],
    activation: int, tf32: bool, reverse: bool, need_x: bool, need_state: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, h_0, c_0 (empty unless needed), of the weights, the bias and the three peepholes (if any)."""
    layer = make_layer(x, weight_ih, weight_hh, size, stride, pads, dilation, activation, tf32, reverse)
    plain = mask is None and lengths is None
    weights = Weights(layer, weight_ih, weight_hh, bias, w_ci, w_cf, w_co, plain=plain)
    gradients = Gradients(layer, weights)
    if weights.convolved is not None:
        found = convolved.run_backward(
            weights.convolved, gradients, chunk_steps(layer), dout, dh_n, dc_n, cells, gates, images, x, c_0, need_x,
            need_state,
        )  # fmt: skip
    else:
        found = run_backward(
            layer, weights, gradients, dout, dh_n, dc_n, h, cells, gates, x, h_0, c_0, mask, lengths, need_x, need_state
        )
    return [*(t.contiguous() for t in found), *gradients.results()]  # an operator's results may not share memory


@_backward.register_fake
def _(
    dout: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, h: Tensor, cells: Tensor, gates: Tensor,
    images: Tensor, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weight_ih: Tensor, weight_hh: Tensor,
    bias: Tensor | None, w_ci: Tensor | None, w_cf: Tensor | None, w_co: Tensor | None, mask: Tensor | None,
    lengths: Tensor | None, size: list[int], stride: list[int], pads: list[int], dilation: list[int],
    activation: int, tf32: bool, reverse: bool, need_x: bool, need_state: bool,
) -> list[Tensor]:  # fmt: skip
    frame = (x.shape[0], *size, weight_hh.shape[1])
    gradients = [
        torch.empty_like(x) if need_x else x.new_empty(0),
        x.new_empty(frame if need_state else (0,)),
        x.new_empty(frame if need_state else (0,), dtype=torch.float32),
        torch.empty_like(weight_ih, memory_format=torch.contiguous_format),
        torch.empty_like(weight_hh, memory_format=torch.contiguous_format),
    ]
    return gradients + [torch.empty_like(w) for w in (bias, w_ci, w_cf, w_co) if w is not None]


_TENSORS = 11  # how many of the forward operator's arguments are tensors


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, _, _, cells, gates, images = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(cells, gates, images)
    ctx.save_for_backward(h, cells, gates, images, *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:-2]


def _gradient(ctx: Any, dout: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: None) -> tuple[Any, ...]:
    h, cells, gates, images, *tensors = ctx.saved_tensors
    need = ctx.needs_input_grad
    bias, w_ci = tensors[5], tensors[6]
    need_state = tensors[1] is not None and (need[1] or need[2])
    out = _backward(dout, dh_n, dc_n, h, cells, gates, images, *tensors, *ctx.options, need[0], need_state)
    dx, dh_0, dc_0, dw_ih, dw_hh, *rest = out
    state = (dh_0, dc_0) if need_state else (None, None)
    dbias = rest.pop(0) if bias is not None else None
    peephole = rest if w_ci is not None else [None] * 3
    return (dx if need[0] else None, *state, dw_ih, dw_hh, dbias, *peephole, *([None] * (len(need) - 9)))


def _second_gradient(*_: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


conv_lstm_forward.register_autograd(_gradient, setup_context=_setup_context)
_backward.register_autograd(_second_gradient)
