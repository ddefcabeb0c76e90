"""The steps of one layer, called one by one, and its weights' gradients, which are collected and added up together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convlstm_fish.ops.triton_kernels import convolved
from convlstm_fish.ops.triton_kernels.convolved import Convolved
from convlstm_fish.ops.triton_kernels.layer import Layer
from convlstm_fish.ops.triton_kernels.passes import run_backward, run_forward
from convlstm_fish.ops.triton_kernels.transpose import channels_first, channels_last
from convlstm_fish.ops.triton_kernels.weights import Gradients, Weights, chunk_steps

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


class LayerSteps:
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


class ConvolvedSteps(LayerSteps):
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
