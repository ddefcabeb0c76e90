"""Steps of a stack of layers in the autograd graph: one node a step, and behind them all one for the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable

from convlstm_fish.ops.triton_kernels.layer import Layer
from convlstm_fish.ops.triton_kernels.layer_steps import ConvolvedSteps, DeferredGradients, LayerSteps
from convlstm_fish.ops.triton_kernels.transpose import channels_first
from convlstm_fish.ops.triton_kernels.weights import NO_SECOND_DERIVATIVE, Weights


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each has been changed in place; of a tensor of inference mode, which does not count it, 0."""
    return [0 if t.is_inference() else t._version for t in tensors]


class _Pass(NamedTuple):
    """A backward pass under way."""

    gradients: list[DeferredGradients]  # of each layer's weights
    inputs: list[Tensor | None]  # of its steps, where their gradients might be differentiated


class _Stack:
    """What the steps of an unrolled stack share: their weights, and the gradients of the backward passes under way.

    Args:
        layers: of every step.
        parameters: of all of them.
    """

    def __init__(self, layers: Sequence[LayerSteps], parameters: Sequence[Tensor]) -> None:
        self.layers = layers
        self.parameters, self.versions = parameters, versions(parameters)
        self.feeds_back = False  # a step has read the last layer's h of the one before
        self.fed: Tensor | None = None  # where the first layer's next step has that beside its own h
        self.steps = 0  # whose backward is still to come
        # By their number: one may begin within another, or beside it in another thread.
        self.passes: dict[int, _Pass] = {}

    def forward(
        self, x: Tensor, states: Sequence[tuple[Tensor | None, Tensor | None]], tracked: bool, fed_back: bool
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """h and c of all layers after a step, and what its backward pass needs."""
        self.steps += tracked
        self.feeds_back |= fed_back
        after: list[Tensor] = []
        kept: list[Tensor | None] = []
        if fed_back and self.fed is not None:
            x = self.fed
        for number, (layer, (h_0, c_0)) in enumerate(zip(self.layers, states)):
            if isinstance(layer, ConvolvedSteps):
                place = self._place(layer, number, states)
                h, c, those = layer.forward(x, h_0, c_0, tracked, place)
                x = h if place is None else place
            else:
                h, c, those = layer.forward(x, h_0, c_0, tracked)
                x = h
            after += [h, c]
            kept += those
        return after, kept

    def _place(
        self, layer: ConvolvedSteps, number: int, states: Sequence[tuple[Tensor | None, Tensor | None]]
    ) -> Tensor | None:
        """Where what reads a layer's h finds it, besides the layer's own next step."""
        if number + 1 < len(self.layers):
            place = self.layers[number + 1].place(states[number + 1][0])
            if place is not None:
                return place
            return layer.steps.weight.new_empty(layer.layer.clips, *layer.layer.size, layer.layer.hidden)
        self.fed, first = None, self.layers[0]
        # A layer that is the only one has no image for its next step yet.
        if not self.feeds_back or first is layer or not isinstance(first, ConvolvedSteps) or first.upcoming is None:
            return None
        if first.steps.beside == layer.layer.hidden:
            self.fed = first.upcoming[..., : first.steps.beside]
        return self.fed

    def under_way(self, wanted: bool) -> _Pass:
        """This backward pass, which has to add up the weights' gradients or not.

        Raises:
            RuntimeError: the weights are no longer those of the forward pass.
        """
        if versions(self.parameters) != self.versions:
            raise RuntimeError("the weights have been changed in place since the step whose gradient is wanted")
        task = torch._C._current_graph_task_id()
        found = self.passes.get(task)
        if found is None:
            gradients = [DeferredGradients(layer.weights, self.steps, wanted) for layer in self.layers]
            found = self.passes[task] = _Pass(gradients, [])

            def forget() -> None:  # a pass that does not ask for the weights' gradients never comes to finish
                self.passes.pop(task, None)

            Variable._execution_engine.queue_callback(forget)
        return found

    def finish(self) -> tuple[Tensor | None, ...] | None:
        """The weights' gradients of this backward pass; None each of a layer without a step in it, and None of none."""
        task = torch._C._current_graph_task_id()
        if task not in self.passes:
            return None
        gradients, inputs = self.passes.pop(task)
        self.steps = max(0, self.steps - max(each.taken for each in gradients))
        found: list[Tensor | None] = []
        for each in gradients:
            weights = each.weights
            count = 2 + (weights.bias is not None) + 3 * (weights.peephole_kind > 0)
            with torch.no_grad():
                found += each.results() if each.taken else [None] * count
        return _only_once(found, [*self.parameters, *inputs])


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated, tied to what it depends on, so that the attempt is told."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        """The gradient."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Raises a RuntimeError."""
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def _only_once(found: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients, of which one that is differentiated with respect to the inputs raises a RuntimeError."""
    if not torch.is_grad_enabled():
        return tuple(found)
    inputs = [t for t in inputs if t is not None]
    return tuple(None if t is None else _Once.apply(t, *inputs) for t in found)


class _Parameters(torch.autograd.Function):
    """The weights' place in the autograd graph: behind every step, so that its backward comes after theirs."""

    @staticmethod
    def forward(ctx: Any, stack: _Stack, *parameters: Tensor | None) -> Tensor:
        """An empty tensor for each step to depend on."""
        ctx.set_materialize_grads(False)
        ctx.stack = stack
        ctx.given = [p is not None for p in parameters]
        return stack.layers[0].weights.weight_ih.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of all steps."""
        found = ctx.stack.finish()
        if found is None:
            return (None, *(None for _ in ctx.given))
        rest = iter(found)
        return (None, *(next(rest) if given else None for given in ctx.given))


_KEPT = 4  # how many tensors a layer keeps of a step


def _last(image: Tensor | None) -> Tensor | None:
    """A view (N, H, W, C) of (N, C, H, W)."""
    return None if image is None else image.permute(0, 2, 3, 1)


class _Step(torch.autograd.Function):
    """One step of all layers."""

    @staticmethod
    def forward(
        ctx: Any, stack: _Stack, tracked: bool, fed_back: bool, parameters: Tensor, x: Tensor, *states: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The last layer's h, that for the step it is fed back to, and h and c of each layer."""
        ctx.set_materialize_grads(False)
        ctx.stack = stack
        pairs = [(_last(h), _last(c)) for h, c in zip(states[::2], states[1::2])]
        after, kept = stack.forward(x.permute(0, 2, 3, 1), pairs, tracked, fed_back)
        ctx.save_for_backward(*kept, parameters, x, *states)
        # The last h thrice, for the gradients of what reads it to arrive apart, and be added where they are needed.
        # Detached, for views that a function returns may not be changed in place.
        return tuple(channels_first(each).detach() for each in (after[-2], after[-2], *after))

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dfed: Tensor | None, *dstates: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x and the states; those of the weights wait."""
        saved = ctx.saved_tensors  # asked for once, for a checkpoint gives them once
        inputs = [*saved[_KEPT * len(ctx.stack.layers) :], dout, dfed, *dstates]
        this = ctx.stack.under_way(ctx.needs_input_grad[3])
        if torch.is_grad_enabled():
            this.inputs.extend(inputs)
        with torch.no_grad():
            found = _gradients(ctx, this.gradients, saved, dout, dfed, *dstates)
        return _only_once(found, inputs)


def _gradients(
    ctx: Any, gradients: Sequence[DeferredGradients], kept: Sequence[Tensor], dout: Tensor | None, dfed: Tensor | None,
    *dstates: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """Of the inputs of a step, from those of its outputs; those of the weights are added to ``gradients``."""
    stack, need = ctx.stack, ctx.needs_input_grad
    found: list[Tensor | None] = [None] * len(need)
    above, fed = _last(dout), _last(dfed)
    for number in reversed(range(len(stack.layers))):
        dh, dc = dstates[2 * number : 2 * number + 2]
        if above is None and fed is None and dh is None and dc is None:
            continue
        first = 5 + 2 * number
        need_x, need_state = number > 0 or need[4], need[first] or need[first + 1]
        dx, dh_0, dc_0 = stack.layers[number].backward(
            gradients[number], kept[_KEPT * number : _KEPT * (number + 1)], above, fed, _last(dh), _last(dc), need_x,
            need_state,
        )  # fmt: skip
        above, fed = dx[:, 0] if need_x else None, None
        if need_state:
            found[first : first + 2] = channels_first(dh_0), channels_first(dc_0)
    if above is not None:
        found[4] = channels_first(above)
    return found


class _Fed(NamedTuple):
    """The last layer's h after a step, as the next one may be fed it."""

    state: Tensor  # as the states hold it
    version: int  # before anyone could change it
    again: Tensor  # the same for autograd to tell apart
    place: Tensor | None  # where the first layer's next step has it beside its own h

    def is_still(self, h: Tensor) -> bool:
        """Whether this is it, nobody changed it, and nobody looks at its gradient, which would be but a part."""
        same = h is self.state and not h.is_inference() and h._version == self.version
        return same and not h._backward_hooks and not h.retains_grad


class Unrolled:
    """Steps of a stack of layers, each fed by the one before; see :func:`convlstm_fish.ops.unroll_stack`.

    Args:
        layers: of every step.
        parameters: of each weight_ih, weight_hh, bias or None, and three peepholes or None.
    """

    def __init__(self, layers: Sequence[Layer], parameters: Sequence[Sequence[Tensor | None]]) -> None:
        steps: list[LayerSteps] = []
        for layer, those in zip(layers, parameters):
            plain = [p if p is None else p.detach() for p in those]
            weights = Weights(layer, *plain, plain=True)  # type: ignore[arg-type]
            steps.append(
                LayerSteps(weights) if weights.convolved is None else ConvolvedSteps(weights, weights.convolved)
            )
        given = [p for those in parameters for p in those if p is not None]
        self.stack = _Stack(steps, given)
        self.last: _Fed | None = None
        self.parameters: Tensor = _Parameters.apply(self.stack, *(p for those in parameters for p in those))

    def __call__(
        self, x: Tensor | None, states: Sequence[tuple[Tensor, Tensor] | None]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The last layer's h, and h and c of each, (N, C_h, H', W'), from x (N, C, H, W) and the states.

        Without x the first layer reads the last one's h of the states, which are given.
        """
        last, self.last = self.last, None  # a step that fails leaves nothing to be fed
        fed_back = False
        if x is None:
            assert states[-1] is not None
            x = states[-1][0]
            if last is not None and last.is_still(x):
                x, self.stack.fed, fed_back = last.again, last.place, True
        flat = [t for state in states for t in (state or (None, None))]
        tracked = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (self.parameters, x, *flat)
        )
        output, again, *after = _Step.apply(self.stack, tracked, fed_back, self.parameters, x, *flat)
        self.last = _Fed(after[-2], versions([after[-2]])[0], again, self.stack.fed)
        return output, list(zip(after[::2], after[1::2]))
