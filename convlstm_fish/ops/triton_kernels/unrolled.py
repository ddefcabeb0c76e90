"""Steps of a stack of layers, called one by one: weights packed once, and their gradients added up once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable

from convlstm_fish.ops.triton_kernels import convolved
from convlstm_fish.ops.triton_kernels.convolved import Convolved
from convlstm_fish.ops.triton_kernels.layer import Layer
from convlstm_fish.ops.triton_kernels.passes import run_backward, run_forward
from convlstm_fish.ops.triton_kernels.transpose import channels_first, channels_last
from convlstm_fish.ops.triton_kernels.weights import NO_SECOND_DERIVATIVE, Gradients, Weights, chunk_steps

# Images of so many bytes, or so many steps, are laid out one behind the other, to be read as one sequence.
_ROOM_BYTES = 128 << 20
_ROOM_STEPS = 16


class DeferredGradients(Gradients):
    """Gradients whose steps are collected, up to ``steps`` of them, and added in a few launches; or not ``wanted``.

    Attributes:
        taken: steps so far.
    """

    def __init__(self, weights: Weights, steps: int, wanted: bool) -> None:
        super().__init__(weights.layer, weights)
        self.steps, self.wanted, self.taken = steps, wanted, 0
        self.slots: Tensor | None = None
        self.waiting: list[tuple[Tensor, ...]] = []
        self.time = 1 if weights.convolved is None else 0  # the dimension of the slots that counts steps

    def room(self, layer: Layer, steps: int) -> Tensor:
        """The next of the slots for a step's gradients of the gates."""
        self.taken += 1
        if self.slots is None:
            self.slots = super().room(layer, max(1, min(self.steps, chunk_steps(layer))))
        if len(self.waiting) == self.slots.shape[self.time]:
            self._take_up()
        # Filled from its end, for the last step comes first.
        return self.slots.narrow(self.time, self.slots.shape[self.time] - len(self.waiting) - 1, 1)

    def add(
        self, h: Tensor, h_t: int, with_h: bool, x: Tensor, mask: Tensor | None, da: Tensor, first: int, steps: int,
        lengths: Tensor | None,
    ) -> None:  # fmt: skip
        """Keeps h and x of one step, whose da lies in its slot."""
        if self.wanted:
            self.waiting.append((h, x[:, 0]))

    def add_convolved(self, images: Tensor, da: Tensor) -> None:
        """The same with the image of one step."""
        if self.wanted:
            self.waiting.append((images[0],))

    def add_input(self, x: Tensor, da: Tensor) -> None:
        """At once, for it is little."""
        if self.wanted:
            super().add_input(x, da)

    def _take_up(self) -> None:
        frames = self.waiting[::-1]
        self.waiting.clear()
        if not frames:
            return
        assert self.slots is not None
        da = self.slots.narrow(self.time, self.slots.shape[self.time] - len(frames), len(frames))
        if self.weights.convolved is None:
            h, x = (torch.stack(each, 1) for each in zip(*frames))
            steps = h.shape[1]
            # The kernel looks for the h before step s one step before it: the second is where step 1 looks for it.
            super().add(h[:, min(1, steps - 1)], h.stride(1) if steps > 1 else 0, True, x, None, da, 0, steps, None)
            return
        images = [image for (image,) in frames]
        start = 0
        for stop in range(1, len(images) + 1):
            if stop == len(images) or not _follows(images[stop - 1], images[stop]):
                first = images[start]
                run = first.as_strided((stop - start, *first.shape), (first.numel(), *first.stride()))
                super().add_convolved(run, da[start:stop])
                start = stop

    def results(self) -> list[Tensor]:
        """See the base class."""
        self._take_up()
        return super().results()


def _follows(image: Tensor, after: Tensor) -> bool:
    """Whether one image lies right behind another in the same memory."""
    same = image.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
    same = same and image.shape == after.shape
    return same and int(image.storage_offset()) + image.numel() == int(after.storage_offset())


def _is_same(image: Tensor, other: Tensor) -> bool:
    """Whether two views are of the same numbers in memory that is held."""
    return (image.data_ptr(), image.shape, image.stride()) == (other.data_ptr(), other.shape, other.stride())


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each has been changed in place; of a tensor of inference mode, which does not count it, 0."""
    return [0 if t.is_inference() else t._version for t in tensors]


class _Steps:
    """The steps of one layer.

    Tensors are as its kernels take them, (N, H, W, C), but need not be contiguous or of its dtype.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights, self.layer = weights, weights.layer

    def place(self, h_0: Tensor | None) -> Tensor | None:
        """Where the coming step, from h_0, is best given its input, or None; to be asked for once a step."""
        return None

    def forward(
        self, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, tracked: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """h and c after a step, and what its backward pass needs."""
        layer = self.layer
        x = channels_last(channels_first(x), layer.dtype).unsqueeze(1)
        if h_0 is None or c_0 is None:
            frame = (layer.clips, *layer.size, layer.hidden)
            h_0, c_0 = x.new_zeros(frame), x.new_zeros(frame, dtype=torch.float32)
        h_0, c_0 = channels_last(channels_first(h_0), layer.dtype), channels_last(channels_first(c_0), torch.float32)
        keep = tracked and layer.tiles.keep_gates
        h, c, _, gates = run_forward(layer, self.weights, x, h_0, c_0, None, None, True, keep)
        return h.squeeze(1), c, (x, h_0, c_0, gates)

    def backward(
        self, gradients: DeferredGradients, kept: tuple[Tensor, ...], dout: Tensor | None, dfed: Tensor | None,
        dh: Tensor | None, dc: Tensor | None, need_x: bool, need_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradients of x (N, 1, H, W, C), h_0 and c_0, empty unless needed, from three of h and that of c."""
        x, h_0, c_0, gates = kept
        dout = dfed if dout is None else dout if dfed is None else dout + dfed
        dout = None if dout is None else dout.unsqueeze(1)
        return run_backward(
            self.layer, self.weights, gradients, dout, dh, dc, h_0, c_0, gates, x, h_0, c_0, None, None, need_x,
            need_state,
        )  # fmt: skip


class _ConvolvedSteps(_Steps):
    """The steps of a convolved layer; h lies in the image of the step after."""

    def __init__(self, weights: Weights, steps: Convolved) -> None:
        super().__init__(weights)
        self.steps = steps
        self.free: list[Tensor] = []  # images that no step has written yet
        self.upcoming: Tensor | None = None  # the image that has the last step's h as its state
        self.placed: Tensor | None = None  # the image of the coming step, which has its state

    def _new_image(self) -> Tensor:
        if not self.free:
            layer = self.layer
            one = layer.clips * math.prod(layer.size) * self.steps.weight.shape[1] * layer.dtype.itemsize
            self.free = list(self.steps.new_images(max(1, min(_ROOM_BYTES // one, _ROOM_STEPS))))[::-1]
        return self.free.pop()

    def _image(self, h_0: Tensor) -> Tensor:
        """The image (N, H, W, channels) that has h_0, which the step before mostly wrote there."""
        image, self.upcoming = self.upcoming, None
        beside = self.steps.beside
        if image is None or not _is_same(image[..., beside:], h_0):
            image = self._new_image()
            convolved.copy_into(image[..., beside:], h_0)
        return image

    def place(self, h_0: Tensor | None) -> Tensor | None:
        """See the base class."""
        if h_0 is None or not self.steps.beside:
            return None
        self.placed = self._image(h_0)
        return self.placed[..., : self.steps.beside]

    def forward(
        self, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, tracked: bool, h_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """See the base class; h goes to ``h_out``, too."""
        steps, layer, beside = self.steps, self.layer, self.steps.beside
        image, self.placed = self.placed, None
        c_0 = None if c_0 is None else channels_last(channels_first(c_0), torch.float32)
        if h_0 is not None:
            image = self._image(h_0) if image is None else image
            if beside and not _is_same(image[..., :beside], x):
                convolved.copy_into(image[..., :beside], x)
        own_x = None  # where x does not lie in an image
        if h_0 is None or not beside:
            own_x = channels_last(channels_first(x), layer.dtype)
        z = steps.new_gates(1)
        c = torch.empty((layer.clips, *layer.size, layer.hidden), dtype=torch.float32, device=layer.device)
        self.upcoming = self._new_image()
        h = self.upcoming[..., beside:]
        read = own_x if h_0 is None and beside else image
        steps.step(read, None if beside else own_x, z[0], True, c_0, c, None, h_out, h)
        images = steps.new_images(0) if image is None else image[None]
        return h, c, (c_0, z, images, None if own_x is None else own_x.unsqueeze(1))

    def backward(
        self, gradients: DeferredGradients, kept: tuple[Tensor, ...], dout: Tensor | None, dfed: Tensor | None,
        dh: Tensor | None, dc: Tensor | None, need_x: bool, need_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See the base class."""
        c_0, z, images, x = kept
        dout = None if dout is None else dout.unsqueeze(1)
        return convolved.run_backward(
            self.steps, gradients, 1, dout, dh, dc, None, z, images, x, c_0, need_x, need_state, dfed
        )


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

    def __init__(self, layers: Sequence[_Steps], parameters: Sequence[Tensor]) -> None:
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
            if isinstance(layer, _ConvolvedSteps):
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
        self, layer: _ConvolvedSteps, number: int, states: Sequence[tuple[Tensor | None, Tensor | None]]
    ) -> Tensor | None:
        """Where what reads a layer's h finds it, besides the layer's own next step."""
        if number + 1 < len(self.layers):
            place = self.layers[number + 1].place(states[number + 1][0])
            if place is not None:
                return place
            return layer.steps.weight.new_empty(layer.layer.clips, *layer.layer.size, layer.layer.hidden)
        self.fed, first = None, self.layers[0]
        # A layer that is the only one has no image for its next step yet.
        if not self.feeds_back or first is layer or not isinstance(first, _ConvolvedSteps) or first.upcoming is None:
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
        steps: list[_Steps] = []
        for layer, those in zip(layers, parameters):
            plain = [p if p is None else p.detach() for p in those]
            weights = Weights(layer, *plain, plain=True)  # type: ignore[arg-type]
            steps.append(_Steps(weights) if weights.convolved is None else _ConvolvedSteps(weights, weights.convolved))
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
