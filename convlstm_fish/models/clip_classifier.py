"""A network that looks at a clip and says how likely each class is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convlstm_fish.layers import BatchNorm2d, ConvLSTM, MaxPool2d, TimeDistributed
from convlstm_fish.layers.conv_lstm_cell import ConvLSTMCell
from convlstm_fish.ops.geometry import Padding

HEADS = ("max", "avg", "flatten")


def _each(name: str, value: Any, layers: int) -> list[Any]:
    """One value, or a list with one per ConvLSTM layer, as a list."""
    values = list(value) if isinstance(value, list | tuple) else [value] * layers
    if len(values) != layers:
        raise ValueError(f"{name} must be one value or a list of {layers}, one per ConvLSTM layer, got {value!r}")
    return values


def _between(name: str, value: Any, layers: int, nothing: Any) -> list[Any]:
    """As :func:`_each`, but one value stands for every place between two layers: none after the last."""
    values = _each(name, value, layers)
    return values if isinstance(value, list | tuple) else [*values[:-1], nothing]


class ClipClassifier(nn.Module):
    """ConvLSTM layers over a clip, pooled over space at the last step, and a linear layer: logits.

    Each block is a :class:`~convlstm_fish.layers.ConvLSTM`, a max pool per step and a batch norm; the last ConvLSTM
    hands on its last step only. With a stem, every frame passes 3x3 convolutions with ReLU first.

    Args:
        in_channels: channels of the clips.
        hidden_channels: of each ConvLSTM layer.
        kernel_size: one value, or a list with one per ConvLSTM layer.
        num_classes: logits per clip; 1 for a yes-or-no question.
        padding: "same", "valid" or an int; one value or a list with one per layer.
        bias: one value or a list with one per layer.
        peephole: None, "channel", or "pixel" (needs ``image_size``).
        recurrent_activation: see :class:`~convlstm_fish.layers.ConvLSTMCell`.
        pool_size: of the max pool, 0 for none. One value pools between layers; a list sets it after each one.
        batch_norm: one value puts batch norm between layers; a list sets it after each one.
        batch_norm_eps, batch_norm_momentum, batch_norm_affine: of the batch norm; the published networks' by default
            (Keras momentum 0.99 is 0.01 here; no scale, no shift).
        dropout, recurrent_dropout: see :class:`~convlstm_fish.layers.ConvLSTM`.
        head: what becomes of the last step's image: "max" or "avg" (global pooling), or "flatten".
        dense_features: widths of dense layers with ReLU before the last linear one.
        stem_channels: channels of the stem's convolutions; empty for no stem.
        image_size: (H, W) of the clips, where the network depends on it: head "flatten", peephole "pixel".
        checkpoint_every: see :class:`~convlstm_fish.layers.ConvLSTM`.
        backend: "auto", "reference" or "triton"; see :func:`convlstm_fish.ops.conv_lstm`.

    Inputs: video (N, T, C, H, W); lengths (N,) or None.

    Outputs: logits (N, num_classes).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: Sequence[int] = (16, 32),
        kernel_size: int | Sequence[int] = 3,
        *,
        num_classes: int = 1,
        padding: Padding | Sequence[Padding] = "same",
        bias: bool | Sequence[bool] = True,
        peephole: str | None = None,
        recurrent_activation: str = "sigmoid",
        pool_size: int | Sequence[int] = 2,
        batch_norm: bool | Sequence[bool] = True,
        batch_norm_eps: float = 1e-3,
        batch_norm_momentum: float = 0.01,
        batch_norm_affine: bool = False,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        head: str = "max",
        dense_features: Sequence[int] = (),
        stem_channels: Sequence[int] = (),
        image_size: Sequence[int] | None = None,
        checkpoint_every: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not hidden_channels:
            raise ValueError("hidden_channels must name at least one ConvLSTM layer, got none")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if head not in HEADS:
            raise ValueError(f"head must be one of {HEADS}, got {head!r}")
        if peephole not in (None, "channel", "pixel"):
            raise ValueError(f'peephole must be None, "channel" or "pixel", got {peephole!r}')
        if image_size is None and (head == "flatten" or peephole == "pixel"):
            cause = 'head="flatten"' if head == "flatten" else 'peephole="pixel"'
            raise ValueError(f"{cause} needs image_size=(H, W), got None")
        if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
            raise ValueError(f"image_size must be (H, W), got {image_size!r}")
        layers = len(hidden_channels)
        self.head = head

        self.stem: TimeDistributed | None = None
        if stem_channels:
            stem: list[nn.Module] = []
            for width in stem_channels:
                stem += [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU()]
                in_channels = width
            self.stem = TimeDistributed(nn.Sequential(*stem))

        size = None if image_size is None else tuple(image_size)
        self.layers = nn.ModuleList()
        self.pools = nn.ModuleList()
        self.norms = nn.ModuleList()
        for index, (width, kernel, pad, with_bias, pool, norm) in enumerate(
            zip(
                hidden_channels,
                _each("kernel_size", kernel_size, layers),
                _each("padding", padding, layers),
                _each("bias", bias, layers),
                _between("pool_size", pool_size, layers, 0),
                _between("batch_norm", batch_norm, layers, False),
            )
        ):
            layer = ConvLSTM(
                in_channels,
                width,
                kernel,
                padding=pad,
                bias=with_bias,
                peephole=size if peephole == "pixel" else peephole,
                recurrent_activation=recurrent_activation,
                dropout=dropout,
                recurrent_dropout=recurrent_dropout,
                return_sequences=index < layers - 1,
                checkpoint_every=checkpoint_every,
                backend=backend,
            )
            self.layers.append(layer)
            self.pools.append(MaxPool2d(pool, backend=backend) if pool else nn.Identity())
            self.norms.append(
                BatchNorm2d(width, batch_norm_eps, batch_norm_momentum, affine=batch_norm_affine, backend=backend)
                if norm
                else nn.Identity()
            )
            in_channels = width
            if size is not None:
                size = tuple(n // (pool or 1) for n in _cell(layer).output_size(size))
                if min(size) < 1:
                    raise ValueError(f"image_size {tuple(image_size or ())} leaves no pixel after layer {index + 1}")

        features = in_channels
        if head == "flatten" and size is not None:
            features *= size[0] * size[1]
        dense: list[nn.Module] = []
        for width in dense_features:
            dense += [nn.Linear(features, width), nn.ReLU()]
            features = width
        self.dense = nn.Sequential(*dense)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, video: Tensor, lengths: Tensor | None = None) -> Tensor:
        """See the class."""
        x = video if self.stem is None else self.stem(video, lengths)
        last = len(self.layers) - 1
        for index, (layer, pool, norm) in enumerate(zip(self.layers, self.pools, self.norms)):
            x, _ = layer(x, None, lengths)
            if index < last and lengths is None and _go_together(pool, norm):
                x = norm(x.flatten(0, 1), pool_size=pool.size).unflatten(0, x.shape[:2])
                continue
            for module in (pool, norm):
                if not isinstance(module, nn.Identity):
                    x = module(x) if index == last else TimeDistributed.apply_to(module, x, lengths)
        if self.head == "max":
            x = x.amax(dim=(2, 3))
        elif self.head == "avg":
            x = x.mean(dim=(2, 3))
        else:
            x = x.flatten(1)
        return self.classifier(self.dense(x))

    @torch.no_grad()
    def gates(self, video: Tensor) -> dict[str, Tensor]:
        """Hidden state h, cell state c and gates i, f, g, o of the first layer at the clips' last step, to look at.

        Dropout is left out. Each value is (N, hidden_channels[0], H', W').
        """
        x = video if self.stem is None else self.stem(video)
        cell = _cell(self.layers[0])
        state = cell.sequence(x[:, :-1], return_sequences=False)[1] if x.shape[1] > 1 else None
        return cell.gates(x[:, -1], state)


def _go_together(pool: nn.Module, norm: nn.Module) -> bool:
    """Whether nothing is lost by a pooling inside of the batch norm, which then is one pass over the pixels."""
    both = isinstance(pool, MaxPool2d) and isinstance(norm, BatchNorm2d)
    watched = any(module._forward_hooks or module._forward_pre_hooks for module in (pool, norm))
    return both and not (norm.training or torch.is_grad_enabled() or watched)


def _cell(layer: Any) -> ConvLSTMCell:
    return layer.cells[0]
