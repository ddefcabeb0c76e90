"""EncoderForecaster: the network of the paper that introduced the ConvLSTM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convlstm_fish.layers import ConvLSTMCell
from convlstm_fish.models.frame_network import FrameNetwork, cell_stack, fed_back, read_frames


class EncoderForecaster(FrameNetwork):
    """Shi's encoding-forecasting network (Shi et al. 2015, arXiv:1506.04214, figure 3 and section 4.1).

    A stack of ConvLSTMs reads the frames; the states of each layer are copied to the same layer of a second stack,
    which unrolls them into the future. The hidden states of all its layers, side by side, go through one 1x1
    convolution and a sigmoid. Frames are cut into patches first. The paper trains it with cross-entropy, RMSProp
    1e-3, decay 0.9, 5x5 kernels, patches of 4x4, peepholes per pixel, and widths (256), (128, 128) or (128, 64, 64).

    Args:
        in_channels: channels of a frame.
        hidden_channels: width of each layer.
        kernel_size: of the ConvLSTM convolutions.
        patch_size: side of the patches.
        peephole: None; "channel" for one weight per channel; or the size (H, W) of the frames after patching for the
            paper's weights per channel and pixel.
        feedback: False as in the paper's figure, where the forecaster gets no input; True feeds each predicted frame
            to the next step (the last frame of ``video`` to the first).
        bias, recurrent_activation, backend: as in ConvLSTM.
        output_activation: "sigmoid", or "identity".

    Inputs: video (N, T, C, H, W) in [0, 1]; steps, the number of frames to predict; with ``feedback``, for scheduled
        sampling (Bengio et al. 2015, arXiv:1506.03099) also future (N, steps, C, H, W) and teacher (N, steps - 1) bool:
        where it is True the true frame is fed instead of the predicted one.

    Outputs: logits (N, steps, C, H, W); `to_frames` makes frames of them.
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: Sequence[int] = (128, 64, 64),
        kernel_size: int | Sequence[int] = 5,
        *,
        patch_size: int = 4,
        peephole: str | Sequence[int] | None = None,
        feedback: bool = False,
        bias: bool = True,
        recurrent_activation: str = "sigmoid",
        output_activation: str = "sigmoid",
        backend: str = "auto",
    ) -> None:
        super().__init__(in_channels, patch_size, output_activation)
        self.feeds_frames_back = feedback

        def stack() -> nn.ModuleList:
            return cell_stack(
                self.patch_channels,
                hidden_channels,
                kernel_size,
                bias=bias,
                peephole=peephole,
                recurrent_activation=recurrent_activation,
                backend=backend,
            )

        self.encoder = stack()
        self.forecaster = stack()
        self.head = nn.Conv2d(sum(hidden_channels), self.patch_channels, 1)

    def forward(
        self, video: Tensor, steps: int = 10, future: Tensor | None = None, teacher: Tensor | None = None
    ) -> Tensor:
        """See the class."""
        frames = self._to_patches(video, steps)
        _, states = read_frames(self.encoder, frames)  # type: ignore[arg-type]
        if not self.feeds_frames_back:
            if teacher is not None:
                raise ValueError("teacher needs feedback=True: without it the forecaster gets no frames")
            return self._from_patches(self._unroll(frames, steps, states))
        truth = self._teacher(video, steps, future, teacher)
        x = frames[:, -1]
        logits: list[Tensor] = []
        step_on = ConvLSTMCell.unrolled_stack(self.forecaster)  # type: ignore[arg-type]
        for step in range(steps):
            if step:
                x = fed_back(self.to_frames(logits[-1]), step - 1, truth, teacher)
            _, states = step_on(x, states)
            logits.append(self.head(torch.cat([h for h, _ in states], dim=1)))
        return self._from_patches(torch.stack(logits, dim=1))

    def _unroll(self, frames: Tensor, steps: int, states: list[tuple[Tensor, Tensor]]) -> Tensor:
        """All future steps without input, a whole layer at a time."""
        n, _, *image = frames.shape
        x = frames.new_zeros(n, steps, *image)
        hidden = []
        for cell, state in zip(self.forecaster, states):
            x, _ = cell.sequence(x, state)  # type: ignore[operator]
            hidden.append(x)
        return self.head(torch.cat(hidden, dim=2).flatten(0, 1)).unflatten(0, (n, steps))
