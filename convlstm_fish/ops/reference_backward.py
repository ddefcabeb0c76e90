"""The gradient of the ConvLSTM derived by hand, in readable PyTorch.

It takes h and c of every step and computes the gates again, block by block of time. The time loop holds only what
depends on the step after it; both weight gradients and the input gradient are taken for a block of steps at once. With
δ the gradient of what it precedes, a_t = tanh(c_t), and z the sums before the activations::

    δh_t += W_h^T * δz_{t+1}
    δo_t  = δh_t ∘ a_t                          δz_o = δo_t ∘ σ'(z_o)
    δc_t += δh_t ∘ o_t ∘ (1 - a_t²) + w_co ∘ δz_o
    δi_t  = δc_t ∘ g_t                          δz_i = δi_t ∘ σ'(z_i)
    δf_t  = δc_t ∘ c_{t-1}                      δz_f = δf_t ∘ σ'(z_f)
    δg_t  = δc_t ∘ i_t                          δz_g = δg_t ∘ (1 - g_t²)
    δc_{t-1} = δc_t ∘ f_t + w_ci ∘ δz_i + w_cf ∘ δz_f
    δw_ci = Σ_t δz_i ∘ c_{t-1}    δw_cf = Σ_t δz_f ∘ c_{t-1}    δw_co = Σ_t δz_o ∘ c_t
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_fish.ops.equations import (
    RECURRENT_ACTIVATIONS,
    State,
    Weights,
    convolve,
    gates,
    per_channel,
    recurrent_pads,
)
from convlstm_fish.ops.geometry import Geometry
from convlstm_fish.ops.packing import Schedule
from convlstm_fish.ops.reference import Recipe, blocks, cut_before, sweep

# σ'(z) from s = σ(z). A hard sigmoid is flat exactly where it has reached 0 or 1.
DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda s: s * (1.0 - s),
    "hard_sigmoid": lambda s: ((s > 0.0) & (s < 1.0)).to(s.dtype) * 0.2,
    "hard_sigmoid_v3": lambda s: ((s > 0.0) & (s < 1.0)).to(s.dtype) / 6.0,
}


def _even(pads: Sequence[tuple[int, int]]) -> list[int] | None:
    """The padding as a convolution operator takes it, or None where before and after differ."""
    return [before for before, _ in pads] if all(before == after for before, after in pads) else None


def _around(pads: Sequence[tuple[int, int]], sign: int) -> list[int]:
    """The padding, or with sign -1 the cropping, as torch.nn.functional.pad takes it."""
    return [sign * p for pair in reversed(pads) for p in pair]


def input_gradient(dy: Tensor, x: Tensor, weight: Tensor, where: Geometry) -> Tensor:
    """Gradient of :func:`~convlstm_fish.ops.equations.convolve` with respect to x."""
    padding = _even(where.pads)
    padded = x if padding is not None else F.pad(x, _around(where.pads, 1))
    dims = len(where.pads)
    dx = torch.ops.aten.convolution_backward(
        dy, padded, weight, None, where.stride, padding or [0] * dims, where.dilation,
        False, [0] * dims, 1, [True, False, False],
    )[0]  # fmt: skip
    return dx if padding is not None else F.pad(dx, _around(where.pads, -1))


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, where: Geometry) -> Tensor:
    """Gradient of :func:`~convlstm_fish.ops.equations.convolve` with respect to weight."""
    padding = _even(where.pads)
    padded = x if padding is not None else F.pad(x, _around(where.pads, 1))
    dims = len(where.pads)
    return torch.ops.aten.convolution_backward(
        dy, padded, weight, None, where.stride, padding or [0] * dims, where.dilation,
        False, [0] * dims, 1, [False, True, False],
    )[1]  # fmt: skip


class Normalised(NamedTuple):
    """What group normalisation without gain makes of y, and what its gradient needs."""

    value: Tensor
    scale: Tensor  # 1 / standard deviation of each group, (N, groups, 1)
    groups: int

    @classmethod
    def of(cls, y: Tensor, groups: int, eps: float) -> Normalised:
        grouped = y.reshape(y.shape[0], groups, -1)
        variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + eps)
        return cls(((grouped - mean) * scale).view_as(y), scale, groups)

    def rows(self, first: int, last: int) -> Normalised:
        """The part that belongs to some of the frames."""
        return Normalised(self.value[first:last], self.scale[first:last], self.groups)

    def backward(self, dy: Tensor) -> Tensor:
        """Gradient with respect to y from that with respect to the value."""
        dy = dy.reshape(dy.shape[0], self.groups, -1)
        value = self.value.reshape(dy.shape)
        inside = dy - dy.mean(2, keepdim=True) - value * (dy * value).mean(2, keepdim=True)
        return (self.scale * inside).view_as(self.value)


def per_channel_sum(x: Tensor) -> Tensor:
    """(N, C, *spatial) summed to (C,)."""
    return x.sum(dim=[0, *range(2, x.dim())])


class _Totals(dict[str, Tensor]):
    """Sums of gradients by name."""

    def add(self, name: str, value: Tensor) -> None:
        self[name] = self[name] + value if name in self else value


def _gates_backward(
    dh: Tensor, dc: Tensor, z: Tensor, c_before: Tensor, w: Weights, recipe: Recipe, total: _Totals
) -> tuple[Tensor, Tensor]:
    """One step, from the gradients of its h and c to those of z and of the c before it."""
    derivative = DERIVATIVES[recipe.activation]
    i, f, g, o, c = gates(z, c_before, w.peephole, RECURRENT_ACTIVATIONS[recipe.activation])
    if w.norm is None:
        a = torch.tanh(c)
        dc = dc + dh * o * (1.0 - a * a)
    else:
        normed = Normalised.of(c, w.norm.groups_c, w.norm.eps)
        gain = per_channel(w.norm.weight_c, c)
        a = torch.tanh(gain * normed.value + per_channel(w.norm.bias_c, c))
        d_normed = dh * o * (1.0 - a * a)
        dc = dc + normed.backward(gain * d_normed)
        total.add("norm_c", per_channel_sum(d_normed * normed.value))
        total.add("norm_c_bias", per_channel_sum(d_normed))
    dz_o = dh * a * derivative(o)
    if w.peephole is not None:
        dc = dc + w.peephole[2] * dz_o
    dz_i = dc * g * derivative(i)
    dz_f = dc * c_before * derivative(f)
    dz_g = dc * i * (1.0 - g * g)
    dc_before = dc * f
    if w.peephole is not None:
        w_ci, w_cf, w_co = w.peephole
        dc_before = dc_before + w_ci * dz_i + w_cf * dz_f
        total.add("weight_ci", (dz_i * c_before).sum_to_size((1, *w_ci.shape)).squeeze(0))
        total.add("weight_cf", (dz_f * c_before).sum_to_size((1, *w_cf.shape)).squeeze(0))
        total.add("weight_co", (dz_o * c).sum_to_size((1, *w_co.shape)).squeeze(0))
    return torch.cat([dz_i, dz_f, dz_g, dz_o], dim=1), dc_before


class History(NamedTuple):
    """The states of one block of time steps: when it was entered, and after each of its steps."""

    entered: State
    h: Sequence[Tensor]
    c: Sequence[Tensor]


Recall = Callable[[int, int], History]


def recall_sequences(h: Tensor, c: Tensor, start: State, recipe: Recipe, plan: Schedule) -> Recall:
    """The history where packed h and c of every step were kept."""
    starts, active = plan.starts, plan.active

    def recall(first: int, last: int) -> History:
        entered = (start[0][:0], start[1][:0]) if recipe.reverse else start
        if recipe.reverse and last < len(active):
            entered = (h[starts[last] : starts[last + 1]], c[starts[last] : starts[last + 1]])
        elif not recipe.reverse and first > 0:
            rows = slice(starts[first - 1], starts[first - 1] + active[first])
            entered = (h[rows], c[rows])
        steps = [slice(starts[t], starts[t + 1]) for t in range(first, last)]
        return History(entered, [h[rows] for rows in steps], [c[rows] for rows in steps])

    return recall


def recall_marks(
    marks: Sequence[State], frames: Tensor, start: State, w: Weights, recipe: Recipe, plan: Schedule, block_steps: int
) -> Recall:
    """The history where only the state at the entrance of each block was kept: the rest is computed again."""
    starts, active = plan.starts, plan.active

    def recall(first: int, last: int) -> History:
        h, c = marks[first // block_steps]
        going_on = active[first]
        if recipe.reverse:
            going_on = active[last] if last < len(active) else 0
        entered = (h[:going_on], c[:going_on])
        done = sweep(
            frames[starts[first] : starts[last]], entered, start, first, active[first:last], w, recipe,
            keep_h=True, keep_c=True,
        )  # fmt: skip
        return History(entered, done.h, done.c)

    return recall


def _before(past: Sequence[Tensor], entered: Tensor, initial: Tensor, active: Sequence[int], reverse: bool) -> Tensor:
    """h or c as the clips of each step in a block had it before that step, packed."""
    if not reverse:
        return torch.cat([entered, *(after[:count] for after, count in zip(past, active[1:]))])
    found = []
    for after, count in zip([*past[1:], entered], active):
        found += [after, initial[after.shape[0] : count]]
    return torch.cat(found)


def conv_lstm_backward(
    grad_h: Tensor | None,
    grad_end: State,
    frames: Tensor,
    start: State,
    w: Weights,
    recipe: Recipe,
    plan: Schedule,
    recall: Recall,
    *,
    block_steps: int,
    need_frames: bool = True,
) -> dict[str, Tensor]:
    """All gradients of a sequence; frames and what belongs to them are packed, (sum of lengths, ...).

    Args:
        grad_h: gradient with respect to h of every step, None for zeros.
        grad_end: gradients with respect to the final h and c, the longest clip first.
        frames: the input.
        start: h_0 and c_0, the longest clip first.
        w: weights, the mask with the longest clip first.
        recipe: the options of the call.
        plan: the packing.
        recall: gives the states of the time steps first..last-1.
        block_steps: how many time steps to recall and to compute gates and weight gradients for at once.
        need_frames: whether the gradient with respect to the frames is wanted.

    Returns:
        By name: frames (if wanted), h_0, c_0, weight_ih, weight_hh, and, where the call has them, bias, weight_ci,
        weight_cf, weight_co, norm_ih, norm_hh, norm_c, norm_c_bias, mask; parameters in the dtype of c.
    """
    dtype, wide = start[0].dtype, start[1].dtype
    where, active, starts, steps = recipe.where, plan.active, plan.starts, len(plan.active)
    ones = (1,) * len(where.out)
    inner = Geometry(ones, ones, tuple(recurrent_pads(w.weight_hh)), where.out)
    total = _Totals()
    d_frames: dict[int, Tensor] = {}
    d_start: tuple[list[Tensor], list[Tensor]] = ([], [])

    dh, dc = grad_end[0][:0].to(wide), grad_end[1][:0]
    for first, last in reversed(blocks(active, block_steps, recipe.reverse)):
        steps_here = range(first, last)
        x = frames[starts[first] : starts[last]]
        past = recall(first, last)
        h_before = _before(past.h, past.entered[0], start[0], active[first:last], recipe.reverse)
        c_before = _before(past.c, past.entered[1], start[1], active[first:last], recipe.reverse)
        mask = None if w.mask is None else torch.cat([w.mask[: active[t]] for t in steps_here])
        h_in = h_before if mask is None else h_before * mask
        y_ih = convolve(x, w.weight_ih, w.bias if w.norm is None else None, where.stride, where.pads, where.dilation)
        y_hh = convolve(h_in, w.weight_hh, None, inner.stride, inner.pads, inner.dilation)
        if w.norm is None:
            z = y_ih.to(wide) + y_hh
        else:
            norm_ih = Normalised.of(y_ih.to(wide), w.norm.groups, w.norm.eps)
            norm_hh = Normalised.of(y_hh.to(wide), w.norm.groups, w.norm.eps)
            gain_ih, gain_hh = per_channel(w.norm.weight_ih, y_ih), per_channel(w.norm.weight_hh, y_hh)
            z = gain_ih * norm_ih.value + gain_hh * norm_hh.value
            if w.bias is not None:
                z = z + per_channel(w.bias, z)

        dz_here: dict[int, Tensor] = {}
        d_hh_here: dict[int, Tensor] = {}
        for t in steps_here if recipe.reverse else reversed(steps_here):
            rows = slice(starts[t] - starts[first], starts[t + 1] - starts[first])
            if active[t] > dh.shape[0]:  # clips that end here
                dh, dc = (torch.cat([d, end[d.shape[0] : active[t]].to(wide)]) for d, end in zip((dh, dc), grad_end))
            if grad_h is not None:
                dh = dh + grad_h[starts[t] : starts[t + 1]]
            dz, dc = _gates_backward(dh, dc, z[rows], c_before[rows], w, recipe, total)
            dz_here[t] = d_hh = dz
            if w.norm is not None:
                d_hh = norm_hh.rows(rows.start, rows.stop).backward(gain_hh * dz)
            d_hh_here[t] = d_hh = d_hh.to(dtype)
            dh_in = input_gradient(d_hh, h_in[rows], w.weight_hh, inner)
            if mask is not None:
                d_mask = dh_in * h_before[rows]
                total.add("mask", F.pad(d_mask, [0, 0] * (d_mask.dim() - 1) + [0, active[0] - active[t]]))
                dh_in = dh_in * mask[rows]
            dh = dh_in.to(wide)
            # The clips that step t took over from another step; for the others it was the first.
            neighbour = t + 1 if recipe.reverse else t - 1
            going_on = min(active[t], active[neighbour]) if 0 <= neighbour < steps else 0
            d_start[0].append(dh[going_on:])
            d_start[1].append(dc[going_on:])
            dh, dc = dh[:going_on], dc[:going_on]
            if cut_before(t, recipe):
                dh, dc = torch.zeros_like(dh), torch.zeros_like(dc)

        dz = torch.cat([dz_here[t] for t in steps_here])
        d_hh = torch.cat([d_hh_here[t] for t in steps_here])
        d_ih = dz
        if w.norm is not None:
            total.add("norm_ih", per_channel_sum(dz * norm_ih.value))
            total.add("norm_hh", per_channel_sum(dz * norm_hh.value))
            d_ih = norm_ih.backward(gain_ih * dz)
        if w.bias is not None:
            total.add("bias", per_channel_sum(dz))
        d_ih = d_ih.to(dtype)
        total.add("weight_ih", weight_gradient(d_ih, x, w.weight_ih, where).to(wide))
        total.add("weight_hh", weight_gradient(d_hh, h_in, w.weight_hh, inner).to(wide))
        if need_frames:
            d_frames[first] = input_gradient(d_ih, x, w.weight_ih, where)

    if need_frames:
        total["frames"] = torch.cat([d_frames[first] for first in sorted(d_frames)])
    total["h_0"], total["c_0"] = (torch.cat(pieces[::-1]) for pieces in d_start)
    total["h_0"] = total["h_0"].to(dtype)
    return dict(total)
