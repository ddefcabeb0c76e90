"""The launches of one call: a step at a time forward, and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from convlstm_fish.ops.hopper_kernels import passes as hopper
from convlstm_fish.ops.hopper_kernels.compiled import aligned
from convlstm_fish.ops.triton_kernels.launch import Variants, cdiv
from convlstm_fish.ops.triton_kernels.layer import Layer, gate_dtype, multiprocessors, tile_count
from convlstm_fish.ops.triton_kernels.steps import backward_step, forward_step
from convlstm_fish.ops.triton_kernels.sums import write_image_gradient
from convlstm_fish.ops.triton_kernels.tuning import round_channels
from convlstm_fish.ops.triton_kernels.weights import Gradients, Weights, chunk_steps


def run_forward(
    layer: Layer, weights: Weights, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, mask: Tensor | None,
    lengths: Tensor | None, keep_h: bool, keep_c: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs the steps of a layer that is not convolved.

    Channels last throughout: x (N, T, H, W, C), states (N, H', W', C_h), mask the same.

    Returns:
        h of every step (N, T, H', W', C_h), or without ``keep_h`` (N, 2, H', W', C_h), where step s lies at s % 2; c_n;
        and for the backward pass, empty without ``keep_c``, c of every step and for wide layers the gates
        (N, T, H', W', 4 * C_h).
    """
    if weights.steps is not None:
        found = hopper.run_forward(weights.steps, x, h_0, c_0, layer.reverse, keep_h, keep_c)
        return *found, x.new_empty(0, dtype=gate_dtype(layer.dtype))
    tile = layer.tiles.forward
    clips, steps = layer.clips, layer.steps
    frame = (*layer.size, layer.hidden)
    numbers = layer.size[0] * layer.size[1] * layer.hidden
    # Without a sequence two frames take turns, and a step's frame is found by the parity of the step.
    h = x.new_empty(clips, steps if keep_h else 2, *frame)
    cells = x.new_empty((clips, steps, *frame) if keep_c else (0,))
    keep_gates = keep_c and layer.tiles.keep_gates
    kept = (clips, steps, *layer.size, 4 * layer.hidden) if keep_gates else (0,)
    gates = x.new_empty(kept, dtype=gate_dtype(layer.dtype))
    c = x.new_empty((clips, *frame), dtype=torch.float32)
    if not keep_h and lengths is not None:
        h.zero_()
    w_x, w_h, bias = weights.forward
    tiles = tile_count(layer.size, tile.pixels, tile.patch)
    items = tiles * cdiv(layer.hidden, tile.channels) * clips
    programs = min(items, tile.held * multiprocessors(layer.device)) if tile.held else items
    constants = layer.constants() | {
        "tiles": tiles, "HELD": tile.held > 0, "ldw": w_h.shape[1], "PEEPHOLE": weights.peephole_kind,
        "HAS_BIAS": bias is not None, "HAS_MASK": mask is not None, "HAS_LENGTHS": lengths is not None,
        "SAVE_C": keep_c, "SAVE_GATES": keep_gates, "ZERO_REST": keep_h, "BM": tile.pixels, "BC": tile.channels,
        "BK": tile.rows, "BKX": tile.rows_x, "TW": tile.patch, "STAGES": tile.stages,
    }  # fmt: skip
    factor = x if mask is None else mask  # a pointer that is only read with HAS_MASK
    runs = Variants(forward_step, constants, tile.warps, tile.registers)
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
            x, h_in, h_out, c_in, c, cells, gates, w_x, w_h, bias, *weights.peephole, factor, lengths,
            s, steps, items, x.stride(0), x.stride(1), h_in.stride(0), h_in_t, h.stride(0), h_out_t,
            steps * numbers, numbers, 4 * steps * numbers, 4 * numbers, numbers,
        )  # fmt: skip
        runs(HAS_STATE=s > 0 or h_0 is not None)((programs,), *args)
    return h, c, cells, gates


def run_backward(
    layer: Layer, weights: Weights, gradients: Gradients, dout: Tensor | None, dh_n: Tensor | None,
    dc_n: Tensor | None, h: Tensor, cells: Tensor, gates: Tensor, x: Tensor, h_0: Tensor | None, c_0: Tensor | None,
    mask: Tensor | None, lengths: Tensor | None, need_x: bool, need_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Adds to the gradients of the parameters.

    Returns:
        The gradients of x, h_0 and c_0, empty unless needed.
    """
    tiles = layer.tiles
    tile = tiles.backward
    clips, steps, hidden = layer.clips, layer.steps, layer.hidden
    numbers = layer.size[0] * layer.size[1] * hidden
    chunk = min(steps, chunk_steps(layer))
    # One more than a chunk, because a step reads the da of the step after while its own chunk fills.
    da = gradients.room(layer, min(chunk + 1, steps))
    narrow = weights.steps
    if narrow is not None:  # also for take_up, below
        x, h_0 = aligned(x), None if h_0 is None else aligned(h_0)
    dout, dh_n, dc_n = (None if t is None else t.contiguous() for t in (dout, dh_n, dc_n))
    dh, dc_in = dh_n, dc_n
    dc = torch.empty((clips, *layer.size, hidden), dtype=torch.float32, device=x.device)
    if narrow is not None or lengths is not None:
        # Those kernels find dc in place; a clip's last step, because it comes when others have begun.
        dc_in = dc.zero_() if dc_n is None else dc.copy_(dc_n)
    # Of a wide layer the product and the rest of a step are launches of their own, each cut as suits it.
    apart = narrow is None and tiles.keep_gates and lengths is None
    dx = torch.empty_like(x) if need_x else x.new_empty(0)

    def take_up(s: int, waiting: int) -> None:
        """What needs the da of the steps s .. s + waiting - 1."""
        if s == 0 and h_0 is not None:  # the state before step 0 lies elsewhere
            gradients.add(h_0, 0, True, x, mask, da, 0, 1, lengths)
            if waiting > 1:
                gradients.add(h, numbers, True, x, mask, da, 1, waiting - 1, lengths)
        else:
            gradients.add(h, numbers, False, x, mask, da, s, waiting, lengths)
        if need_x and narrow is None:
            write_image_gradient(layer, weights.image_x, da, dx, x.stride(1), None, s, waiting, lengths)

    if narrow is not None:
        dh_0 = hopper.run_backward(
            narrow, dout, dh_n, dc, h, cells, x, h_0, c_0, layer.reverse, chunk, da, gradients.dbias,
            dx if need_x else None, need_state, take_up,
        )  # fmt: skip
        return (dx, x.new_empty(0), dc.new_empty(0)) if dh_0 is None else (dx, dh_0, dc)
    w_x, w_h, bias = weights.backward
    w_back = None if apart else weights.adjoint
    constants = layer.constants() | {
        "tiles": layer.tiles_per_image, "ldw": 0 if w_h is None else w_h.shape[1],
        "ldw_back": 0 if w_back is None else w_back.shape[1], "CP_GATES": round_channels(4 * hidden),
        "PEEPHOLE": weights.peephole_kind, "HAS_BIAS": weights.bias is not None, "HAS_MASK": mask is not None,
        "HAS_LENGTHS": lengths is not None, "HAS_DOUT": dout is not None, "HAS_GATES": tiles.keep_gates,
        "BM": tile.pixels, "BK": tile.rows, "BKX": tile.rows_x, "BKB": tile.rows_back, "TW": tile.patch,
        "HALO": layer.halo, "STAGES": tile.stages, "STAGES_BACK": tile.stages_back,
    }  # fmt: skip
    factor = x if mask is None else mask  # a pointer that is only read with HAS_MASK
    dh_before = torch.empty_like(dc, dtype=x.dtype) if need_state or (apart and steps > 1) else x.new_empty(0)
    # Without a product to make, a wide layer's programs are small, so that more of them run side by side.
    constants["BC"] = min(tile.channels, 32) if apart else tile.channels
    grid = (layer.tiles_per_image * cdiv(hidden, constants["BC"]), clips)
    runs = Variants(backward_step, constants, tile.warps, tile.registers)
    waiting = 0
    for s in reversed(range(steps)):
        h_in, c_in, before_t = h, cells, numbers
        if s == 0 and h_0 is not None and c_0 is not None:
            h_in, c_in, before_t = h_0, c_0, 0
        args = (
            x, h_in, c_in, gates, dout, dh, da, dc_in, dc, gradients.dpeephole, gradients.dbias,
            w_x, w_h, w_back, bias, *weights.peephole, factor, lengths,
            s, steps, s % da.shape[1], (s + 1) % da.shape[1], x.stride(0), x.stride(1),
            h_in.stride(0), before_t, c_in.stride(0), before_t, 4 * steps * numbers, 4 * numbers,
            steps * numbers, numbers, da.stride(0), da.stride(1), numbers,
        )  # fmt: skip
        run = runs(
            HAS_STATE=s > 0 or h_0 is not None, HAS_NEXT=not apart and (lengths is not None or s + 1 < steps),
            HAS_DH=dh is not None, HAS_DC=dc_in is not None,
        )  # fmt: skip
        run(grid, *args)
        dc_in = dc
        wanted = s > 0 or need_state
        if wanted and (apart or s == 0):
            write_image_gradient(layer, weights.image_h, da, dh_before, 0, mask, s, 1, lengths)
        if apart:
            dh = dh_before
        waiting += 1
        if waiting < chunk and s > 0:
            continue
        take_up(s, waiting)
        waiting = 0

    return (dx, dh_before, dc) if need_state else (dx, x.new_empty(0), dc.new_empty(0))
