"""The reference ConvLSTM as one operator, so that a compiled graph does not grow with the number of time steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_fish.ops.equations import Norm, State, Weights
from convlstm_fish.ops.geometry import Geometry
from convlstm_fish.ops.packing import Schedule, pack, schedule, sort, unpack, unsort
from convlstm_fish.ops.reference import Recipe, steps_ahead, walk
from convlstm_fish.ops.reference_backward import conv_lstm_backward, recall_marks, recall_sequences

# The tensors of a call by name, in the order of the operators' arguments.
REQUIRED = ("input", "h_0", "c_0", "weight_ih", "weight_hh")
OPTIONAL = ("bias", "weight_ci", "weight_cf", "weight_co", "norm_ih", "norm_hh", "norm_c", "norm_c_bias", "mask")
TENSORS = REQUIRED + OPTIONAL
_CALL = (
    ", ".join(f"Tensor {name}" for name in REQUIRED)
    + ", "
    + ", ".join(f"Tensor? {name}" for name in OPTIONAL)
    + ", Tensor? lengths, SymInt[] where, int[] groups, float eps, str activation, bool reverse, "
    "int detach_every, int checkpoint_every, bool return_sequences"
)


class _Call:
    """The arguments of the operator, made into those of the functions behind it."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        tensors = dict(zip(TENSORS, args))
        self.lengths, numbers, groups, eps, activation, reverse, detach_every, every, self.return_sequences = args[
            len(TENSORS) :
        ]
        self.input: Tensor = tensors["input"]
        self.clips, self.steps = self.input.shape[:2]
        dims = self.input.dim() - 3
        stride, dilation, before, after = (tuple(numbers[k * dims : (k + 1) * dims]) for k in range(4))
        where = Geometry(stride, dilation, tuple(zip(before, after)), tuple(tensors["h_0"].shape[2:]))
        self.recipe = Recipe(where, activation, reverse, detach_every or None)
        self.checkpoint_every: int | None = every or None
        self.present = [name for name in TENSORS if tensors[name] is not None]
        self.tensors = tensors
        norm = None
        if groups:
            ih, hh, c, c_bias = (tensors[name] for name in ("norm_ih", "norm_hh", "norm_c", "norm_c_bias"))
            norm = Norm(groups[0], groups[1], ih, hh, c, c_bias, eps)
        peephole = None
        if tensors["weight_ci"] is not None:
            peephole = (tensors["weight_ci"], tensors["weight_cf"], tensors["weight_co"])
        self.weights = Weights(
            tensors["weight_ih"], tensors["weight_hh"], tensors["bias"], peephole, norm, tensors["mask"]
        )

    def packed(self) -> tuple[Schedule, Tensor, State, Weights]:
        """The plan, and the frames, first states and weights sorted by it."""
        plan = schedule(self.lengths, self.clips, self.steps, self.input.device)
        start = (sort(self.tensors["h_0"], plan), sort(self.tensors["c_0"], plan))
        w = self.weights
        if w.mask is not None:
            w = w._replace(mask=sort(w.mask, plan))
        return plan, pack(self.input, plan), start, w

    def block_steps(self, plan: Schedule) -> int:
        """Time steps computed at once."""
        return self.checkpoint_every or steps_ahead(plan.active[0], self.weights, self.recipe.where)


def _padded(marks: list[State], which: int, clips: int) -> Tensor:
    """h or c of all marks, (blocks, N, ...), zero for clips that are not under way."""
    rows = [mark[which] for mark in marks]
    return torch.stack([F.pad(x, [0, 0] * (x.dim() - 1) + [0, clips - x.shape[0]]) for x in rows])


@torch.library.custom_op(
    "convlstm_fish::conv_lstm_reference",
    mutates_args=(),
    schema=f"({_CALL}, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output, h_n, c_n, and h and c for the backward pass: of every step, or with checkpoints of every block."""
    call, save = _Call(args[:-1]), args[-1]
    with torch.no_grad():
        plan, frames, start, w = call.packed()
        marked = save and call.checkpoint_every is not None
        every_step = save and not marked
        done = walk(
            frames, start, w, call.recipe, plan, call.block_steps(plan),
            keep_h=call.return_sequences or every_step, keep_c=every_step, keep_marks=marked,
        )  # fmt: skip

        def sequence(steps: list[Tensor]) -> Tensor:
            return unpack(torch.cat(steps), plan, call.clips, call.steps).contiguous()

        h_n, c_n = (unsort(state, plan).clone() for state in done.state)
        nothing_h, nothing_c = h_n.new_empty(0), c_n.new_empty(0)
        output = sequence(done.h) if call.return_sequences else nothing_h
        if marked:
            return output, h_n, c_n, _padded(done.marks, 0, call.clips), _padded(done.marks, 1, call.clips)
        if every_step:
            kept_h = nothing_h.clone() if call.return_sequences else sequence(done.h)
            return output, h_n, c_n, kept_h, sequence(done.c)
        return output, h_n, c_n, nothing_h.clone(), nothing_c


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, save = _Call(args[:-1]), args[-1]
    h, c = call.tensors["h_0"], call.tensors["c_0"]
    shape = h.shape[1:]
    output = h.new_empty(call.clips, call.steps, *shape) if call.return_sequences else h.new_empty(0)
    kept_h, kept_c = h.new_empty(0), c.new_empty(0)
    if save and call.checkpoint_every is not None:
        marks = -(-call.steps // call.checkpoint_every)
        kept_h, kept_c = h.new_empty(marks, call.clips, *shape), c.new_empty(marks, call.clips, *shape)
    elif save:
        kept_c = c.new_empty(call.clips, call.steps, *shape)
        if not call.return_sequences:
            kept_h = h.new_empty(call.clips, call.steps, *shape)
    return output, h.new_empty(h.shape), c.new_empty(c.shape), kept_h, kept_c


@torch.library.custom_op(
    "convlstm_fish::conv_lstm_reference_backward",
    mutates_args=(),
    schema=f"({_CALL}, Tensor grad_output, Tensor grad_h, Tensor grad_c, Tensor output, Tensor kept_h, Tensor kept_c, "
    "bool need_input) -> Tensor[]",
)
def _backward(*args: Any) -> list[Tensor]:
    """The gradient of every tensor of the call that is there, in the order of TENSORS."""
    call = _Call(args[:-7])
    grad_output, grad_h, grad_c, output, kept_h, kept_c, need_input = args[-7:]
    with torch.no_grad():
        plan, frames, start, w = call.packed()
        size = call.block_steps(plan)
        if call.checkpoint_every is not None:
            marks = list(zip(kept_h, kept_c))
            recall = recall_marks(marks, frames, start, w, call.recipe, plan, size)
        else:
            h = pack(output if call.return_sequences else kept_h, plan)
            recall = recall_sequences(h, pack(kept_c, plan), start, call.recipe, plan)
        grads = conv_lstm_backward(
            pack(grad_output, plan) if call.return_sequences else None,
            (sort(grad_h, plan), sort(grad_c, plan)),
            frames, start, w, call.recipe, plan, recall, block_steps=size, need_frames=need_input,
        )  # fmt: skip
        if need_input:
            grads["input"] = unpack(grads.pop("frames"), plan, call.clips, call.steps)
        for name in ("h_0", "c_0", "mask"):
            if name in grads:
                grads[name] = unsort(grads[name], plan)
        return [
            grads[name].to(call.tensors[name].dtype).contiguous() if name in grads else grad_h.new_empty(0)
            for name in call.present
        ]


@_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    call, need_input = _Call(args[:-7]), args[-1]
    return [
        call.tensors[name].new_empty(call.tensors[name].shape if name != "input" or need_input else 0)
        for name in call.present
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[: len(TENSORS) + 1], inputs[len(TENSORS) + 1 : -1]
    ctx.save_for_backward(*tensors, output[0], output[3], output[4])
    ctx.mark_non_differentiable(output[3], output[4])


def _autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, output, kept_h, kept_c = ctx.saved_tensors
    found = torch.ops.convlstm_fish.conv_lstm_reference_backward(
        *tensors, *ctx.options, grads[0], grads[1], grads[2], output, kept_h, kept_c, ctx.needs_input_grad[0]
    )
    by_name = dict(zip([name for name, tensor in zip(TENSORS, tensors) if tensor is not None], found))
    if not ctx.needs_input_grad[0]:
        del by_name["input"]
    return (*(by_name.get(name) for name in TENSORS), *[None] * (len(ctx.options) + 2))


_forward.register_autograd(_autograd, setup_context=_setup_context)


def conv_lstm_compiled(
    input: Tensor,
    start: State,
    w: Weights,
    recipe: Recipe,
    lengths: Tensor | None,
    return_sequences: bool,
    checkpoint_every: int | None,
) -> tuple[Tensor | None, State]:
    """:func:`~convlstm_fish.ops.reference.conv_lstm_reference` from checked and cast arguments, as one operator."""
    norm, where = w.norm, recipe.where
    tensors = [
        input, *start, w.weight_ih, w.weight_hh, w.bias, *(w.peephole or (None, None, None)),
        *((None,) * 4 if norm is None else (norm.weight_ih, norm.weight_hh, norm.weight_c, norm.bias_c)), w.mask,
    ]  # fmt: skip
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    before, after = zip(*where.pads)
    output, h_n, c_n, _, _ = torch.ops.convlstm_fish.conv_lstm_reference(
        *tensors,
        lengths,
        [*where.stride, *where.dilation, *before, *after],
        [] if norm is None else [norm.groups, norm.groups_c],
        0.0 if norm is None else norm.eps,
        recipe.activation,
        recipe.reverse,
        recipe.detach_every or 0,
        checkpoint_every or 0,
        return_sequences,
        save,
    )
    return (output if return_sequences else None), (h_n, c_n)
