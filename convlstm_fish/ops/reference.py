"""The ConvLSTM in plain PyTorch: any device, any dtype, 1 to 3 spatial dimensions, gradients by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from convlstm_fish.ops.checks import check_arguments
from convlstm_fish.ops.equations import (
    RECURRENT_ACTIVATIONS,
    Norm,
    Peephole,
    State,
    Weights,
    first_state,
    gates,
    input_part,
    recurrent_part,
    squash,
)
from convlstm_fish.ops.geometry import Geometry, Padding, compute_dtype, state_dtype
from convlstm_fish.ops.packing import Schedule, blank_padding, pack, schedule, sort, unpack, unsort, valid_steps

# Without gradients the input convolution runs ahead of the recurrence by about this many numbers, so that a long
# clip needs no more memory than a short one.
AHEAD = 1 << 20


class Recipe(NamedTuple):
    """What a call does, apart from its tensors."""

    where: Geometry
    activation: str
    reverse: bool
    detach_every: int | None


class Sweep(NamedTuple):
    """What some time steps leave behind: h and c of each in the order of time, and where the clips stand."""

    h: list[Tensor]
    c: list[Tensor]
    state: State
    ended: list[State]  # states of the clips that ended on the way, the longest first


def sweep(
    frames: Tensor,
    state: State,
    start: State,
    first: int,
    active: Sequence[int],
    w: Weights,
    recipe: Recipe,
    *,
    keep_h: bool = False,
    keep_c: bool = False,
    valid: Tensor | None = None,
) -> Sweep:
    """The time steps from ``first`` on, one for each number of clips in ``active``.

    Args:
        frames: their packed frames.
        state: of the clips already under way.
        start: h_0 and c_0 of all clips; in reverse a clip joins at its own last step.
        first: the number of the first of these steps, whichever is computed first.
        active: how many clips each step has.
        w: weights in their compute dtypes.
        recipe: the options of the call.
        keep_h: keep h of each step.
        keep_c: keep c of each step.
        valid: (N, T) or None; where False, a clip stands still and its kept h is zero.
    """
    activation = RECURRENT_ACTIVATIONS[recipe.activation]
    x_parts = input_part(frames, w, recipe.where).split(list(active))
    h, c = state
    dtype, wide = start[0].dtype, start[1].dtype
    kept_h: list[Tensor] = []
    kept_c: list[Tensor] = []
    ended: list[State] = []
    for k in reversed(range(len(active))) if recipe.reverse else range(len(active)):
        t, count = first + k, active[k]
        under_way = h.shape[0]
        if count < under_way:
            ended.insert(0, (h[count:], c[count:]))
            h, c = h[:count], c[:count]
        if cut_before(t, recipe):
            h, c = h.detach(), c.detach()
        if count > under_way:
            h, c = (torch.cat([now, begin[under_way:count]]) for now, begin in zip((h, c), start))
        h_in = h if w.mask is None else h * w.mask[:count]
        z = x_parts[k].to(wide) + recurrent_part(h_in, w)
        *_, o, c_next = gates(z, c, w.peephole, activation)
        h_next = (o * squash(c_next, w.norm)).to(dtype)
        if valid is None:
            h, c = h_next, c_next
        else:
            here = valid[:, t].view(-1, *[1] * (h.dim() - 1))
            h, c = torch.where(here, h_next, h), torch.where(here, c_next, c)
        if keep_h:
            kept_h.append(h if valid is None else torch.where(here, h, 0.0))
        if keep_c:
            kept_c.append(c)
    if recipe.reverse:
        kept_h.reverse()
        kept_c.reverse()
    return Sweep(kept_h, kept_c, (h, c), ended)


def cut_before(t: int, recipe: Recipe) -> bool:
    """Whether truncated back-propagation lets no gradient pass from step t to the one computed before it."""
    edge = t + 1 if recipe.reverse else t
    return recipe.detach_every is not None and edge > 0 and edge % recipe.detach_every == 0


def blocks(active: Sequence[int], size: int, reverse: bool) -> list[tuple[int, int]]:
    """(first, last + 1) of the blocks of ``size`` time steps, in the order of processing."""
    ranges = [(first, min(first + size, len(active))) for first in range(0, len(active), size)]
    return ranges[::-1] if reverse else ranges


def steps_ahead(clips: int, w: Weights, where: Geometry) -> int:
    """How many time steps' input parts are held at once where nothing needs them all."""
    numbers = clips * w.weight_ih.shape[0]
    for size in where.out:
        numbers *= size
    return max(1, AHEAD // numbers)


class Walk(NamedTuple):
    """What a whole sequence leaves behind: the states of each step, of the end, and of each block's entrance."""

    h: list[Tensor]
    c: list[Tensor]
    state: State
    marks: list[State]


def walk(
    frames: Tensor,
    start: State,
    w: Weights,
    recipe: Recipe,
    plan: Schedule,
    block_steps: int,
    *,
    keep_h: bool = False,
    keep_c: bool = False,
    keep_marks: bool = False,
    recompute: bool = False,
    valid: Tensor | None = None,
) -> Walk:
    """All time steps of packed frames, in blocks of time; states are in the order of the plan.

    With ``recompute``, autograd keeps a block's entrance only and computes its inside again for the backward pass.
    """
    starts = plan.starts
    state = (start[0][:0], start[1][:0]) if recipe.reverse else start
    h: list[list[Tensor]] = []
    c: list[list[Tensor]] = []
    ended: list[State] = []
    marks: list[State] = []
    for first, last in blocks(plan.active, block_steps, recipe.reverse):

        def run(frames: Tensor, state: State, first: int = first, last: int = last) -> Sweep:
            return sweep(
                frames, state, start, first, plan.active[first:last], w, recipe,
                keep_h=keep_h, keep_c=keep_c, valid=valid,
            )  # fmt: skip

        if keep_marks:
            marks.append(state)
        part = frames[starts[first] : starts[last]]
        if recompute:
            done = checkpoint(run, part, state, use_reentrant=False, preserve_rng_state=False)
        else:
            done = run(part, state)
        state = done.state
        h.append(done.h)
        c.append(done.c)
        ended = done.ended + ended
    if recipe.reverse:
        for found in (h, c, marks):
            found.reverse()
    if ended:
        whole = [state, *ended]
        state = (torch.cat([part[0] for part in whole]), torch.cat([part[1] for part in whole]))
    return Walk([step for block in h for step in block], [step for block in c for step in block], state, marks)


def exporting() -> bool:
    """Whether torch.export makes a graph in its default mode; its strict mode is to torch.compile's rules."""
    # torch 2.11 calls everything that torch.compile traces exporting.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def conv_lstm_reference(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Peephole | None = None,
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
    """:func:`convlstm_fish.ops.conv_lstm` in plain PyTorch; see there for the arguments.

    The input convolution runs over many time steps at once; only the recurrent one is in the loop. Under torch.compile
    the layer is one operator with the hand-derived gradient of ``reference_backward.py``, so that the graph does not
    grow with T. torch.export (in its default, non-strict mode) unrolls the loop into ATen operators, so that the graph
    runs without this package.
    """
    where = check_arguments(
        input, hx, weight_ih, weight_hh, bias, peephole, stride=stride, padding=padding, dilation=dilation,
        recurrent_activation=recurrent_activation, recurrent_mask=recurrent_mask, lengths=lengths,
        checkpoint_every=checkpoint_every, detach_every=detach_every, norm=norm,
    )  # fmt: skip
    clips, steps = input.shape[:2]
    dtype = compute_dtype(input)
    wide = state_dtype(dtype)
    start = first_state(input, hx, weight_hh.shape[1], where)
    w = Weights(
        weight_ih.to(dtype),
        weight_hh.to(dtype),
        None if bias is None else bias.to(dtype if norm is None else wide),
        None if peephole is None else (peephole[0].to(wide), peephole[1].to(wide), peephole[2].to(wide)),
        None if norm is None else norm.to(wide),
        None if recurrent_mask is None else recurrent_mask.to(dtype),
    )
    recipe = Recipe(where, recurrent_activation, reverse, detach_every)
    input = input.to(dtype)

    if torch.compiler.is_dynamo_compiling():
        from convlstm_fish.ops.compiled import conv_lstm_compiled

        return conv_lstm_compiled(input, start, w, recipe, lengths, return_sequences, checkpoint_every)

    valid = None
    if lengths is not None and exporting():
        # An exported graph cannot depend on the values of lengths: compute all steps, and let ended clips stand still.
        valid = valid_steps(lengths, steps, input.device)
        input = blank_padding(input, valid)
        lengths = None
    plan = schedule(lengths, clips, steps, input.device)
    start = (sort(start[0], plan), sort(start[1], plan))
    if w.mask is not None:
        w = w._replace(mask=sort(w.mask, plan))
    tracked = torch.is_grad_enabled()
    if torch._C._functorch.maybe_current_level() is not None:
        checkpoint_every = None  # torch.func knows no checkpoints; the gradients are the same without
    if checkpoint_every is not None and tracked:
        block_steps = checkpoint_every
    else:
        block_steps = steps if tracked or valid is not None else steps_ahead(clips, w, where)
    done = walk(
        pack(input, plan), start, w, recipe, plan, block_steps,
        keep_h=return_sequences, recompute=tracked and checkpoint_every is not None, valid=valid,
    )  # fmt: skip
    state = (unsort(done.state[0], plan), unsort(done.state[1], plan))
    if not return_sequences:
        return None, state
    if plan.frames is None:
        return torch.stack(done.h, dim=1), state
    return unpack(torch.cat(done.h), plan, clips, steps), state
