"""The ConvLSTM on a CPU, channels last: x and h are convolved side by side, a gate at a time, and a gradient by hand.

oneDNN convolves channels-last images several times as fast as others where channels are few, and a step's numbers stay
in the cache between its operations. Each gate is an image of its own, for torch works on a few channels of many several
times as slowly. The gates are kept for the backward pass, whose equations are those of ``reference_backward.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_fish.ops.checks import check_arguments
from convlstm_fish.ops.equations import Norm, Peephole, State, first_state, recurrent_pads
from convlstm_fish.ops.geometry import Geometry, Padding, compute_dtype, per_dim
from convlstm_fish.ops.reference import conv_lstm_reference
from convlstm_fish.ops.workspace import WORKSPACE

_FEWEST_GATES = 1 << 17  # of a step, measured on two cores

# From z, which is used up, into another tensor or z itself.
_ACTIVATE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda z, out: torch.sigmoid(z, out=out),
    "hard_sigmoid": lambda z, out: torch.clamp(z.mul_(0.2).add_(0.5), 0.0, 1.0, out=out),
    "hard_sigmoid_v3": lambda z, out: torch.div(z.add_(3.0).clamp_(0.0, 6.0), 6.0, out=out),
}

_STEEPNESS = {"hard_sigmoid": 0.2, "hard_sigmoid_v3": 1 / 6}


def covers(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Peephole | None = None,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    recurrent_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    checkpoint_every: int | None = None,
    detach_every: int | None = None,
    norm: Norm | None = None,
    **_: Any,
) -> bool:
    """Whether :func:`conv_lstm_channels_last` computes this call."""
    nothing = (peephole, lengths, checkpoint_every, detach_every, norm)
    return (
        input.device.type == "cpu"
        and input.dim() == 5
        and weight_ih.shape[2:] == weight_hh.shape[2:]
        and compute_dtype(input) in (torch.float32, torch.float64, torch.bfloat16)
        and all(option is None for option in nothing)
        and all(per_dim(name, value, 2, 1) == (1, 1) for name, value in (("stride", stride), ("dilation", dilation)))
        and (recurrent_mask is None or not recurrent_mask.requires_grad)
        and torch._C._functorch.maybe_current_level() is None
    )


def pays(input: Tensor, weight_ih: Tensor, weight_hh: Tensor) -> bool:
    """Whether it is faster than the reference: not on few pixels, nor where the weights outweigh them."""
    pixels = input.shape[0] * input.shape[-2] * input.shape[-1]
    return pixels * weight_hh.shape[0] > _FEWEST_GATES and 32 * pixels >= weight_ih.numel() + weight_hh.numel()


def _by_planes(dtype: torch.dtype) -> bool:
    """Whether oneDNN makes the weights' gradients in half the time of images whose channels are planes.

    So it is with AVX2, in vectors of 8 numbers; AVX-512 reads channels last as well.
    """
    return dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _in_reverse(channels: int) -> bool:
    """Whether oneDNN runs a convolution with the taps in reverse sooner than the adjoint of one, of so many channels.

    So it is with AVX2, by a tenth to a third.
    """
    return channels < 128 and torch.backends.cpu.get_cpu_capability() == "AVX2"


class _Recipe(NamedTuple):
    """What a call does, apart from its tensors."""

    where: Geometry
    padding: Padding
    activation: str
    reverse: bool
    return_sequences: bool

    def order(self, steps: int) -> range:
        return range(steps - 1, -1, -1) if self.reverse else range(steps)


class _Kept(NamedTuple):
    """What the backward pass needs: (T, N, ...) channels last."""

    patches: Tensor  # x and h of the step before, padded, side by side
    gates: Tensor  # (T, 4, N, H', W', C_h): i, f, sigmoid(2z) in place of g, o
    cells: Tensor  # c of the step
    squashed: Tensor  # tanh of it
    weight: Tensor


def _with_g_times(weight: Tensor, factor: int) -> Tensor:
    """With the rows of g times 2 or 4, which rounds nothing.

    tanh(z) is 2 s - 1 with s = sigmoid(2z), and torch's sigmoid is several times as fast as its tanh. The derivative,
    4 s (1 - s), is that of the sigmoid but for the 4, so that all four gates have the same.
    """
    hidden = weight.shape[0] // 4
    weight = weight.clone()
    weight[2 * hidden : 3 * hidden] *= factor
    return weight


def _image(rows: Tensor) -> Tensor:
    """(N, H, W, C) as (N, C, H, W)."""
    return rows.permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C)."""
    return image.permute(0, 2, 3, 1)


def _by_gate(rows: Tensor) -> Tensor:
    """(N, H, W, 4 * C) as (4, N, H, W, C)."""
    return rows.unflatten(3, (4, -1)).permute(3, 0, 1, 2, 4)


def _inside(size: Sequence[int], pads: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    """Where an unpadded image lies in a padded one (N, H, W, C)."""
    return (slice(None), *(slice(before, before + n) for n, (before, _) in zip(size, pads)))


def _forward(
    x: Tensor, h_0: Tensor, c_0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None,
    mask: Tensor | None, recipe: _Recipe, keep: bool,
) -> tuple[Tensor | None, Tensor, Tensor, _Kept | None]:  # fmt: skip
    """Runs the steps; x (N, T, C, H, W) and states in their compute dtypes."""
    clips, steps, channels, *size = x.shape
    hidden, out = weight_hh.shape[1], recipe.where.out
    wide, dtype = c_0.dtype, x.dtype
    padded = [n + k - 1 for n, k in zip(out, weight_hh.shape[2:])]
    x_place = _inside(size, recipe.where.pads)
    h_place = _inside(out, recurrent_pads(weight_hh))
    weight = torch.cat([weight_ih, weight_hh], dim=1).contiguous(memory_format=torch.channels_last)
    weight_twice, bias_twice = _with_g_times(weight, 2), None if bias is None else _with_g_times(bias, 2)
    # A gate of 16 channels or a multiple is convolved as fast alone, and need not be taken apart from the others.
    parts = 4 if hidden % 16 == 0 else 1
    weights = [w.contiguous(memory_format=torch.channels_last) for w in weight_twice.chunk(parts)]
    biases = [None] * parts if bias_twice is None else bias_twice.chunk(parts)
    minus_one = torch.tensor(-1.0, dtype=wide)
    kept_steps = steps if keep else 1
    patches = WORKSPACE.empty(kept_steps, clips, *padded, weight.shape[1], dtype=dtype, zero=True)
    gates = WORKSPACE.empty(kept_steps, 4, clips, *out, hidden, dtype=wide)
    cells = WORKSPACE.empty(kept_steps, clips, *out, hidden, dtype=wide)
    squashed = WORKSPACE.empty(kept_steps, clips, *out, hidden, dtype=wide)
    output = WORKSPACE.empty(clips, steps, *out, hidden, dtype=dtype) if recipe.return_sequences else None
    product = WORKSPACE.empty(clips, *out, hidden, dtype=dtype)
    wide_product = product if dtype == wide else WORKSPACE.empty(clips, *out, hidden, dtype=wide)
    h, c = _rows(h_0), _rows(c_0).clone(memory_format=torch.contiguous_format)
    mask = None if mask is None else _rows(mask)
    for t in recipe.order(steps):
        slot = t if keep else 0
        patch = patches[slot]
        patch[x_place][..., :channels].copy_(_rows(x[:, t]))
        patch[h_place][..., channels:].copy_(h if mask is None else h * mask)
        z = [_rows(F.conv2d(_image(patch), w, b)) for w, b in zip(weights, biases)]
        if parts == 1:
            z = list(gates[slot].copy_(_by_gate(z[0])))
        elif dtype != wide:
            z = [gate.copy_(each) for gate, each in zip(gates[slot], z)]
        activate = _ACTIVATE[recipe.activation]
        i, f, s, o = (
            function(each, gate if keep else each)
            for function, each, gate in zip((activate, activate, _ACTIVATE["sigmoid"], activate), z, gates[slot])
        )
        c = torch.mul(f, c, out=cells[slot]) if keep else c.mul_(f)
        c.addcmul_(i, s, value=2.0).sub_(i)
        a = torch.add(c, c, out=squashed[slot]).sigmoid_()
        torch.add(minus_one, a, alpha=2.0, out=a)
        h = product if output is None else output[:, t]
        h = torch.mul(o, a, out=h) if dtype == wide else h.copy_(torch.mul(o, a, out=wide_product))
    kept = _Kept(patches, gates, cells, squashed, weight) if keep else None
    return output, h.clone(), c.clone(), kept


class _ChannelsLast(torch.autograd.Function):
    """The sequence with its gradient; a second derivative goes through the reference."""

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *tensors: Any) -> tuple[Tensor | None, Tensor, Tensor]:
        x, h_0, c_0, weight_ih, weight_hh, bias, mask = tensors
        output, h, c, kept = _forward(x, h_0, c_0, weight_ih, weight_hh, bias, mask, recipe, True)
        ctx.save_for_backward(*tensors, *(kept or ()))
        ctx.recipe = recipe
        ctx.set_materialize_grads(False)
        # Detached, for views that a function returns may not be changed in place.
        return (
            None if output is None else output.permute(0, 1, 4, 2, 3).detach(),
            _image(h).detach(),
            _image(c).detach(),
        )

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_h: Tensor | None, d_c: Tensor | None) -> tuple[Any, ...]:
        needed, grads = ctx.needs_input_grad[1:], (d_output, d_h, d_c)
        tensors, kept = ctx.saved_tensors[: len(needed)], _Kept(*ctx.saved_tensors[len(needed) :])
        if torch.is_grad_enabled():
            return None, *_differentiable(tensors, needed, grads, ctx.recipe)
        return None, *_gradients(tensors, needed, grads, ctx.recipe, kept)


def _differentiable(
    tensors: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor | None], recipe: _Recipe
) -> list[Tensor | None]:
    """The gradients as functions that can be differentiated again."""
    # Views, for an input may come of others: what goes through those is not for this function to count.
    tensors = [None if t is None else t.view_as(t) for t in tensors]
    x, h_0, c_0, weight_ih, weight_hh, bias, mask = tensors
    output, state = conv_lstm_reference(
        x, (h_0, c_0), weight_ih, weight_hh, bias, padding=recipe.padding,
        recurrent_activation=recipe.activation, recurrent_mask=mask, reverse=recipe.reverse,
        return_sequences=recipe.return_sequences,
    )  # fmt: skip
    given = [(y, dy) for y, dy in zip((output, *state), grads) if y is not None and dy is not None]
    wanted = [t for t, need in zip(tensors, needed) if t is not None and need]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in given], wanted, [dy for _, dy in given], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needed]


class _Adjoint:
    """The adjoint of the convolution of a padded image.

    Args:
        weight: (4 * C_h, C, kh, kw).
        state: the size (N, H', W', C_h).
        pads: of the image, which then is as large as the state; None for the gradient of the padded image.

    Attributes:
        dz: (N, H', W', 4 * C_h), to be written before each call.
    """

    def __init__(self, weight: Tensor, state: Sequence[int], pads: Sequence[tuple[int, int]] | None) -> None:
        clips, *out, _ = state
        gates, channels, *kernel = weight.shape
        whole = [n + k - 1 for n, k in zip(out, kernel)]
        size, before = (whole, [0, 0]) if pads is None else (out, [first for first, _ in pads])
        self._weight, self._in_reverse = weight, _in_reverse(channels)
        if not self._in_reverse:
            self._place = (slice(None), *(slice(first, first + n) for first, n in zip(before, size)))
            self._blank = torch.empty(clips, *whole, channels, dtype=weight.dtype)  # only its shape matters
            self.dz = WORKSPACE.empty(clips, *out, gates, dtype=weight.dtype)
            return
        margins = [(k - 1 - first, n - m + first) for k, first, n, m in zip(kernel, before, size, out)]
        padded = [n + k - 1 for n, k in zip(size, kernel)]
        self._padded = WORKSPACE.empty(clips, *padded, gates, dtype=weight.dtype, zero=True)
        self.dz = self._padded[_inside(out, margins)]
        self._weight = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)

    def __call__(self) -> Tensor:
        """(N, H, W, C)."""
        if self._in_reverse:
            return _rows(F.conv2d(_image(self._padded), self._weight))
        found = torch.ops.aten.convolution_backward(
            _image(self.dz), _image(self._blank), self._weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
            [True, False, False],
        )  # fmt: skip
        return _rows(found[0])[self._place]


def _gradients(
    tensors: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor | None], recipe: _Recipe,
    kept: _Kept,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, h_0, c_0, the weights and the bias, and None for the mask."""
    x, h_0, c_0, weight_ih, weight_hh, bias, mask = tensors
    channels, size = x.shape[2], x.shape[3:]
    hidden, out, dtype, wide = weight_hh.shape[1], recipe.where.out, x.dtype, c_0.dtype
    x_place = _inside(size, recipe.where.pads)
    h_place = _inside(out, recurrent_pads(weight_hh))
    d_output, d_h, d_c = grads
    cells_0 = _rows(c_0)
    state = (x.shape[0], *out, hidden)
    dh, dc, new = (torch.zeros(state, dtype=wide) for _ in range(3))
    for total, given in ((dh, d_h), (dc, d_c)):
        if given is not None:
            total.copy_(_rows(given))
    dx = WORKSPACE.empty(*x.shape[:2], *size, channels, dtype=dtype) if needed[0] else None
    d_weight = torch.zeros(kept.weight.shape, dtype=wide)
    d_bias = None if bias is None else torch.zeros(bias.shape, dtype=wide)
    d_gates = WORKSPACE.empty(4, *state, dtype=wide)  # of g a quarter
    d_i, d_f, d_g, d_o = d_gates
    planes = None
    if _by_planes(dtype):
        sizes = (4 * hidden, *out), (kept.patches.shape[4], *kept.patches.shape[2:4])
        dz_planes, patch_planes = (WORKSPACE.empty(x.shape[0], *each, dtype=dtype) for each in sizes)
        planes = dz_planes, patch_planes, kept.weight.contiguous()
    minus_one = torch.tensor(-1.0, dtype=wide)
    # Where x needs no gradient only h's part of the input is computed, and where both are padded alike no padding.
    weight, h_channels = kept.weight, slice(channels, None)
    if dx is None:
        weight, h_channels = weight_hh.contiguous(memory_format=torch.channels_last), slice(None)
    pads = list(recurrent_pads(weight_hh))
    alike = dx is None or list(recipe.where.pads) == pads
    if alike:
        x_place = h_place = (slice(None),) * 3
    adjoint = _Adjoint(_with_g_times(weight, 4), state, pads if alike else None)
    dz = adjoint.dz
    mask = None if mask is None else _rows(mask)
    steps = recipe.order(x.shape[1])
    for k in range(len(steps) - 1, -1, -1):
        t = steps[k]
        i, f, s, o = kept.gates[t]
        a = kept.squashed[t]
        c_before = kept.cells[steps[k - 1]] if k else cells_0
        if d_output is not None:
            dh.add_(_rows(d_output[:, t]))
        dc.add_(_tanh_slope(torch.mul(dh, o, out=new), a))
        torch.mul(dh, a, out=d_o)
        torch.mul(dc, torch.add(minus_one, s, alpha=2.0, out=new), out=d_i)
        torch.mul(dc, c_before, out=d_f)
        torch.mul(dc, i, out=d_g)
        dc.mul_(f)
        if planes is None:
            _slope(d_gates, kept.gates[t], recipe.activation, _by_gate(dz))
            d_weight += _weight_gradient(_image(dz), _image(kept.patches[t]), kept.weight)
        else:
            _slope(d_gates, kept.gates[t], recipe.activation, d_gates)
            _by_gate(dz).copy_(d_gates)
            planes[0].unflatten(1, (4, hidden)).copy_(d_gates.permute(1, 0, 4, 2, 3))
            planes[1].copy_(_image(kept.patches[t]))
            d_weight += _weight_gradient(*planes)
        if d_bias is not None:
            d_bias += dz.sum(dim=(0, 1, 2), dtype=wide)
        if k or needed[1] or dx is not None:
            d_patch = adjoint()
            dh.copy_(d_patch[h_place][..., h_channels])
            if mask is not None:
                dh.mul_(mask)
            if dx is not None:
                dx[:, t] = d_patch[x_place][..., :channels]
    d_weight = _with_g_times(d_weight, 4)
    d_bias = None if d_bias is None else _with_g_times(d_bias, 4)
    return [
        None if dx is None else dx.permute(0, 1, 4, 2, 3),
        _image(dh).to(h_0.dtype) if needed[1] else None,
        _image(dc) if needed[2] else None,
        d_weight[:, :channels].to(weight_ih.dtype) if needed[3] else None,
        d_weight[:, channels:].to(weight_hh.dtype) if needed[4] else None,
        None if bias is None or d_bias is None else d_bias.to(bias.dtype),
        None,
    ]


def _slope(gradient: Tensor, gates: Tensor, activation: str, out: Tensor) -> None:
    """The gradients (4, N, H', W', C_h) before the activations that gave ``gates``; of g a quarter."""
    sigmoid = torch.ops.aten.sigmoid_backward.grad_input
    if activation == "sigmoid":
        sigmoid(gradient, gates, grad_input=out)
        return
    sigmoid(gradient[2], gates[2], grad_input=out[2])
    for part in (slice(0, 2), slice(3, 4)):  # a hard sigmoid is steep where it is neither 0 nor 1
        given = gradient[part].mul_(_STEEPNESS[activation])
        torch.ops.aten.hardtanh_backward.grad_input(given, gates[part], 0.0, 1.0, grad_input=out[part])


def _tanh_slope(gradient: Tensor, value: Tensor) -> Tensor:
    """The gradient before the tanh that gave ``value``, in place."""
    torch.ops.aten.tanh_backward.grad_input(gradient, value, grad_input=gradient)
    return gradient


def _weight_gradient(dz: Tensor, patch: Tensor, weight: Tensor) -> Tensor:
    """Of the convolution of a padded image."""
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        dz, patch, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    return found[1]


def conv_lstm_channels_last(
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
    **rest: Any,
) -> tuple[Tensor | None, State]:
    """:func:`convlstm_fish.ops.conv_lstm` for the calls that :func:`covers` names; see there for the arguments.

    ``output`` and the states are laid out channels last.

    Raises:
        ValueError: an argument that does not fit, named with its value.
    """
    where = check_arguments(
        input, hx, weight_ih, weight_hh, bias, peephole, stride=stride, padding=padding, dilation=dilation,
        recurrent_activation=recurrent_activation, recurrent_mask=recurrent_mask, lengths=lengths, **rest,
    )  # fmt: skip
    dtype = compute_dtype(input)
    h_0, c_0 = first_state(input, hx, weight_hh.shape[1], where)
    recipe = _Recipe(where, padding, recurrent_activation, reverse, return_sequences)
    tensors = (
        input.to(dtype), h_0, c_0, weight_ih.to(dtype), weight_hh.to(dtype), None if bias is None else bias.to(dtype),
        None if recurrent_mask is None else recurrent_mask.to(dtype),
    )  # fmt: skip
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        output, h, c = _ChannelsLast.apply(recipe, *tensors)
        return output, (h, c)
    with torch.no_grad():
        rows, h, c, _ = _forward(*tensors, recipe, False)
    return (None if rows is None else rows.permute(0, 1, 4, 2, 3)), (_image(h), _image(c))
