"""Steps of wide layers: their convolutions by cuDNN, everything else of a step in one launch.

From 64 channels on a convolution is arithmetic, at which cuDNN is hard to beat. A step's input and the state before it
lie side by side in one image, (N, H, W, C + C_h), so that one convolution makes the gates of both; the launch after it
writes the new state straight into the image of the next step. An input of few channels is no work for cuDNN: the launch
adds its convolution, and the image, (N, H, W, C_h), is the state alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from convlstm_fish.ops.triton_kernels.launch import Variants, cdiv, launch
from convlstm_fish.ops.triton_kernels.layer import Layer, pack_weight, peephole_kind
from convlstm_fish.ops.triton_kernels.pointwise import copy_pixels, update_gradients, update_state
from convlstm_fish.ops.triton_kernels.sums import ImageWeight, WeightSums, image_weight, write_image_gradient
from convlstm_fish.ops.triton_kernels.transpose import channels_first

# Pixels at a time, channels and warps of a program; backward, how many times.
_FORWARD = (32, 64, 4)
_BACKWARD = (16, 64, 4)
_ROUNDS = 8
# Channels of an input that does not lie in the image, at most, and of its products a gate those that are added one by
# one.
_FEW = 4
_DIRECT = 16


def covers(layer: Layer) -> bool:
    """Whether :class:`Convolved` runs a layer's calls without a mask and lengths, and is the faster way."""
    return (
        layer.hidden >= 64
        and layer.hidden % 8 == 0
        and all(k % 2 for k in layer.kernel)
        and (layer.channels <= _FEW or (layer.channels % 8 == 0 and layer.alike))
        and (layer.device.type != "cuda" or (torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled))
    )


def image_channels(layer: Layer) -> int:
    """Of the input, those that lie in the images."""
    return 0 if layer.channels <= _FEW else layer.channels


def _is_even(image: Tensor) -> bool:
    """Whether the pixels of (..., H, W, C) lie equally far apart in a clip, and nothing of one in another."""
    width, channels = image.shape[-2:]
    over, between, within = image.stride()[-3:]
    return within == 1 and between >= channels and over == width * between


def _even(image: Tensor | None) -> Tensor | None:
    """(..., H, W, C) such that they do; a copy has strides of its own where a size of 1 makes them arbitrary."""
    return image if image is None or _is_even(image) else image.clone(memory_format=torch.contiguous_format)


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copies (N, H, W, C), or (steps, N, H, W, C).

    It goes past autograd, which would take it for a change of what else lies in the target's memory.
    """
    if target.dtype != source.dtype or not (_is_even(target) and _is_even(source)):
        target.data.copy_(source)
        return
    *steps, clips, height, width, channels = target.shape
    columns = triton.next_power_of_2(channels)
    rows = max(1, 4096 // columns)
    constants: dict[str, Any] = {
        "FROM": source.stride(-2), "TO": target.stride(-2), "PIXELS": height * width, "C": channels, "BM": rows,
        "BC": columns,
    }  # fmt: skip
    far = [each for t in (source, target) for each in (t.stride(-4), t.stride(0) if steps else 0)]
    launch(copy_pixels, (cdiv(height * width, rows), clips, *steps), (source, target, *far), constants, 4)


class Convolved:
    """The steps of a layer. Images are channels last."""

    def __init__(
        self, layer: Layer, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, peephole: Sequence[Tensor | None]
    ) -> None:
        self.layer, self.weight_ih, self.weight_hh = layer, weight_ih, weight_hh
        self.beside = image_channels(layer)
        self.weight = self._laid_out(torch.cat([weight_ih, weight_hh], 1) if self.beside else weight_hh)
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.peephole = peephole
        self.direct = weight_ih[0].numel() <= _DIRECT
        self.padding = [k // 2 for k in layer.kernel]
        pixels = layer.size[0] * layer.size[1]
        self.parts = cdiv(pixels, _BACKWARD[0] * _ROUNDS)
        self.grid = (cdiv(pixels, _FORWARD[0]) * cdiv(layer.hidden, _FORWARD[1]), layer.clips)
        self.grid_back = (self.parts * cdiv(layer.hidden, _BACKWARD[1]), layer.clips)
        self.bias_rows = layer.clips * self.parts
        every = layer.constants()
        self.constants = {key: every[key] for key in ("H", "W", "C", "ACT", "FAST")} | {
            "PEEPHOLE": peephole_kind(peephole[0]), "HAS_BIAS": bias is not None,
        }  # fmt: skip
        names = ("HI", "WI", "C_IN", "CP_IN", "KHX", "KWX", "PRECISION")
        self.constants_x = layer.convolution() | {key: every[key] for key in names} | {"BK": 16}

    def _laid_out(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.layer.dtype, memory_format=torch.channels_last)

    @cached_property
    def _weight_x(self) -> Tensor:
        return self._laid_out(self.weight_ih)

    @cached_property
    def _packed_x(self) -> Tensor:
        """W_ih as the launch reads it that adds its convolution."""
        if self.direct:
            return self.weight_ih.detach().to(self.layer.dtype).permute(2, 3, 1, 0).contiguous()
        return pack_weight(self.weight_ih, self.layer, 16, _FORWARD[1], False)

    @cached_property
    def _image_x(self) -> ImageWeight:
        return image_weight(self.layer, self.weight_ih, self.layer.tiles.image, self.layer.convolution())

    def _weight(self, images: Tensor) -> Tensor:
        """For images, or without a state for the input alone."""
        return self.weight if images.shape[-1] == self.weight.shape[1] else self._weight_x

    def new_images(self, steps: int) -> Tensor:
        """Memory (steps, N, H, W, channels) for the images of some steps."""
        return self.weight.new_empty(steps, self.layer.clips, *self.layer.size, self.weight.shape[1])

    def new_gates(self, steps: int) -> Tensor:
        """Memory (steps, N, H, W, 4 * C_h) for gates before activation, or their gradients."""
        return self.weight.new_empty(steps, self.layer.clips, *self.layer.size, 4 * self.layer.hidden)

    def step(
        self, image: Tensor | None, x: Tensor | None, z: Tensor, save_z: bool, c_in: Tensor | None, c_out: Tensor,
        c_save: Tensor | None, h_out: Tensor | None, h_next: Tensor | None,
    ) -> None:  # fmt: skip
        """Writes z, (N, H, W, 4 * C_h), the next c, and the next h into one or two places.

        Args:
            image: the step's, (N, H, W, channels); without a state the input itself, or None where ``x`` is it.
            x: (N, H, W, C), an input that does not lie in the images.
            z: written for good with ``save_z``.
        """
        if image is not None and image.is_cuda:
            cudnn = torch.backends.cudnn
            deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
            torch.ops.aten.cudnn_convolution.out(
                channels_first(image), self._weight(image), self.padding, [1, 1], [1, 1], 1, cudnn.benchmark,
                deterministic, cudnn.allow_tf32, out=channels_first(z),
            )  # fmt: skip
        elif image is not None:
            channels_first(z).copy_(torch.convolution(
                channels_first(image), self._weight(image), None, [1, 1], self.padding, [1, 1], False, [0, 0], 1
            ))  # fmt: skip
        out, following = (0 if t is None else t.stride(2) for t in (h_out, h_next))
        run = self._update_state(
            HAS_Z=image is not None, SAVE_Z=save_z, HAS_STATE=c_in is not None, SAVE_C=c_save is not None, OUT=out,
            NEXT=following,
        )  # fmt: skip
        run(
            self.grid, z, x, None if x is None else self._packed_x, self.bias, c_in, c_out, c_save, h_out, h_next,
            *self.peephole, z.stride(0), 0 if x is None else x.stride(0), c_out.stride(0),
            *(0 if t is None else t.stride(0) for t in (c_save, h_out, h_next)),
        )  # fmt: skip

    @cached_property
    def _update_state(self) -> Variants:
        pixels, channels, warps = _FORWARD
        constants = self.constants | self.constants_x | {
            "BM": pixels, "BC": channels, "HAS_X": not self.beside, "DIRECT": self.direct,
            "ldw": 0 if self.beside else self._packed_x.shape[1],
        }  # fmt: skip
        return Variants(update_state, constants, warps)

    def back(
        self, z: Tensor, c_in: Tensor | None, dout: Tensor | None, dfed: Tensor | None, dh: Tensor | None,
        dc_in: Tensor | None, dc: Tensor, da: Tensor, dpeephole: Tensor | None, dbias: Tensor | None,
    ) -> None:  # fmt: skip
        """Writes da, (N, H, W, 4 * C_h), and the gradient of c_in, and adds to those of the peepholes and the bias.

        The gradient of h is the sum of dout, dfed and dh.
        """
        of_out, of_fed, of_h = (0 if t is None else t.stride(2) for t in (dout, dfed, dh))
        run = self._update_gradients(
            HAS_STATE=c_in is not None, HAS_DC=dc_in is not None, DOUT=of_out, DFED=of_fed, DH=of_h
        )
        run(
            self.grid_back, z, self.bias, c_in, dout, dfed, dh, dc_in, dc, da, dpeephole, dbias, *self.peephole,
            z.stride(0), *(0 if t is None else t.stride(0) for t in (c_in, dout, dfed, dh)), dc.stride(0),
        )  # fmt: skip

    @cached_property
    def _update_gradients(self) -> Variants:
        pixels, channels, warps = _BACKWARD
        constants = self.constants | {"parts": self.parts, "BM": pixels, "BC": channels, "ROUNDS": _ROUNDS}
        return Variants(update_gradients, constants, warps)

    def _backward(self, da: Tensor, images: Tensor, of_images: bool) -> Tensor:
        found = torch.ops.aten.convolution_backward(
            channels_first(da), channels_first(images), self._weight(images), None, [1, 1], self.padding, [1, 1], False,
            [0, 0], 1, [of_images, not of_images, False],
        )  # fmt: skip
        return found[0 if of_images else 1]

    def image_gradient(self, da: Tensor, image: Tensor) -> Tensor:
        """Of an image, from da of its step."""
        return self._backward(da, image, True).permute(0, 2, 3, 1).contiguous()

    def input_gradient(self, da: Tensor, dx: Tensor) -> None:
        """Writes that of an input that does not lie in the images, both (N, H, W, ...)."""
        one = self.layer._replace(steps=1, reverse=False)
        write_image_gradient(one, self._image_x, da.unsqueeze(1), dx, 0, None, 0, 1, None)

    def weight_gradient(self, da: Tensor, images: Tensor) -> Tensor:
        """Of the weights in the order of the images' channels, summed over (steps, N, ...)."""
        return self._backward(da.flatten(0, 1), images.flatten(0, 1), False)


class ConvolvedSums:
    """Gradients of W_hh and W_ih, added up chunk by chunk."""

    def __init__(self, convolved: Convolved) -> None:
        self.convolved = convolved
        self.sums = torch.zeros_like(convolved.weight, dtype=torch.float32)
        self.sums_x = None
        if not convolved.beside:
            self.sums_x = WeightSums(convolved.layer._replace(reverse=False), None, convolved.weight_ih)

    def add(self, images: Tensor, da: Tensor) -> None:
        """Adds those of some steps, each (steps, N, H, W, ...)."""
        self.sums[:, : images.shape[-1]] += self.convolved.weight_gradient(da, images)

    def add_input(self, x: Tensor, da: Tensor) -> None:
        """Adds those of an input (steps, N, H, W, C) that does not lie in the images."""
        assert self.sums_x is not None
        x, da = x.transpose(0, 1), da.transpose(0, 1)
        self.sums_x.add(x, 0, True, x, None, da, 0, x.shape[1], None)

    def results(self) -> list[Tensor]:
        """The gradients of W_hh and W_ih in their own layout and dtype."""
        weights = self.convolved.weight_hh, self.convolved.weight_ih
        cut = self.convolved.beside
        parts = self.sums[:, cut:], self.sums[:, :cut]
        found = [p.to(w.dtype, memory_format=torch.contiguous_format).contiguous() for p, w in zip(parts, weights)]
        return found if self.sums_x is None else [found[0], *self.sums_x.results()]


def run_forward(
    convolved: Convolved, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, keep_h: bool, keep_c: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the steps on x (N, T, H, W, C); see :func:`convlstm_fish.ops.triton_kernels.passes.run_forward`.

    Returns:
        h, c_n and the cells as there, and in the order of the steps, empty without ``keep_c``: the gates before
        activation, (T, N, H, W, 4 * C_h), and the images (T, N, H, W, channels). Without h_0 the first step has no
        image, for it reads x alone.
    """
    layer, beside = convolved.layer, convolved.beside
    clips, steps = layer.clips, layer.steps
    frame = (*layer.size, layer.hidden)
    h = x.new_empty(clips, steps if keep_h else 2, *frame)
    c = x.new_empty((clips, *frame), dtype=torch.float32)
    cells = x.new_empty((clips, steps, *frame) if keep_c else (0,))
    skipped = int(h_0 is None)
    z = convolved.new_gates(steps if keep_c else 1)
    images = convolved.new_images(steps - skipped if keep_c else 1)
    place = lambda s: images[s - skipped if keep_c else 0]  # noqa: E731
    c_in = c_0
    at_once = beside > 0 and keep_c and not layer.reverse
    if at_once and steps > skipped:
        copy_into(images[..., :beside], x[:, skipped:].transpose(0, 1))
    for s in range(steps):
        t, last = steps - 1 - s if layer.reverse else s, s + 1 == steps
        image = None
        if s >= skipped:
            image = place(s)
            if beside and not at_once:
                copy_into(image[..., :beside], x[:, t])
            if s == 0 and h_0 is not None:
                copy_into(image[..., beside:], h_0)
        elif beside:
            image = x[:, t].contiguous()
        h_next = None if last else place(s + 1)[..., beside:]
        h_out = h[:, t] if keep_h else h[:, s % 2] if last else None
        convolved.step(
            image, None if beside else x[:, t], z[s if keep_c else 0], keep_c, c_in, c,
            cells[:, t] if keep_c else None, h_out, h_next,
        )  # fmt: skip
        c_in = c
    return (h, c, cells, z, images) if keep_c else (h, c, cells, x.new_empty(0), x.new_empty(0))


def run_backward(
    convolved: Convolved, gradients: Any, chunk: int, dout: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None,
    cells: Tensor | None, z: Tensor, images: Tensor, x: Tensor | None, c_0: Tensor | None, need_x: bool,
    need_state: bool, dfed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Adds to the gradients of the parameters, whose sums take up ``chunk`` steps at a time.

    ``x`` (N, T, H, W, C) is needed where not all of it lies in the images. ``dfed`` (N, H, W, C_h) is one more term of
    the last step's h.

    Returns:
        The gradients of x, h_0 and c_0, empty unless needed.
    """
    layer, beside = convolved.layer, convolved.beside
    steps = layer.steps
    dout, dfed, dh, dc_in = _even(dout), _even(dfed), _even(dh_n), None if dc_n is None else dc_n.contiguous()
    dc = torch.empty((layer.clips, *layer.size, layer.hidden), dtype=torch.float32, device=z.device)
    own_dx = need_x and (steps > 1 or not beside)
    dx = z.new_empty((layer.clips, steps, *layer.size_in, layer.channels) if own_dx else (0,))
    skipped, waiting = steps - images.shape[0], 0
    for s in reversed(range(steps)):
        t, before = (steps - 1 - s, steps - s) if layer.reverse else (s, s - 1)
        if waiting == 0:  # filled from its end, for the last step comes first
            da = gradients.room(layer, max(1, min(chunk, s + 1 - skipped)))
        da_s = da[-1 - waiting]
        c_in = c_0 if s == 0 or cells is None else cells[:, before]
        dout_t = None if dout is None else dout[:, t]
        convolved.back(z[s], c_in, dout_t, dfed, dh, dc_in, dc, da_s, gradients.dpeephole, gradients.dbias)
        dc_in, dfed = dc, None
        those = None if s < skipped else images[s - skipped :]
        if those is None and beside and x is not None:
            those = x[:, t].contiguous()[None]
        if those is not None and (s > 0 or need_state or (need_x and beside)):
            both = convolved.image_gradient(da_s, those[0])
            dh = both[..., beside:]
            if need_x and beside:
                if own_dx:
                    copy_into(dx[:, t], both[..., :beside])
                else:
                    dx = both[..., :beside].unsqueeze(1)
        if not beside:
            assert x is not None
            if need_x:
                convolved.input_gradient(da_s, dx[:, t])
            gradients.add_input(x[:, t].unsqueeze(0), da_s.unsqueeze(0))
        waiting += 1
        if waiting == da.shape[0]:
            if those is not None:
                gradients.add_convolved(those[:waiting], da)
            waiting = 0
    return (dx, dh, dc) if need_state and dh is not None else (dx, z.new_empty(0), dc.new_empty(0))
