"""StackedPredictor: one stack of ConvLSTMs that predicts the next frame from each frame, as PredRNN's baseline does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convlstm_fish.layers import ConvLSTMCell
from convlstm_fish.models.frame_network import FrameNetwork, cell_stack, fed_back, read_frames


class StackedPredictor(FrameNetwork):
    """The ConvLSTM of the OpenSTL and PredRNN benchmarks ("ConvLSTM-S" with the default arguments).

    One stack predicts frame t+1 from frame t through a 1x1 convolution. Over the given frames the inputs are known;
    after them each prediction is the next input, or the true frame where scheduled sampling says so. Nothing in it has
    a bias, there is no output activation, and training also scores the predictions of the given frames.

    Source: OpenSTL (arXiv:2306.11249), which trains 4 layers of 128, 5x5, patch 4 for 125,000 steps of 16 sequences:
    MSE, Adam 5e-4 in one cycle, scheduled sampling from 1 to 0 over 50,000 steps; test MSE 29.80.

    Args:
        in_channels: channels of a frame.
        hidden_channels: width of each layer.
        kernel_size: of the ConvLSTM convolutions.
        patch_size: side of the patches.
        bias: of the ConvLSTMs and of the 1x1 convolution.
        peephole: None; "channel"; or the size (H, W) of the frames after patching.
        recurrent_activation, backend: as in ConvLSTM.
        output_activation: "identity", or "sigmoid".

    Inputs: video (N, T, C, H, W) in [0, 1]; steps, the number of frames to predict; for scheduled sampling (Bengio et
        al. 2015, arXiv:1506.03099) future (N, steps, C, H, W) and teacher (N, steps - 1) bool: where it is True the
        true frame is fed instead of the predicted one; with_context.

    Outputs: logits (N, steps, C, H, W), or with ``with_context`` (N, T - 1 + steps, C, H, W): predictions of the given
        frames 2 .. T first.
    """

    feeds_frames_back = True
    predicts_context = True

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (128, 128, 128, 128),
        kernel_size: int | Sequence[int] = 5,
        *,
        patch_size: int = 4,
        bias: bool = False,
        peephole: str | Sequence[int] | None = None,
        recurrent_activation: str = "sigmoid",
        output_activation: str = "identity",
        backend: str = "auto",
    ) -> None:
        super().__init__(in_channels, patch_size, output_activation)
        self.recurrent = cell_stack(
            self.patch_channels,
            hidden_channels,
            kernel_size,
            bias=bias,
            peephole=peephole,
            recurrent_activation=recurrent_activation,
            backend=backend,
        )
        self.head = nn.Conv2d(hidden_channels[-1], self.patch_channels, 1, bias=bias)

    def forward(
        self,
        video: Tensor,
        steps: int = 10,
        future: Tensor | None = None,
        teacher: Tensor | None = None,
        *,
        with_context: bool = False,
    ) -> Tensor:
        """See the class."""
        frames = self._to_patches(video, steps)
        truth = self._teacher(video, steps, future, teacher)
        sequence, states = read_frames(self.recurrent, frames, with_context)  # type: ignore[arg-type]
        if sequence is None:
            logits = [self.head(states[-1][0])]
        else:
            context = self.head(sequence.flatten(0, 1)).unflatten(0, sequence.shape[:2])
            logits = list(context.unbind(1))
        step_on = ConvLSTMCell.unrolled_stack(self.recurrent)  # type: ignore[arg-type]
        for step in range(steps - 1):
            x, states = step_on(fed_back(self.to_frames(logits[-1]), step, truth, teacher), states)
            logits.append(self.head(x))
        return self._from_patches(torch.stack(logits, dim=1))
