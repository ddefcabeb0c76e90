"""The Triton ConvLSTM as torch operators: one launch a step forward, one a step backward, few for the weights."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from convlstm_fish.ops.triton_kernels.launch import launch
from convlstm_fish.ops.triton_kernels.layer import can_shift, make_layer, pack, peephole_kind, tile_count
from convlstm_fish.ops.triton_kernels.steps import backward_step, forward_step
from convlstm_fish.ops.triton_kernels.sums import WeightSums, write_image_gradient
from convlstm_fish.ops.triton_kernels.tuning import choose, round_channels

# The gates' gradients of so many bytes are kept until the weights' gradients take them up.
_CHUNK_BYTES = 512 << 20


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
    reverse: bool, keep_h: bool, keep_c: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs the steps. Channels last throughout: x (N, T, H, W, C), states (N, H', W', C_h), mask the same.

    Returns:
        h of every step (N, T, H', W', C_h), empty without ``keep_h``; h_n; c_n; and for the backward pass, in the
        dtype of x and empty without ``keep_c``, c of every step and for wide layers the gates (N, T, H', W', 4 * C_h).
    """
    layer = make_layer(x, weight_ih, weight_hh, size, stride, pads, dilation, activation, tf32, reverse)
    tile = layer.tiles.forward
    clips, steps = layer.clips, layer.steps
    frame = (*layer.size, layer.hidden)
    numbers = layer.size[0] * layer.size[1] * layer.hidden
    # Without a sequence two frames take turns, and a step's frame is found by the parity of the step.
    h = x.new_empty(clips, steps if keep_h else 2, *frame)
    cells = x.new_empty((clips, steps, *frame) if keep_c else (0,))
    keep_gates = keep_c and layer.tiles.keep_gates
    gates = x.new_empty((clips, steps, *layer.size, 4 * layer.hidden) if keep_gates else (0,))
    c = x.new_empty((clips, *frame), dtype=torch.float32)
    if not keep_h and lengths is not None:
        h.zero_()
    w_x = pack(weight_ih, layer, tile.rows_x, tile.channels, False)
    w_h = pack(weight_hh, layer, tile.rows, tile.channels, False)
    packed_bias = None if bias is None else pack(bias, layer, 1, tile.channels, False)
    grid = (tile_count(layer.size, tile.pixels, tile.patch) * triton.cdiv(layer.hidden, tile.channels), clips)
    constants = layer.constants() | {
        "ldw": w_h.shape[1], "PEEPHOLE": peephole_kind(w_ci), "HAS_BIAS": bias is not None,
        "HAS_MASK": mask is not None, "HAS_LENGTHS": lengths is not None, "SAVE_C": keep_c, "SAVE_GATES": keep_gates,
        "ZERO_REST": keep_h, "BM": tile.pixels, "BC": tile.channels, "BK": tile.rows, "BKX": tile.rows_x,
        "TW": tile.patch, "STAGES": tile.stages,
    }  # fmt: skip
    factor = x if mask is None else mask  # a pointer that is only read with HAS_MASK
    for s in range(steps):
        h_in, h_out = h, h
        h_in_t = h_out_t = numbers
        if not keep_h:
            h_in, h_out = h[:, (s + 1) % 2], h[:, s % 2]
            h_in_t = h_out_t = 0
        c_in = c
        if s == 0 and h_0 is not None and c_0 is not None:
            h_in, c_in, h_in_t = h_0, c_0, 0
        args = (
            x, h_in, h_out, c_in, c, cells, gates, w_x, w_h, packed_bias, w_ci, w_cf, w_co, factor, lengths,
            s, steps, x.stride(0), x.stride(1), h_in.stride(0), h_in_t, h.stride(0), h_out_t,
            steps * numbers, numbers, 4 * steps * numbers, 4 * numbers, numbers,
        )  # fmt: skip
        constants["HAS_STATE"] = s > 0 or h_0 is not None
        launch(forward_step, grid, args, constants, tile.warps, tile.registers)
    if keep_h:
        return h, _last(h, lengths, reverse), c, cells, gates
    if lengths is None:
        h_n = h[:, (steps - 1) % 2].clone()
    else:
        h_n = h[torch.arange(clips, device=x.device), (lengths.long() - 1) % 2]
    return x.new_empty(0), h_n, c, cells, gates


@conv_lstm_forward.register_fake
def _(
    x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None,
    w_ci: Tensor | None, w_cf: Tensor | None, w_co: Tensor | None, mask: Tensor | None, lengths: Tensor | None,
    size: list[int], stride: list[int], pads: list[int], dilation: list[int], activation: int, tf32: bool,
    reverse: bool, keep_h: bool, keep_c: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    frame = (*size, weight_hh.shape[1])
    clips, steps = x.shape[:2]
    keep_gates = keep_c and choose(x.shape[4], weight_hh.shape[1], x.dtype).keep_gates
    return (
        x.new_empty((clips, steps, *frame) if keep_h else (0,)),
        x.new_empty((clips, *frame)),
        x.new_empty((clips, *frame), dtype=torch.float32),
        x.new_empty((clips, steps, *frame) if keep_c else (0,)),
        x.new_empty((clips, steps, *size, 4 * frame[2]) if keep_gates else (0,)),
    )


@torch.library.custom_op("convlstm_fish::conv_lstm_backward", mutates_args=())
def _backward(
    dout: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, h: Tensor, cells: Tensor, gates: Tensor,
    x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None,
    w_ci: Tensor | None, w_cf: Tensor | None, w_co: Tensor | None, mask: Tensor | None, lengths: Tensor | None,
    size: list[int], stride: list[int], pads: list[int], dilation: list[int], activation: int, tf32: bool,
    reverse: bool, need_x: bool, need_state: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, h_0, c_0 (empty unless needed), of the weights, the bias and the three peepholes (if any)."""
    layer = make_layer(x, weight_ih, weight_hh, size, stride, pads, dilation, activation, tf32, reverse)
    tiles = layer.tiles
    tile = tiles.backward
    clips, steps, hidden = layer.clips, layer.steps, layer.hidden
    numbers = layer.size[0] * layer.size[1] * hidden
    dout = None if dout is None else dout.contiguous()
    dh_n = None if dh_n is None else dh_n.contiguous()
    dc = torch.empty((clips, *layer.size, hidden), dtype=torch.float32, device=x.device)
    _ = dc.zero_() if dc_n is None else dc.copy_(dc_n)
    chunk = max(1, min(steps, _CHUNK_BYTES // (4 * clips * numbers * x.element_size())))
    # One more than a chunk, because a step reads the da of the step after while its own chunk fills.
    da = x.new_empty(clips, min(chunk + 1, steps), *layer.size, 4 * hidden)
    dpeephole = None if w_ci is None else dc.new_zeros(clips, *layer.size, 3, hidden)

    w_back = pack(weight_hh, layer, tile.rows_back, tile.channels, True)
    w_x = w_h = packed_bias = None
    if not tiles.keep_gates:
        w_x = pack(weight_ih, layer, tile.rows_x, tile.channels, False)
        w_h = pack(weight_hh, layer, tile.rows, tile.channels, False)
        packed_bias = None if bias is None else pack(bias, layer, 1, tile.channels, False)
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    w_dx = pack(weight_ih, layer, tiles.image.rows, tiles.image.channels, True) if need_x else None
    if tiles.weight.together:
        sums = [WeightSums(layer, weight_hh, weight_ih)]
    else:
        sums = [WeightSums(layer, weight_hh, None), WeightSums(layer, None, weight_ih)]
    halo = tile.halo if can_shift(layer.kernel, layer.recurrence()) else 0
    tiles_per_image = tile_count(layer.size, tile.pixels, tile.patch, halo)
    dbias = None if bias is None else dc.new_zeros(clips * tiles_per_image, 4 * hidden)
    grid = (tiles_per_image * triton.cdiv(hidden, tile.channels), clips)
    constants = layer.constants() | {
        "ldw": 0 if w_h is None else w_h.shape[1], "ldw_back": w_back.shape[1],
        "CP_GATES": round_channels(4 * hidden), "PEEPHOLE": peephole_kind(w_ci), "HAS_BIAS": bias is not None,
        "HAS_MASK": mask is not None, "HAS_LENGTHS": lengths is not None, "HAS_DOUT": dout is not None,
        "HAS_DH_N": dh_n is not None, "HAS_GATES": tiles.keep_gates, "BM": tile.pixels, "BC": tile.channels,
        "BK": tile.rows, "BKX": tile.rows_x, "BKB": tile.rows_back, "TW": tile.patch, "HALO": halo,
        "STAGES": tile.stages, "STAGES_BACK": tile.stages_back,
    }  # fmt: skip
    factor = x if mask is None else mask  # a pointer that is only read with HAS_MASK
    waiting = 0
    for s in reversed(range(steps)):
        h_in, c_in, before_t = h, cells, numbers
        if s == 0 and h_0 is not None and c_0 is not None:
            h_in, c_in, before_t = h_0, c_0, 0
        args = (
            x, h_in, c_in, gates, dout, dh_n, da, dc, dpeephole, dbias,
            w_x, w_h, w_back, packed_bias, w_ci, w_cf, w_co, factor, lengths,
            s, steps, s % da.shape[1], (s + 1) % da.shape[1], x.stride(0), x.stride(1),
            h_in.stride(0), before_t, c_in.stride(0), before_t, 4 * steps * numbers, 4 * numbers,
            steps * numbers, numbers, da.stride(0), da.stride(1), numbers,
        )  # fmt: skip
        constants["HAS_STATE"] = s > 0 or h_0 is not None
        launch(backward_step, grid, args, constants, tile.warps, tile.registers)
        waiting += 1
        if waiting < chunk and s > 0:
            continue
        for each in sums:
            if s == 0 and h_0 is not None:  # the state before step 0 lies elsewhere
                each.add(h_0, 0, True, x, mask, da, 0, 1, lengths)
                if waiting > 1:
                    each.add(h, numbers, True, x, mask, da, 1, waiting - 1, lengths)
            else:
                each.add(h, numbers, False, x, mask, da, s, waiting, lengths)
        if w_dx is not None:
            write_image_gradient(
                layer, w_dx, tiles.image, da, dx, x.stride(1), None, layer.kernel_x, layer.convolution(),
                s, waiting, lengths,
            )  # fmt: skip
        waiting = 0

    dh_0, dc_0 = x.new_empty(0), dc.new_empty(0)
    if need_state:
        dh_0, dc_0 = torch.empty_like(dc, dtype=x.dtype), dc
        w_dh = pack(weight_hh, layer, tiles.image.rows, tiles.image.channels, True)
        write_image_gradient(
            layer, w_dh, tiles.image, da, dh_0, 0, mask, layer.kernel, layer.recurrence(), 0, 1, lengths
        )
    dw_hh, dw_ih = (gradient for each in sums for gradient in each.results())
    gradients = [dx, dh_0, dc_0, dw_ih, dw_hh]
    if dbias is not None and bias is not None:
        gradients.append(dbias.sum(0).to(bias.dtype))
    if dpeephole is not None and w_ci is not None:
        summed = dpeephole.sum((0, 1, 2)) if w_ci.dim() == 1 else dpeephole.sum(0)
        gradients += [part.clone(memory_format=torch.contiguous_format) for part in summed.unbind(-2)]
    return gradients


@_backward.register_fake
def _(
    dout: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, h: Tensor, cells: Tensor, gates: Tensor,
    x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None,
    w_ci: Tensor | None, w_cf: Tensor | None, w_co: Tensor | None, mask: Tensor | None, lengths: Tensor | None,
    size: list[int], stride: list[int], pads: list[int], dilation: list[int], activation: int, tf32: bool,
    reverse: bool, need_x: bool, need_state: bool,
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
    h, _, _, cells, gates = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(cells, gates)
    ctx.save_for_backward(h, cells, gates, *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:-2]


def _gradient(ctx: Any, dout: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: None) -> tuple[Any, ...]:
    h, cells, gates, *tensors = ctx.saved_tensors
    need = ctx.needs_input_grad
    bias, w_ci = tensors[5], tensors[6]
    need_state = tensors[1] is not None and (need[1] or need[2])
    out = _backward(dout, dh_n, dc_n, h, cells, gates, *tensors, *ctx.options, need[0], need_state)
    dx, dh_0, dc_0, dw_ih, dw_hh, *rest = out
    state = (dh_0, dc_0) if need_state else (None, None)
    dbias = rest.pop(0) if bias is not None else None
    peephole = rest if w_ci is not None else [None] * 3
    return (dx if need[0] else None, *state, dw_ih, dw_hh, dbias, *peephole, *([None] * (len(need) - 9)))


conv_lstm_forward.register_autograd(_gradient, setup_context=_setup_context)
