"""Steps of wide layers: their convolutions by cuDNN, everything else of a step in one launch.

From 64 channels on a convolution is arithmetic, at which cuDNN is hard to beat. A step's input and the state before it
lie side by side in one image, (N, H, W, C + C_h), so that one convolution makes the gates of both; the launch after it
writes the new state straight into the image of the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from convlstm_fish.ops.triton_kernels.launch import launch
from convlstm_fish.ops.triton_kernels.layer import Layer, peephole_kind
from convlstm_fish.ops.triton_kernels.pointwise import copy_pixels, update_gradients, update_state

# Pixels at a time, channels and warps of a program; backward, how many times.
_FORWARD = (32, 64, 4)
_BACKWARD = (16, 64, 4)
_ROUNDS = 8


def covers(layer: Layer) -> bool:
    """Whether :class:`Convolved` runs a layer's calls without a mask and lengths, and is the faster way."""
    return (
        layer.hidden >= 64
        and layer.channels >= 16
        and layer.channels % 8 == layer.hidden % 8 == 0
        and layer.alike
        and all(k % 2 for k in layer.kernel)
        and (layer.device.type != "cuda" or (torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled))
    )


def _first(image: Tensor) -> Tensor:
    """(N, H, W, C) as torch's convolutions take it."""
    return image.permute(0, 3, 1, 2)


def _evenly(image: Tensor) -> Tensor:
    """(N, H, W, C) whose pixels lie equally far apart in a clip; a copy if they do not."""
    even = image.stride(3) == 1 and image.stride(1) == image.shape[2] * image.stride(2)
    return image if even else image.contiguous()


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copies (N, H, W, C), past autograd, which would take it for a change of what else lies in the target's memory."""
    even = all(t.stride(3) == 1 and t.stride(1) == t.shape[2] * t.stride(2) for t in (target, source))
    if target.dtype != source.dtype or not even:
        target.data.copy_(source)
        return
    clips, height, width, channels = target.shape
    columns = triton.next_power_of_2(channels)
    rows = max(1, 4096 // columns)
    constants: dict[str, Any] = {
        "FROM": source.stride(2), "TO": target.stride(2), "PIXELS": height * width, "C": channels, "BM": rows,
        "BC": columns,
    }  # fmt: skip
    args = (source, target, source.stride(0), target.stride(0))
    launch(copy_pixels, (triton.cdiv(height * width, rows), clips), args, constants, 4)


class Convolved:
    """The steps of a layer, its weights laid side by side; images are (N, H, W, C + C_h), channels last."""

    def __init__(
        self, layer: Layer, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, peephole: Sequence[Tensor | None]
    ) -> None:
        both = torch.cat([weight_ih.detach(), weight_hh.detach()], 1)
        self.weight = both.to(layer.dtype, memory_format=torch.channels_last)
        self.weight_ih, self.weight_hh = weight_ih, weight_hh
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.peephole = peephole
        self.padding = [k // 2 for k in layer.kernel]
        self.parts = triton.cdiv(layer.size[0] * layer.size[1], _BACKWARD[0] * _ROUNDS)
        self.constants: dict[str, Any] = {
            "PIXELS": layer.size[0] * layer.size[1], "C": layer.hidden, "ACT": layer.activation, "FAST": layer.fast,
            "PEEPHOLE": peephole_kind(peephole[0]), "HAS_BIAS": bias is not None,
        }  # fmt: skip

    @cached_property
    def _weight_x(self) -> Tensor:
        return self.weight_ih.detach().to(self.weight.dtype, memory_format=torch.channels_last)

    def _weight(self, images: Tensor) -> Tensor:
        """For images, or without a state for the input alone."""
        return self.weight if images.shape[-1] == self.weight.shape[1] else self._weight_x

    def new_images(self, layer: Layer, x: Tensor, steps: int) -> Tensor:
        """Memory (steps, N, H, W, C + C_h) for the images of some steps."""
        return x.new_empty(steps, layer.clips, *layer.size, layer.channels + layer.hidden)

    def new_gates(self, layer: Layer, x: Tensor, steps: int) -> Tensor:
        """Memory (steps, N, H, W, 4 * C_h) for gates before activation, or their gradients."""
        return x.new_empty(steps, layer.clips, *layer.size, 4 * layer.hidden)

    def step(
        self, image: Tensor, z: Tensor, c_in: Tensor | None, c_out: Tensor, c_save: Tensor | None, h_out: Tensor | None,
        h_next: Tensor | None,
    ) -> None:  # fmt: skip
        """Writes z, (N, H, W, 4 * C_h), the next c, and the next h into one or two places.

        Without a state the image is the input's, (N, H, W, C).
        """
        if image.is_cuda:
            cudnn = torch.backends.cudnn
            deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
            torch.ops.aten.cudnn_convolution.out(
                _first(image), self._weight(image), self.padding, [1, 1], [1, 1], 1, cudnn.benchmark, deterministic,
                cudnn.allow_tf32, out=_first(z),
            )  # fmt: skip
        else:
            _first(z).copy_(torch.convolution(
                _first(image), self._weight(image), None, [1, 1], self.padding, [1, 1], False, [0, 0], 1
            ))  # fmt: skip
        pixels, channels, warps = _FORWARD
        constants = self.constants | {
            "NEXT": 0 if h_next is None else h_next.stride(2), "HAS_STATE": c_in is not None,
            "SAVE_C": c_save is not None, "HAS_OUT": h_out is not None, "HAS_NEXT": h_next is not None,
            "BM": pixels, "BC": channels,
        }  # fmt: skip
        args = (
            z, self.bias, c_in, c_out, c_save, h_out, h_next, *self.peephole, z.stride(0), c_out.stride(0),
            *(0 if t is None else t.stride(0) for t in (c_save, h_out, h_next)),
        )  # fmt: skip
        clips, height, width, hidden = c_out.shape
        grid = (triton.cdiv(height * width, pixels) * triton.cdiv(hidden, channels), clips)
        launch(update_state, grid, args, constants, warps)

    def back(
        self, z: Tensor, c_in: Tensor | None, dout: Tensor | None, dh: Tensor | None, dc_in: Tensor | None, dc: Tensor,
        da: Tensor, dpeephole: Tensor | None, dbias: Tensor | None,
    ) -> None:  # fmt: skip
        """Writes da, (N, H, W, 4 * C_h), and the gradient of c_in, and adds to those of the peepholes and the bias."""
        pixels, channels, warps = _BACKWARD
        constants = self.constants | {
            "parts": self.parts, "DH": 0 if dh is None else dh.stride(2), "HAS_STATE": c_in is not None,
            "HAS_DOUT": dout is not None, "HAS_DH": dh is not None, "HAS_DC": dc_in is not None,
            "BM": pixels, "BC": channels, "ROUNDS": _ROUNDS,
        }  # fmt: skip
        args = (
            z, self.bias, c_in, dout, dh, dc_in, dc, da, dpeephole, dbias, *self.peephole, z.stride(0),
            *(0 if t is None else t.stride(0) for t in (c_in, dout, dh)), dc.stride(0),
        )  # fmt: skip
        grid = (self.parts * triton.cdiv(dc.shape[-1], channels), dc.shape[0])
        launch(update_gradients, grid, args, constants, warps)

    def _backward(self, da: Tensor, images: Tensor, of_images: bool) -> Tensor:
        found = torch.ops.aten.convolution_backward(
            _first(da), _first(images), self._weight(images), None, [1, 1], self.padding, [1, 1], False, [0, 0], 1,
            [of_images, not of_images, False],
        )  # fmt: skip
        return found[0 if of_images else 1]

    def image_gradient(self, da: Tensor, image: Tensor) -> Tensor:
        """Of an image, from da of its step."""
        return self._backward(da, image, True).permute(0, 2, 3, 1).contiguous()

    def weight_gradient(self, da: Tensor, images: Tensor) -> Tensor:
        """Of the weights, side by side, summed over (steps, N, ...)."""
        return self._backward(da.flatten(0, 1), images.flatten(0, 1), False)


class ConvolvedSums:
    """Gradients of W_hh and W_ih, added up chunk by chunk."""

    def __init__(self, convolved: Convolved) -> None:
        self.convolved = convolved
        self.sums: Tensor | None = None

    def add(self, images: Tensor, da: Tensor) -> None:
        """Adds those of some steps, each (steps, N, H, W, ...)."""
        if self.sums is None:
            self.sums = torch.zeros_like(self.convolved.weight, dtype=torch.float32)
        self.sums[:, : images.shape[-1]] += self.convolved.weight_gradient(da, images)

    def results(self) -> list[Tensor]:
        """The gradients of W_hh and W_ih in their own layout and dtype."""
        weights = self.convolved.weight_hh, self.convolved.weight_ih
        if self.sums is None:
            return [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights]
        cut = weights[1].shape[1]
        parts = self.sums[:, cut:], self.sums[:, :cut]
        return [p.to(w.dtype, memory_format=torch.contiguous_format).contiguous() for p, w in zip(parts, weights)]


def run_forward(
    layer: Layer, convolved: Convolved, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, keep_h: bool, keep_c: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the steps on x (N, T, H, W, C); see :func:`convlstm_fish.ops.triton_kernels.passes.run_forward`.

    Returns:
        h, c_n and the cells as there, and in the order of the steps, empty without ``keep_c``: the gates before
        activation, (T, N, H, W, 4 * C_h), and the images (T, N, H, W, C + C_h). Without h_0 the first step has no
        image, for it reads x alone.
    """
    clips, steps, channels = layer.clips, layer.steps, layer.channels
    frame = (*layer.size, layer.hidden)
    h = x.new_empty(clips, steps if keep_h else 2, *frame)
    c = x.new_empty((clips, *frame), dtype=torch.float32)
    cells = x.new_empty((clips, steps, *frame) if keep_c else (0,))
    skipped = int(h_0 is None)
    z = convolved.new_gates(layer, x, steps if keep_c else 1)
    images = convolved.new_images(layer, x, steps - skipped if keep_c else 1)
    place = lambda s: images[s - skipped if keep_c else 0]  # noqa: E731
    c_in = c_0
    for s in range(steps):
        t, last = steps - 1 - s if layer.reverse else s, s + 1 == steps
        if s < skipped:
            image = x[:, t].contiguous()
        else:
            image = place(s)
            copy_into(image[..., :channels], x[:, t])
            if s == 0 and h_0 is not None:
                copy_into(image[..., channels:], h_0)
        h_next = None if last else place(s + 1)[..., channels:]
        h_out = h[:, t] if keep_h else h[:, s % 2] if last else None
        convolved.step(image, z[s if keep_c else 0], c_in, c, cells[:, t] if keep_c else None, h_out, h_next)
        c_in = c
    return (h, c, cells, z, images) if keep_c else (h, c, cells, x.new_empty(0), x.new_empty(0))


def run_backward(
    layer: Layer, convolved: Convolved, gradients: Any, chunk: int, dout: Tensor | None, dh_n: Tensor | None,
    dc_n: Tensor | None, cells: Tensor | None, z: Tensor, images: Tensor, x: Tensor | None, c_0: Tensor | None,
    need_x: bool, need_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Adds to the gradients of the parameters, whose sums take up ``chunk`` steps at a time.

    Returns:
        The gradients of x, h_0 and c_0, empty unless needed.
    """
    steps, channels = layer.steps, layer.channels
    dout, dc_in = (None if t is None else t.contiguous() for t in (dout, dc_n))
    dh = None if dh_n is None else _evenly(dh_n)
    dc = torch.empty((layer.clips, *layer.size, layer.hidden), dtype=torch.float32, device=z.device)
    dx = z.new_empty((layer.clips, steps, *layer.size, channels) if need_x and steps > 1 else (0,))
    skipped, waiting = steps - images.shape[0], 0
    for s in reversed(range(steps)):
        t, before = (steps - 1 - s, steps - s) if layer.reverse else (s, s - 1)
        if s < skipped:
            assert x is not None
            those, at = x[:, t].contiguous()[None], 0
        else:
            those, at = images, s - skipped
        if waiting == 0:  # filled from its end, for the last step comes first
            da = gradients.room(layer, z, max(1, min(chunk, s + 1 - skipped)))
        da_s = da[-1 - waiting]
        c_in = c_0 if s == 0 or cells is None else cells[:, before]
        dout_t = None if dout is None else dout[:, t]
        convolved.back(z[s], c_in, dout_t, dh, dc_in, dc, da_s, gradients.dpeephole, gradients.dbias)
        dc_in = dc
        if s > 0 or need_x or need_state:
            both = convolved.image_gradient(da_s, those[at])
            dh = both[..., channels:]
            if need_x and steps > 1:
                copy_into(dx[:, t], both[..., :channels])
            elif need_x:
                dx = both[..., :channels].unsqueeze(1)
        waiting += 1
        if waiting == da.shape[0]:
            gradients.add_convolved(those[at : at + waiting], da)
            waiting = 0
    return (dx, dh, dc) if need_state and dh is not None else (dx, z.new_empty(0), dc.new_empty(0))
