"""The parameters of a layer as its kernels read them, and their gradients as its backward pass adds them up."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from convlstm_fish.ops.hopper_kernels.parameters import Parameters
from convlstm_fish.ops.hopper_kernels.plan import Shape, covers
from convlstm_fish.ops.hopper_kernels.steps import Steps, Sums
from convlstm_fish.ops.triton_kernels import convolved
from convlstm_fish.ops.triton_kernels.convolved import Convolved, ConvolvedSums
from convlstm_fish.ops.triton_kernels.layer import Layer, multiprocessors, pack_weight, peephole_kind
from convlstm_fish.ops.triton_kernels.sums import ImageWeight, WeightSums, image_weight
from convlstm_fish.ops.triton_kernels.tuning import Tile

# The gates' gradients of so many bytes are kept until the weights' gradients take them up.
CHUNK_BYTES = 512 << 20
NO_SECOND_DERIVATIVE = "the Triton kernels have no second derivative; take backend='reference'"


def chunk_steps(layer: Layer) -> int:
    """How many steps' gates' gradients that is, at least one."""
    one = 4 * layer.clips * layer.size[0] * layer.size[1] * layer.hidden * layer.dtype.itemsize
    return max(1, CHUNK_BYTES // one)


class Weights:
    """The parameters of a layer. Each matrix that a kernel reads is packed once, when it is first asked for.

    Args:
        layer: sizes and options; that of time does not matter here.
        weight_ih: (4 * C_h, C, *kernel).
        weight_hh: (4 * C_h, C_h, *kernel_h).
        bias: (4 * C_h,) or None.
        peephole: three weights, (C_h,) or (H', W', C_h) each, or three None.
        plain: the calls have no mask and no lengths.

    Attributes:
        steps: the Hopper kernels' steps, None where those do not cover the layer.
        convolved: a wide layer's steps, None where those do not cover it.
    """

    def __init__(
        self, layer: Layer, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, *peephole: Tensor | None,
        plain: bool,
    ) -> None:  # fmt: skip
        self.layer, self.weight_ih, self.weight_hh, self.bias = layer, weight_ih, weight_hh, bias
        self.peephole = peephole
        self.peephole_kind = peephole_kind(peephole[0])
        self.steps = self._hopper_steps() if plain and not self.peephole_kind else None
        self.convolved: Convolved | None = None
        if plain and convolved.covers(layer):
            self.convolved = Convolved(layer, weight_ih, weight_hh, bias, peephole)

    def _hopper_steps(self) -> Steps | None:
        layer = self.layer
        shape = Shape(
            layer.channels, layer.hidden, layer.size_in, layer.size, layer.pads, layer.activation,
            layer.dtype == torch.float16, layer.fast, self.bias is not None,
        )  # fmt: skip
        if not covers(shape, layer.kernel, layer.kernel_x, layer.stride, layer.dilation, layer.dtype, layer.device):
            return None
        parameters = Parameters(shape, layer.dtype, self.weight_ih, self.weight_hh, self.bias)
        return Steps(shape, parameters, layer.device, multiprocessors(layer.device))

    @cached_property
    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """W_ih, W_hh and the bias for the forward step."""
        return self._gates(self.layer.tiles.forward)

    @cached_property
    def backward(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The same for the backward step, where it computes the gates again."""
        return (None, None, None) if self.layer.tiles.keep_gates else self._gates(self.layer.tiles.backward)

    def _gates(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor | None]:
        return (
            pack_weight(self.weight_ih, self.layer, tile.rows_x, tile.channels, False),
            pack_weight(self.weight_hh, self.layer, tile.rows, tile.channels, False),
            None if self.bias is None else pack_weight(self.bias, self.layer, 1, tile.channels, False),
        )

    @cached_property
    def adjoint(self) -> Tensor:
        """W_hh for the adjoint in the backward step."""
        tile = self.layer.tiles.backward
        return pack_weight(self.weight_hh, self.layer, tile.rows_back, tile.channels, True, self.layer.halo > 0)

    @cached_property
    def image_x(self) -> ImageWeight:
        """W_ih for the gradient of the input."""
        return image_weight(self.layer, self.weight_ih, self.layer.tiles.image, self.layer.convolution())

    @cached_property
    def image_h(self) -> ImageWeight:
        """W_hh for the gradient of h_0."""
        return image_weight(self.layer, self.weight_hh, None, self.layer.recurrence())


class Gradients:
    """Gradients of a layer's parameters, added up step by step.

    Attributes:
        dbias: sums that the backward step adds to, one row a tile, or None without a bias.
        dpeephole: the same of the peepholes, (N, H', W', 3, C_h), or None.
    """

    def __init__(self, layer: Layer, weights: Weights) -> None:
        self.weights = weights
        self.dbias = self.dpeephole = None
        if weights.bias is not None:
            rows = layer.clips * layer.tiles_per_image
            for kernels in (weights.steps, weights.convolved):
                rows = rows if kernels is None else kernels.bias_rows
            self.dbias = torch.zeros(rows, 4 * layer.hidden, device=layer.device)
        if weights.peephole_kind:
            self.dpeephole = torch.zeros(layer.clips, *layer.size, 3, layer.hidden, device=layer.device)
        self.sums: list[WeightSums] | list[Sums] | list[ConvolvedSums]
        if weights.convolved is not None:
            self.sums = [ConvolvedSums(weights.convolved)]
            return
        if weights.steps is not None:
            self.sums = [
                weights.steps.sums(weights.weight_hh, weights.weight_ih, layer.clips, layer.steps, layer.reverse)
            ]
            return
        both = (weights.weight_hh, weights.weight_ih)
        pairs = [both] if layer.tiles.weight.together else [(both[0], None), (None, both[1])]
        self.sums = [WeightSums(layer, *pair) for pair in pairs]

    def room(self, layer: Layer, steps: int) -> Tensor:
        """Memory for the gates' gradients of so many steps, (N, steps, ...) or of a convolved layer (steps, N, ...)."""
        if self.weights.convolved is not None:
            return self.weights.convolved.new_gates(steps)
        shape: tuple[int, ...] = (layer.clips, steps, *layer.size, 4 * layer.hidden)
        if self.weights.steps is not None:
            shape = self.weights.steps.da_shape(layer.clips, steps)
        return torch.empty(shape, dtype=layer.dtype, device=layer.device)

    def add(
        self, h: Tensor, h_t: int, with_h: bool, x: Tensor, mask: Tensor | None, da: Tensor, first: int, steps: int,
        lengths: Tensor | None,
    ) -> None:  # fmt: skip
        """Adds the weights' gradients of some steps; see :meth:`WeightSums.add`."""
        for each in self.sums:
            assert not isinstance(each, ConvolvedSums)
            each.add(h, h_t, with_h, x, mask, da, first, steps, lengths)

    def add_convolved(self, images: Tensor, da: Tensor) -> None:
        """The same of a convolved layer; see :meth:`ConvolvedSums.add`."""
        for each in self.sums:
            assert isinstance(each, ConvolvedSums)
            each.add(images, da)

    def add_input(self, x: Tensor, da: Tensor) -> None:
        """And of an input that does not lie in the images; see :meth:`ConvolvedSums.add_input`."""
        for each in self.sums:
            assert isinstance(each, ConvolvedSums)
            each.add_input(x, da)

    def results(self) -> list[Tensor]:
        """The gradients of W_ih and W_hh, then of the bias and of the three peepholes, if any."""
        dw_hh, dw_ih = (gradient for each in self.sums for gradient in each.results())
        found = [dw_ih, dw_hh]
        if self.dbias is not None and self.weights.bias is not None:
            found.append(self.dbias.sum(0).to(self.weights.bias.dtype))
        if self.dpeephole is not None:
            summed = self.dpeephole.sum((0, 1, 2)) if self.weights.peephole_kind == 1 else self.dpeephole.sum(0)
            found += [part.clone(memory_format=torch.contiguous_format) for part in summed.unbind(-2)]
        return found
