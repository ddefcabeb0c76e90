"""One ConvLSTM layer's parameters, and one step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convlstm_fish.ops import ACTIVATIONS, BACKENDS, conv_lstm, unroll, unroll_stack
from convlstm_fish.ops.equations import (
    RECURRENT_ACTIVATIONS,
    Norm,
    Peephole,
    State,
    Weights,
    gates,
    input_part,
    recurrent_part,
    squash,
)
from convlstm_fish.ops.geometry import Padding, geometry, per_dim


class ConvLSTMCell(nn.Module):
    r"""One step of a convolutional LSTM (Shi et al. 2015, arXiv:1506.04214, eq. 3).

    With * a convolution, ∘ the product of elements and σ the recurrent activation::

        i = σ(W_xi * x + W_hi * h_0 + w_ci ∘ c_0 + b_i)
        f = σ(W_xf * x + W_hf * h_0 + w_cf ∘ c_0 + b_f)
        g = tanh(W_xg * x + W_hg * h_0 + b_g)
        c_1 = f ∘ c_0 + i ∘ g
        o = σ(W_xo * x + W_ho * h_0 + w_co ∘ c_1 + b_o)
        h_1 = o ∘ tanh(c_1)

    Unlike the paper, peepholes are an option, and each gate has one bias (torch.nn.LSTM has two, whose sum counts).

    Args:
        in_channels: channels of x.
        hidden_channels: channels of h and c.
        kernel_size: of both convolutions; an int, or one per spatial dimension.
        stride: of the input convolution. The recurrent one is always stride 1, same size, whatever the input's is.
        padding: of the input convolution: "same" (as TensorFlow pads), "valid", or ints.
        dilation: of the input convolution.
        bias: with biases; the forget gate's starts at 1 (Jozefowicz et al. 2015) unless ``unit_forget_bias`` is False.
        peephole: None, "channel" for one weight per channel, or the size (H, W) of the images x for the paper's one
            weight per channel and pixel of the state.
        recurrent_activation: of i, f and o: "sigmoid", "hard_sigmoid" (Keras 2: clip(0.2x + 0.5, 0, 1)) or
            "hard_sigmoid_v3" (Keras 3: relu6(x + 3) / 6).
        unit_forget_bias: see ``bias``.
        norm: None, "layer" or "group": both convolutions, before the bias is added, and c on its way to h are
            normalised over the channels of a group and all pixels of one clip at one step, with a gain per channel (Ba
            et al. 2016, arXiv:1607.06450, eq. 20 to 22). "layer" takes the four gates as one group; "group" normalises
            each gate by itself, in ``norm_groups`` groups. Any image size; runs on the reference backend.
        norm_groups: see ``norm``; it divides ``hidden_channels``.
        spatial_dims: 1, 2 or 3, where ``kernel_size`` is an int; a tuple's length decides itself.
        backend: "auto", "reference" or "triton"; see :func:`convlstm_fish.ops.conv_lstm`.
        device, dtype: of the parameters.

    Parameters, the gates in the order i, f, g, o:
        weight_ih (4 * hidden_channels, in_channels, *kernel_size), weight_hh (4 * hidden_channels, hidden_channels,
        *kernel_size), bias (4 * hidden_channels,), weight_ci, weight_cf, weight_co (hidden_channels, 1, 1) or
        (hidden_channels, H', W'), and with a norm the gains norm_ih, norm_hh (4 * hidden_channels,), norm_c and the
        offset norm_c_bias (hidden_channels,).

    Inputs: x (N, C, H, W), and (h_0, c_0) each (N, hidden_channels, H', W') or None for zeros; N may be left out.

    Outputs: h_1, c_1, each (N, hidden_channels, H', W'). A loop of steps is sooner done with `unrolled`.

    Example:
        >>> cell = ConvLSTMCell(3, 8, 5)
        >>> state = None
        >>> for x in torch.rand(4, 2, 3, 16, 16):
        ...     state = cell(x, state)
        >>> state[0].shape
        torch.Size([2, 8, 16, 16])
    """

    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    bias: nn.Parameter | None
    weight_ci: nn.Parameter | None
    weight_cf: nn.Parameter | None
    weight_co: nn.Parameter | None
    norm_ih: nn.Parameter | None
    norm_hh: nn.Parameter | None
    norm_c: nn.Parameter | None
    norm_c_bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: Padding = "same",
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        peephole: str | Sequence[int] | None = None,
        recurrent_activation: str = "sigmoid",
        unit_forget_bias: bool = True,
        norm: str | None = None,
        norm_groups: int = 1,
        spatial_dims: int = 2,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("hidden_channels", hidden_channels)):
            if not isinstance(value, int):
                raise TypeError(f"{name} must be one int, the same for every layer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(kernel_size, int):
            spatial_dims = len(kernel_size)
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"a ConvLSTM has 1, 2 or 3 spatial dimensions, got {spatial_dims}")
        if recurrent_activation not in ACTIVATIONS:
            raise ValueError(f"recurrent_activation must be one of {ACTIVATIONS}, got {recurrent_activation!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.spatial_dims = spatial_dims
        self.kernel_size = per_dim("kernel_size", kernel_size, spatial_dims, 1)
        self.stride = per_dim("stride", stride, spatial_dims, 1)
        self.dilation = per_dim("dilation", dilation, spatial_dims, 1)
        self.padding: str | tuple[int, ...]
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f'padding must be "same", "valid" or ints, got {padding!r}')
            self.padding = padding
        else:
            self.padding = per_dim("padding", padding, spatial_dims, 0)
        if norm not in (None, "layer", "group"):
            raise ValueError(f'norm must be None, "layer" or "group", got {norm!r}')
        if norm_groups < 1 or hidden_channels % norm_groups or (norm != "group" and norm_groups != 1):
            raise ValueError(
                f'norm_groups must divide hidden_channels={hidden_channels}, and needs norm="group", got {norm_groups}'
            )
        self.norm = norm
        self.norm_groups = norm_groups
        self.recurrent_activation = recurrent_activation
        self.unit_forget_bias = unit_forget_bias
        self.backend = backend
        self.peephole: str | tuple[int, ...] | None
        weights: tuple[int, ...] = (1,) * spatial_dims  # of a peephole, per channel
        if peephole is None or isinstance(peephole, str):
            if peephole not in (None, "channel"):
                raise ValueError(f'peephole must be None, "channel" or an image size, got {peephole!r}')
            self.peephole = peephole
        else:
            self.peephole = per_dim("peephole", tuple(peephole), spatial_dims, 1)
            weights = self.output_size(self.peephole)

        def parameter(name: str, wanted: bool, *shape: int) -> None:
            value = nn.Parameter(torch.empty(*shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, value)

        parameter("weight_ih", True, 4 * hidden_channels, in_channels, *self.kernel_size)
        parameter("weight_hh", True, 4 * hidden_channels, hidden_channels, *self.kernel_size)
        parameter("bias", bias, 4 * hidden_channels)
        for name in ("weight_ci", "weight_cf", "weight_co"):
            parameter(name, peephole is not None, hidden_channels, *weights)
        for name, channels in (("norm_ih", 4), ("norm_hh", 4), ("norm_c", 1), ("norm_c_bias", 1)):
            parameter(name, norm is not None, channels * hidden_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as Keras does: Glorot uniform input kernel, orthogonal recurrent kernel, zero bias and peepholes.

        The gains of a norm start at 1, its offset at 0.
        """
        with torch.no_grad():
            # In float32 where 16 bits are asked for: there is no QR decomposition in 16 bits.
            wide = self.weight_ih.dtype if self.weight_ih.dtype == torch.float64 else torch.float32
            self.weight_ih.copy_(nn.init.xavier_uniform_(torch.empty_like(self.weight_ih, dtype=wide)))
            self.weight_hh.copy_(nn.init.orthogonal_(torch.empty_like(self.weight_hh, dtype=wide)))
            if self.bias is not None:
                self.bias.zero_()
                if self.unit_forget_bias:
                    self.bias[self.hidden_channels : 2 * self.hidden_channels] = 1.0
            for weight in self.peepholes or ():
                weight.zero_()
            if (norm := self.norms) is not None:
                for gain in (norm.weight_ih, norm.weight_hh, norm.weight_c):
                    gain.fill_(1.0)
                norm.bias_c.zero_()

    @property
    def peepholes(self) -> Peephole | None:
        """(weight_ci, weight_cf, weight_co), or None without peepholes."""
        if self.weight_ci is None or self.weight_cf is None or self.weight_co is None:
            return None
        return self.weight_ci, self.weight_cf, self.weight_co

    @property
    def norms(self) -> Norm | None:
        """Groups, gains and offset of the norm, or None without."""
        if self.norm_ih is None or self.norm_hh is None or self.norm_c is None or self.norm_c_bias is None:
            return None
        groups, groups_c = (1, 1) if self.norm == "layer" else (4 * self.norm_groups, self.norm_groups)
        return Norm(groups, groups_c, self.norm_ih, self.norm_hh, self.norm_c, self.norm_c_bias)

    def output_size(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Size (H', W') of the state for images x of size (H, W)."""
        return geometry(sizes, self.kernel_size, self.stride, self.padding, self.dilation).out

    def sequence(
        self,
        input: Tensor,
        hx: State | None = None,
        **options: Any,
    ) -> tuple[Tensor | None, State]:
        """All steps of (N, T, C, H, W); ``options`` are those of :func:`convlstm_fish.ops.conv_lstm`."""
        options = self._options() | options
        return conv_lstm(input, hx, self.weight_ih, self.weight_hh, self.bias, self.peepholes, **options)

    def unrolled(self) -> Callable[[Tensor, State | None], State]:
        """What the cell does, for the steps of one forward pass: the same values, sooner on a GPU.

        Returns:
            ``step(x, hx)``, for which see :func:`convlstm_fish.ops.unroll`; x is batched.

        Example:
            >>> step, state = ConvLSTMCell(3, 8, 5).unrolled(), None
            >>> for x in torch.rand(4, 2, 3, 16, 16):
            ...     state = step(x, state)
        """
        return unroll(**self._weights(), **self._options())

    @staticmethod
    def unrolled_stack(
        cells: Iterable[ConvLSTMCell],
    ) -> Callable[[Tensor | None, Sequence[State | None]], tuple[Tensor, list[State]]]:
        """The same of cells of which each reads the h of the one before.

        Returns:
            ``step(x, states)``, for which see :func:`convlstm_fish.ops.unroll_stack`; x is batched.

        Example:
            >>> cells = [ConvLSTMCell(3, 8, 5), ConvLSTMCell(8, 16, 3)]
            >>> step, states = ConvLSTMCell.unrolled_stack(cells), [None, None]
            >>> for x in torch.rand(4, 2, 3, 16, 16):
            ...     output, states = step(x, states)
        """
        return unroll_stack([cell._options() | cell._weights() for cell in cells])

    def _weights(self) -> dict[str, Any]:
        return {
            "weight_ih": self.weight_ih, "weight_hh": self.weight_hh, "bias": self.bias, "peephole": self.peepholes
        }  # fmt: skip

    def _options(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "recurrent_activation": self.recurrent_activation,
            "backend": self.backend,
            "norm": self.norms,
        }

    def forward(self, x: Tensor, hx: State | None = None) -> State:
        """One step; see the class."""
        batched = x.dim() == self.spatial_dims + 2
        if not batched and x.dim() != self.spatial_dims + 1:
            raise ValueError(
                f"x must be (N, {self.in_channels}, *spatial) with {self.spatial_dims} spatial dimensions, "
                f"got {tuple(x.shape)}"
            )
        if x.shape[-1 - self.spatial_dims] != self.in_channels:
            raise ValueError(f"x must have in_channels={self.in_channels} channels, got shape {tuple(x.shape)}")
        if not batched:
            x = x.unsqueeze(0)
            hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        _, (h, c) = self.sequence(x.unsqueeze(1), hx, return_sequences=False)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    def gates(self, x: Tensor, hx: State | None = None) -> dict[str, Tensor]:
        """The four gates of one step and the state after it, to look at: keys i, f, g, o, c, h.

        Args:
            x: (N, C, H, W).
            hx: (h_0, c_0) or None.
        """
        where = geometry(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        w = Weights(self.weight_ih, self.weight_hh, self.bias, self.peepholes, self.norms, None)
        if hx is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_channels, *where.out)
            hx = (zeros, zeros)
        z = input_part(x, w, where) + recurrent_part(hx[0], w)
        i, f, g, o, c = gates(z, hx[1], w.peephole, RECURRENT_ACTIVATIONS[self.recurrent_activation])
        return {"i": i, "f": f, "g": g, "o": o, "c": c, "h": o * squash(c, w.norm)}

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.hidden_channels}, kernel_size={self.kernel_size}"]
        defaults: dict[str, Any] = {
            "stride": (1,) * self.spatial_dims,
            "padding": "same",
            "dilation": (1,) * self.spatial_dims,
            "peephole": None,
            "recurrent_activation": "sigmoid",
            "unit_forget_bias": True,
            "norm": None,
            "norm_groups": 1,
            "backend": "auto",
        }
        parts += [f"{k}={getattr(self, k)!r}" for k, default in defaults.items() if getattr(self, k) != default]
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)
