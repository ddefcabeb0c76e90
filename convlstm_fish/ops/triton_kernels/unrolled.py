"""Steps of one layer, called one by one: weights packed once, and their gradients added up once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from convlstm_fish.ops.triton_kernels.layer import Layer
from convlstm_fish.ops.triton_kernels.passes import run_backward, run_forward
from convlstm_fish.ops.triton_kernels.weights import CHUNK_BYTES, Gradients, Weights

# Hidden states of so many bytes, or so many steps, are laid out one behind the other, to be read as one sequence.
_ROOM_BYTES = 128 << 20
_ROOM_STEPS = 16


def _gap(frames: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> tuple[int, ...] | None:
    """How many numbers each of some frames lies before another in the same memory; None where that is not so."""
    if any(a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() for a, b in zip(frames, after)):
        return None
    gaps = tuple(int(b.storage_offset()) - int(a.storage_offset()) for a, b in zip(frames, after))
    return gaps if min(gaps) > 0 else None


def _runs(frames: Sequence[tuple[Tensor, ...]]) -> Iterator[slice]:
    """The frames in parts, within each of which they are equally far apart."""
    gaps = [_gap(*pair) for pair in pairwise(frames)]
    start = 0
    for stop in range(1, len(frames) + 1):
        if stop == len(frames) or gaps[stop - 1] is None or gaps[stop - 1] != gaps[start]:
            yield slice(start, stop)
            start = stop


class DeferredGradients(Gradients):
    """Gradients whose steps are collected, up to ``steps`` of them, and added in a few launches; or not ``wanted``."""

    def __init__(self, layer: Layer, weights: Weights, steps: int, wanted: bool) -> None:
        super().__init__(layer, weights)
        self.steps, self.wanted = steps, wanted
        self.slots: Tensor | None = None
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def room(self, layer: Layer, x: Tensor, steps: int) -> Tensor:
        """The next of the slots for a step's gradients of the gates."""
        if self.slots is None:
            one = 4 * layer.clips * layer.size[0] * layer.size[1] * layer.hidden * x.element_size()
            self.slots = super().room(layer, x, max(1, min(self.steps, CHUNK_BYTES // one)))
        if len(self.waiting) == self.slots.shape[1]:
            self._take_up()
        # Filled from its end, for the last step comes first.
        at = self.slots.shape[1] - len(self.waiting)
        return self.slots[:, at - 1 : at]

    def add(
        self, h: Tensor, h_t: int, with_h: bool, x: Tensor, mask: Tensor | None, da: Tensor, first: int, steps: int,
        lengths: Tensor | None,
    ) -> None:  # fmt: skip
        """Keeps h and x of one step, whose da lies in its slot."""
        if self.wanted:
            self.waiting.append((h, x[:, 0]))

    def _take_up(self) -> None:
        frames = self.waiting[::-1]
        self.waiting.clear()
        if not frames:
            return
        assert self.slots is not None
        da = self.slots[:, -len(frames) :]
        if self.weights.steps is not None:  # those kernels read frames that begin where 16 bytes can be read at once
            h, x = (torch.stack(each, 1) for each in zip(*frames))
            self._add(h, x, da)
            return
        for run in _runs(frames):
            h, x = (_sequence(each) for each in zip(*frames[run]))
            self._add(h, x, da[:, run])

    def _add(self, h: Tensor, x: Tensor, da: Tensor) -> None:
        steps = h.shape[1]
        # The kernel looks for the h before step s one step before it: the second one is where step 1 looks for it.
        base = h[:, min(1, steps - 1)]
        super().add(base, h.stride(1) if steps > 1 else 0, True, x, None, da, 0, steps, None)

    def results(self) -> list[Tensor]:
        """See the base class."""
        self._take_up()
        return super().results()


def _sequence(frames: Sequence[Tensor]) -> Tensor:
    """Frames (N, ...) that lie equally far apart in one memory as a view (N, T, ...) of it."""
    first = frames[0]
    gap = frames[1].storage_offset() - first.storage_offset() if len(frames) > 1 else first.numel()
    strides = (first.stride(0), gap, *first.stride()[1:])
    return first.as_strided((first.shape[0], len(frames), *first.shape[1:]), strides)


class _Pass:
    """What the steps of one unrolled layer share: their weights, and the gradients of the backward pass under way."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.steps = 0
        self.free: list[Tensor] = []  # frames of memory that no step has written yet
        self.task: int | None = None
        self.gradients: DeferredGradients | None = None

    def new_h(self, layer: Layer, x: Tensor) -> Tensor:
        """Memory (N, 1, H', W', C_h) for the state of a step, behind that of the step before where there is room."""
        if not self.free:
            frame = (layer.clips, 1, *layer.size, layer.hidden)
            count = max(1, _ROOM_BYTES // (math.prod(frame) * x.element_size()))
            self.free = list(x.new_empty(min(count, _ROOM_STEPS), *frame))[::-1]
        return self.free.pop()

    def under_way(self, layer: Layer, wanted: bool) -> DeferredGradients:
        """The sums of this backward pass. One that never asked for the weights' gradients left its own behind."""
        task = torch._C._current_graph_task_id()
        if self.gradients is None or self.task != task:
            self.task, self.gradients = task, DeferredGradients(layer, self.weights, self.steps, wanted)
        return self.gradients

    def finish(self) -> list[Tensor] | None:
        """The sums of this backward pass, None where no step was in it."""
        gradients, self.gradients = self.gradients, None
        return None if gradients is None or self.task != torch._C._current_graph_task_id() else gradients.results()


class _Parameters(torch.autograd.Function):
    """The weights' place in the autograd graph: behind every step, so that its backward comes after theirs."""

    @staticmethod
    def forward(ctx: Any, shared: _Pass, *parameters: Tensor | None) -> Tensor:
        """An empty tensor for each step to depend on."""
        ctx.set_materialize_grads(False)
        ctx.shared = shared
        ctx.given = [p is not None for p in parameters]
        return shared.weights.weight_ih.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of all steps."""
        found = ctx.shared.finish()
        if found is None:
            return (None, *(None for _ in ctx.given))
        rest = iter(found)
        return (None, *(next(rest) if given else None for given in ctx.given))


class _Step(torch.autograd.Function):
    """One step."""

    @staticmethod
    def forward(
        ctx: Any, shared: _Pass, layer: Layer, tracked: bool, parameters: Tensor, x: Tensor, h_0: Tensor, c_0: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h_1 and c_1."""
        shared.steps += tracked
        keep = tracked and layer.tiles.keep_gates
        new = shared.new_h(layer, x) if tracked and shared.weights.steps is None else None
        h, c, _, gates = run_forward(layer, shared.weights, x, h_0, c_0, None, None, True, keep, new)
        ctx.set_materialize_grads(False)
        ctx.shared, ctx.layer = shared, layer
        ctx.save_for_backward(x, h_0, c_0, gates)
        return h.squeeze(1), c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of x, h_0 and c_0; those of the weights wait."""
        if dh is None and dc is None:
            return (None,) * 7
        x, h_0, c_0, gates = ctx.saved_tensors
        need_x, need_state = ctx.needs_input_grad[4], any(ctx.needs_input_grad[5:])
        gradients = ctx.shared.under_way(ctx.layer, ctx.needs_input_grad[3])
        dx, dh_0, dc_0 = run_backward(
            ctx.layer, ctx.shared.weights, gradients, None, dh, dc, h_0, c_0, gates, x, h_0, c_0, None, None,
            need_x, need_state,
        )  # fmt: skip
        state = (dh_0, dc_0) if need_state else (None, None)
        return (None, None, None, None, dx if need_x else None, *state)


class Unrolled:
    """Steps of a layer on tensors as the kernels take them; see :func:`convlstm_fish.ops.unroll`.

    Args:
        layer: of the first step.
        parameters: weight_ih, weight_hh, bias or None, and three peepholes or None.
    """

    def __init__(self, layer: Layer, *parameters: Tensor | None) -> None:
        weights = Weights(layer, *[p if p is None else p.detach() for p in parameters], plain=True)  # type: ignore[arg-type]
        self.shared = _Pass(weights)
        self.parameters: Tensor = _Parameters.apply(self.shared, *parameters)

    def __call__(self, layer: Layer, x: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor]:
        """h_1 and c_1, (N, H', W', C_h), from x (N, 1, H, W, C) and the state before."""
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (self.parameters, x, h_0, c_0))
        result: tuple[Tensor, Tensor] = _Step.apply(self.shared, layer, tracked, self.parameters, x, h_0, c_0)
        return result
