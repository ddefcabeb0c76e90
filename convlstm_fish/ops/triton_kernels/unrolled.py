"""Steps of one layer, called one by one: weights packed once, and their gradients added up once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from convlstm_fish.ops.triton_kernels import convolved
from convlstm_fish.ops.triton_kernels.convolved import Convolved
from convlstm_fish.ops.triton_kernels.layer import Layer
from convlstm_fish.ops.triton_kernels.passes import run_backward, run_forward
from convlstm_fish.ops.triton_kernels.weights import Gradients, Weights, chunk_steps

# Images of so many bytes, or so many steps, are laid out one behind the other, to be read as one sequence.
_ROOM_BYTES = 128 << 20
_ROOM_STEPS = 16


class DeferredGradients(Gradients):
    """Gradients whose steps are collected, up to ``steps`` of them, and added in a few launches; or not ``wanted``."""

    def __init__(self, weights: Weights, steps: int, wanted: bool) -> None:
        super().__init__(weights.layer, weights)
        self.steps, self.wanted = steps, wanted
        self.slots: Tensor | None = None
        self.waiting: list[tuple[Tensor, ...]] = []
        self.time = 1 if weights.convolved is None else 0  # the dimension of the slots that counts steps

    def room(self, layer: Layer, x: Tensor, steps: int) -> Tensor:
        """The next of the slots for a step's gradients of the gates."""
        if self.slots is None:
            self.slots = super().room(layer, x, max(1, min(self.steps, chunk_steps(layer))))
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


class _Pass:
    """What the steps of one unrolled layer share: their weights, and the gradients of the backward pass under way."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.steps = 0
        self.free: list[Tensor] = []  # images that no step has written yet
        self.upcoming: Tensor | None = None  # the image that has the last step's h as its state
        self.task: int | None = None
        self.gradients: DeferredGradients | None = None

    def _new_image(self, steps: Convolved, x: Tensor) -> Tensor:
        if not self.free:
            one = steps.layer.clips * math.prod(steps.layer.size) * steps.weight.shape[1] * x.element_size()
            count = max(1, min(_ROOM_BYTES // one, _ROOM_STEPS))
            self.free = list(steps.new_images(x, count))[::-1]
        return self.free.pop()

    def _image(self, steps: Convolved, x: Tensor, h_0: Tensor) -> Tensor:
        """The image (N, H, W, channels) of x (N, 1, H, W, C) and h_0, which the step before mostly wrote there."""
        beside = steps.beside
        image, self.upcoming = self.upcoming, None
        if image is None or not _is_same(image[..., beside:], h_0):
            image = self._new_image(steps, x)
            convolved.copy_into(image[..., beside:], h_0)
        if beside:
            convolved.copy_into(image[..., :beside], x[:, 0])
        return image

    def convolve(
        self, steps: Convolved, x: Tensor, h_0: Tensor | None, c_0: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h and c after a step, its gates before activation, and its image (1, N, H, W, channels) if it has a state."""
        layer = steps.layer
        z = steps.new_gates(x, 1)
        c = x.new_empty((layer.clips, *layer.size, layer.hidden), dtype=torch.float32)
        image: Tensor | None
        if h_0 is not None:
            image = self._image(steps, x, h_0)
            images = image[None]
        else:
            image = x[:, 0] if steps.beside else None
            images = steps.new_images(x, 0)
        self.upcoming = self._new_image(steps, x)
        h = self.upcoming[..., steps.beside :]
        steps.step(image, None if steps.beside else x[:, 0], z[0], True, c_0, c, None, None, h)
        return h, c, z, images

    def under_way(self, wanted: bool) -> DeferredGradients:
        """The sums of this backward pass. One that never asked for the weights' gradients left its own behind."""
        task = torch._C._current_graph_task_id()
        if self.gradients is None or self.task != task:
            self.task, self.gradients = task, DeferredGradients(self.weights, self.steps, wanted)
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
        ctx: Any, shared: _Pass, tracked: bool, parameters: Tensor, x: Tensor, h_0: Tensor | None, c_0: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """h_1 and c_1."""
        shared.steps += tracked
        ctx.set_materialize_grads(False)
        ctx.shared = shared
        weights, layer = shared.weights, shared.weights.layer
        if weights.convolved is not None:
            in_image = h_0 is not None and weights.convolved.beside > 0
            x = x if in_image else x.contiguous()
            h, c, z, images = shared.convolve(weights.convolved, x, h_0, c_0)
            ctx.save_for_backward(c_0, z, images, None if in_image else x)
            return h, c
        keep = tracked and layer.tiles.keep_gates
        h, c, _, gates = run_forward(layer, weights, x, h_0, c_0, None, None, True, keep)
        ctx.save_for_backward(x, h_0, c_0, gates)
        return h.squeeze(1), c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of x, h_0 and c_0; those of the weights wait."""
        if dh is None and dc is None:
            return (None,) * 6
        weights = ctx.shared.weights
        need_x, need_state = ctx.needs_input_grad[3], any(ctx.needs_input_grad[4:])
        gradients = ctx.shared.under_way(ctx.needs_input_grad[2])
        if weights.convolved is not None:
            c_0, z, images, x = ctx.saved_tensors
            dx, dh_0, dc_0 = convolved.run_backward(
                weights.convolved, gradients, 1, None, dh, dc, None, z, images, x, c_0, need_x, need_state
            )
        else:
            x, h_0, c_0, gates = ctx.saved_tensors
            dx, dh_0, dc_0 = run_backward(
                weights.layer, weights, gradients, None, dh, dc, h_0, c_0, gates, x, h_0, c_0, None, None, need_x,
                need_state,
            )  # fmt: skip
        state = (dh_0, dc_0) if need_state else (None, None)
        return (None, None, None, dx if need_x else None, *state)


class Unrolled:
    """Steps of a layer on tensors as the kernels take them; see :func:`convlstm_fish.ops.unroll`.

    Args:
        layer: of every step.
        parameters: weight_ih, weight_hh, bias or None, and three peepholes or None.
    """

    def __init__(self, layer: Layer, *parameters: Tensor | None) -> None:
        weights = Weights(layer, *[p if p is None else p.detach() for p in parameters], plain=True)  # type: ignore[arg-type]
        self.shared = _Pass(weights)
        self.parameters: Tensor = _Parameters.apply(self.shared, *parameters)

    def __call__(self, x: Tensor, h_0: Tensor | None, c_0: Tensor | None) -> tuple[Tensor, Tensor]:
        """h_1 and c_1, (N, H', W', C_h), from x (N, 1, H, W, C) and the state; a convolved layer can do without."""
        given = [t for t in (self.parameters, x, h_0, c_0) if t is not None]
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        result: tuple[Tensor, Tensor] = _Step.apply(self.shared, tracked, self.parameters, x, h_0, c_0)
        return result
