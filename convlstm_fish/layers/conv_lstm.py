"""The ConvLSTM layer: to images what torch.nn.LSTM is to vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from convlstm_fish.layers.conv_lstm_cell import ConvLSTMCell
from convlstm_fish.layers.lengths import as_lengths, pad_clips
from convlstm_fish.ops.equations import State
from convlstm_fish.ops.geometry import Padding


class ConvLSTM(nn.Module):
    r"""A stack of convolutional LSTM layers over whole clips (Shi et al. 2015); equations in :class:`ConvLSTMCell`.

    It has the surface of torch.nn.LSTM; ``proj_size`` is left out. ``dropout`` is Keras's, not torch.nn.LSTM's: it
    acts on the input of every layer, the first one's too.

    Args:
        in_channels: channels of the clips.
        hidden_channels: channels of h and c, in each layer and direction.
        kernel_size: of both convolutions; an int, or one per spatial dimension.
        num_layers: layers stacked, each fed by the output of the one before.
        batch_first: clips are (N, T, ...), the default, or (T, N, ...) if False. States never change their order.
        bidirectional: a second cell per layer runs backwards in time, and the two outputs are concatenated.
        dropout: probability with which an element of each layer's input is zeroed in training, the others scaled up.
            One mask per clip, layer and direction, shared by all steps (Keras; Gal & Ghahramani 2016,
            arXiv:1512.05287), and by the four gates (Keras's ConvLSTM layers draw one for each gate).
        recurrent_dropout: the same for h_{t-1} where it enters the recurrent convolution.
        return_sequences: False returns, in place of the output sequence, the last layer's final h (N, C_h * directions,
            H', W'), and keeps no sequence of that layer. In reverse the final step is the clip's first.
        checkpoint_every: keep only the state of every so many steps for the backward pass and compute the rest again.
        detach_every: truncated back-propagation through time: no gradient passes between a step whose number is a
            multiple of this and the one before it. (For a clip that does not fit in memory, hand the layer one piece
            after the other, with the state detached: ``hx = tuple(s.detach() for s in state)``.)
        backend: "auto", "reference" or "triton"; see :func:`convlstm_fish.ops.conv_lstm`.
        stride, padding, dilation, bias, peephole, recurrent_activation, unit_forget_bias, norm, norm_groups,
            spatial_dims, device, dtype: as in :class:`ConvLSTMCell`, for every layer.

    Parameters: those of ``cells``, one :class:`ConvLSTMCell` per layer and direction in the order of torch.nn.LSTM
        (layer 0, layer 0 reverse, layer 1, ...).

    Inputs:
        input: (N, T, C, H, W), or (T, C, H, W) for one clip, or a list of clips (T_n, C, H, W) of any lengths, or a
            PackedSequence.
        hx: None for zeros, or (h_0, c_0), each (num_layers * directions, N, C_h, H', W').
        lengths: (N,) whole numbers from 1 to T, or None. Each clip stops at its own last step; no work is spent on
            the padding after it, and nothing in it is read.

    Outputs: ``output, (h_n, c_n)``: output (N, T, C_h * directions, H', W'), zero past a clip's length, or in the form
        of the input a list of (T_n, C_h * directions, H', W') or a PackedSequence; h_n and c_n (num_layers *
        directions, N, C_h, H', W') the state after each clip's last step. Under 16-bit autocast (or with 16-bit input)
        c is float32.

    Example:
        >>> layer = ConvLSTM(1, 16, 3, num_layers=2)
        >>> output, (h_n, c_n) = layer(torch.rand(4, 10, 1, 32, 32))
        >>> output.shape, h_n.shape
        (torch.Size([4, 10, 16, 32, 32]), torch.Size([2, 4, 16, 32, 32]))
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int | Sequence[int],
        num_layers: int = 1,
        *,
        batch_first: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        return_sequences: bool = True,
        checkpoint_every: int | None = None,
        detach_every: int | None = None,
        backend: str = "auto",
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        for name, rate in (("dropout", dropout), ("recurrent_dropout", recurrent_dropout)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {rate}")
        for name, every in (("checkpoint_every", checkpoint_every), ("detach_every", detach_every)):
            if every is not None and every < 1:
                raise ValueError(f"{name} must be at least 1 step, got {every}")
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.recurrent_dropout = recurrent_dropout
        self.return_sequences = return_sequences
        self.checkpoint_every = checkpoint_every
        self.detach_every = detach_every
        directions = 2 if bidirectional else 1
        self.cells = nn.ModuleList(
            ConvLSTMCell(
                in_channels if layer == 0 else directions * hidden_channels,
                hidden_channels,
                kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                bias=bias,
                peephole=peephole,
                recurrent_activation=recurrent_activation,
                unit_forget_bias=unit_forget_bias,
                norm=norm,
                norm_groups=norm_groups,
                spatial_dims=spatial_dims,
                backend=backend,
                device=device,
                dtype=dtype,
            )
            for layer in range(num_layers)
            for _ in range(directions)
        )
        cell = self._cell(0)
        self.spatial_dims = cell.spatial_dims
        probe = tuple(64 + d * k for d, k in zip(cell.dilation, cell.kernel_size))
        if num_layers > 1 and cell.output_size(probe) != probe:
            raise ValueError(
                f"num_layers={num_layers} needs layers that keep the image size, so that their states can be stacked; "
                f"stride={stride}, padding={padding!r} does not: use one ConvLSTM per layer"
            )

    def _cell(self, index: int) -> ConvLSTMCell:
        return self.cells[index]  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """Start every cell afresh."""
        for cell in self.cells:
            cell.reset_parameters()  # type: ignore[operator]

    def forward(
        self,
        input: Tensor | PackedSequence | Sequence[Tensor],
        hx: State | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, State]:
        """See the class."""
        lengths = as_lengths(lengths)
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, lengths)
        if not isinstance(input, Tensor):
            return self._listed(input, hx, lengths)
        batched = input.dim() == self.spatial_dims + 3
        if not batched and input.dim() != self.spatial_dims + 2:
            order = "(N, T" if self.batch_first else "(T, N"
            raise ValueError(
                f"input must be {order}, {self.in_channels}, *spatial) with {self.spatial_dims} spatial dimensions, "
                f"got {tuple(input.shape)}"
            )
        if batched:
            return self._batch(input, hx, lengths)
        if lengths is not None:
            raise ValueError("lengths needs a batch of clips (N, T, ...), got one clip")
        hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        clip_dim = 0 if self.batch_first else 1
        output, (h_n, c_n) = self._batch(input.unsqueeze(clip_dim), hx, None)
        return output.squeeze(clip_dim if self.return_sequences else 0), (h_n.squeeze(1), c_n.squeeze(1))

    def _batch(self, input: Tensor, hx: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        x = input if self.batch_first else input.transpose(0, 1)
        if x.dim() != self.spatial_dims + 3 or x.shape[2] != self.in_channels:
            raise ValueError(
                f"input must be clips with in_channels={self.in_channels} channels in dimension 2 and "
                f"{self.spatial_dims} spatial dimensions after it, got {tuple(input.shape)}"
            )
        if hx is not None and (len(hx) != 2 or any(len(state) != len(self.cells) for state in hx)):
            raise ValueError(
                f"hx must be (h_0, c_0), each ({len(self.cells)}, N, {self.hidden_channels}, *out) for "
                f"num_layers={self.num_layers}, bidirectional={self.bidirectional}, got "
                f"{[tuple(state.shape) for state in hx]}"
            )
        directions = 2 if self.bidirectional else 1
        states: list[State] = []
        for layer in range(self.num_layers):
            last = layer == self.num_layers - 1
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                output, state = self._run(
                    self._cell(k),
                    x,
                    None if hx is None else (hx[0][k], hx[1][k]),
                    lengths=lengths,
                    reverse=direction == 1,
                    return_sequences=self.return_sequences or not last,
                )
                outputs.append(state[0] if output is None else output)
                states.append(state)
            final = last and not self.return_sequences
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=1 if final else 2)
        # A single state needs no copy, unless its h is the output.
        alone = len(states) == 1 and self.return_sequences
        h_n, c_n = (part[0].unsqueeze(0) if alone else torch.stack(part) for part in zip(*states))
        if self.return_sequences and not self.batch_first:
            x = x.transpose(0, 1)
        return x, (h_n, c_n)

    def _run(self, cell: ConvLSTMCell, x: Tensor, hx: State | None, **options: Any) -> tuple[Tensor | None, State]:
        """One layer in one direction, with this call's dropout masks."""
        mask = None
        if self.training and self.dropout > 0:
            x = x * F.dropout(x.new_ones(x.shape[0], 1, *x.shape[2:]), self.dropout)
        if self.training and self.recurrent_dropout > 0:
            shape = (x.shape[0], self.hidden_channels, *cell.output_size(x.shape[3:]))
            mask = F.dropout(x.new_ones(shape), self.recurrent_dropout)
        options |= {"checkpoint_every": self.checkpoint_every, "detach_every": self.detach_every}
        return cell.sequence(x, hx, recurrent_mask=mask, **options)

    def _listed(
        self, clips: Sequence[Tensor], hx: State | None, lengths: Tensor | None
    ) -> tuple[list[Tensor] | Tensor, State]:
        if lengths is not None:
            raise ValueError("a list of clips has its own lengths; leave lengths out")
        video, lengths = pad_clips(clips, batch_first=self.batch_first)
        output, state = self._batch(video, hx, lengths)
        if not self.return_sequences:
            return output, state
        rows = output.unbind(0 if self.batch_first else 1)
        return [row[: len(clip)] for row, clip in zip(rows, clips)], state

    def _packed(
        self, input: PackedSequence, hx: State | None, lengths: Tensor | None
    ) -> tuple[PackedSequence | Tensor, State]:
        if lengths is not None:
            raise ValueError("a PackedSequence has its own lengths; leave lengths out")
        padded, lengths = pad_packed_sequence(input, batch_first=self.batch_first)
        output, state = self._batch(padded, hx, lengths)
        if not self.return_sequences:
            return output, state
        sequence = output if self.batch_first else output.transpose(0, 1)
        if input.sorted_indices is not None:
            sequence = sequence.index_select(0, input.sorted_indices)
        data = torch.cat([sequence[:n, t] for t, n in enumerate(input.batch_sizes.tolist())])
        return PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices), state

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.hidden_channels}, num_layers={self.num_layers}"]
        defaults: dict[str, Any] = {
            "batch_first": True,
            "bidirectional": False,
            "dropout": 0.0,
            "recurrent_dropout": 0.0,
            "return_sequences": True,
            "checkpoint_every": None,
            "detach_every": None,
        }
        parts += [f"{k}={getattr(self, k)!r}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join(parts)
