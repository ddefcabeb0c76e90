"""What every network that predicts frames shares: patches, the output activation, and the way it is called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convlstm_fish.layers import ConvLSTMCell
from convlstm_fish.models.patches import from_patches, to_patches

OUTPUT_ACTIVATIONS = ("sigmoid", "identity")


class FrameNetwork(nn.Module):
    """Base of the networks that continue a video. Subclasses define ``forward(video, steps, ...)``.

    ``forward`` returns logits: the values before the output activation. `to_frames` turns them into frames; with
    ``output_activation="identity"`` the logits are the frames.

    Args:
        in_channels: channels of a frame.
        patch_size: side of the patches that frames are cut into, see `to_patches`; 1 for none.
        output_activation: "sigmoid" (frames in [0, 1]) or "identity" (unbounded).

    Attributes:
        feeds_frames_back: predicted frames are inputs of later steps, so ``forward`` takes ``future`` and ``teacher``.
        predicts_context: ``forward(..., with_context=True)`` also returns predictions of the frames it is given.
    """

    feeds_frames_back: bool = False
    predicts_context: bool = False

    def __init__(self, in_channels: int, patch_size: int, output_activation: str) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("patch_size", patch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if output_activation not in OUTPUT_ACTIVATIONS:
            raise ValueError(f"output_activation must be one of {OUTPUT_ACTIVATIONS}, got {output_activation!r}")
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.output_activation = output_activation

    @property
    def patch_channels(self) -> int:
        """Channels of a frame cut into patches."""
        return self.in_channels * self.patch_size**2

    def to_frames(self, logits: Tensor) -> Tensor:
        """Frames from what ``forward`` returned, same shape."""
        return torch.sigmoid(logits) if self.output_activation == "sigmoid" else logits

    @torch.no_grad()
    def predict(self, video: Tensor, steps: int = 10) -> Tensor:
        """The next ``steps`` frames, (N, steps, C, H, W), clipped to [0, 1]."""
        return self.to_frames(self(video, steps)).clamp(0, 1)

    def _to_patches(self, video: Tensor, steps: int) -> Tensor:
        """The input checked and cut into patches."""
        if video.dim() != 5 or video.shape[2] != self.in_channels or video.shape[1] < 1:
            raise ValueError(f"video must be (N, T, {self.in_channels}, H, W), got {tuple(video.shape)}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return to_patches(video, self.patch_size)

    def _from_patches(self, patches: Tensor) -> Tensor:
        return from_patches(patches, self.patch_size)

    def _teacher(self, video: Tensor, steps: int, future: Tensor | None, teacher: Tensor | None) -> Tensor | None:
        """The true frames 1 .. steps-1 as patches where scheduled sampling is on, else None."""
        if teacher is None:
            return None
        n = video.shape[0]
        if future is None or future.shape != (n, steps, *video.shape[2:]):
            got = None if future is None else tuple(future.shape)
            raise ValueError(f"teacher needs future of shape {(n, steps, *video.shape[2:])}, got {got}")
        if teacher.shape != (n, steps - 1):
            raise ValueError(f"teacher must be {(n, steps - 1)}, (N, steps - 1), got {tuple(teacher.shape)}")
        return to_patches(future[:, :-1], self.patch_size)


def fed_back(predicted: Tensor, step: int, truth: Tensor | None, teacher: Tensor | None) -> Tensor:
    """The input after future step ``step``: what was predicted, or the true frame where ``teacher`` says so."""
    if truth is None or teacher is None:
        return predicted
    return torch.where(teacher[:, step].bool()[:, None, None, None], truth[:, step].to(predicted.dtype), predicted)


def read_frames(
    cells: Sequence[ConvLSTMCell], frames: Tensor, return_sequences: bool = False
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
    """What a stack of cells, each fed by the one before, makes of frames (N, T, C, H, W).

    Returns:
        With ``return_sequences`` the last cell's h of each frame, (N, T, C_h, H', W'), else None; and the state (h, c)
        of each cell after the last frame.
    """
    x: Tensor | None = frames
    states = []
    for cell in cells:
        assert x is not None
        x, state = cell.sequence(x, return_sequences=return_sequences or cell is not cells[-1])
        states.append(state)
    return x, states


def cell_stack(
    in_channels: int,
    hidden_channels: Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    bias: bool,
    peephole: str | Sequence[int] | None,
    recurrent_activation: str,
    backend: str,
) -> nn.ModuleList:
    """One ConvLSTMCell per width in ``hidden_channels``, each fed by the one before."""
    if not hidden_channels:
        raise ValueError("hidden_channels must name at least one layer, got none")
    return nn.ModuleList(
        ConvLSTMCell(
            narrow,
            wide,
            kernel_size,
            bias=bias,
            peephole=peephole,
            recurrent_activation=recurrent_activation,
            backend=backend,
        )
        for narrow, wide in zip([in_channels, *hidden_channels[:-1]], hidden_channels)
    )
