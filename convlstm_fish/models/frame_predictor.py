"""FramePredictor: the encoding-forecasting network of *Video Prediction using ConvLSTM with PyTorch Lightning*."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convlstm_fish.layers import ConvLSTMCell
from convlstm_fish.models.frame_network import FrameNetwork, cell_stack, read_frames
from convlstm_fish.models.tap_products import convolve_frames

# Outputs times taps up to which a head is faster as a matrix product.
_FEW_PRODUCTS = 32


class FramePredictor(FrameNetwork):
    """Two ConvLSTM encoder cells, two decoder cells fed by the encoding, a 3D convolution as head.

    The encoder reads the frames; its last layer's final hidden state is the encoding. The decoder starts from zero
    states (nothing is copied). Its first input is the encoding, each later one its own last layer's previous hidden
    state, so that any number of frames follows. Its hidden states, stacked over time, go through a 3D convolution
    that looks at one step at a time, and a sigmoid.

    Source: Holm, *Video Prediction using ConvLSTM Autoencoder (PyTorch)*, with 64 channels, 3x3 kernels and two layers.

    Args:
        in_channels: channels of a frame.
        hidden_channels: width of each layer, encoder and decoder alike; one int for two layers of it.
        kernel_size: of the ConvLSTM convolutions.
        patch_size: frames are cut into patches of this side first; 1 for none.
        head_kernel_size: of the 3D convolution, (time, rows, columns), all odd.
        bias, peephole, recurrent_activation, backend: as in ConvLSTM. Per-pixel peepholes take the size of the
            frames after patching.
        output_activation: "sigmoid", or "identity".

    Inputs: video (N, T, C, H, W) in [0, 1]; steps, the number of frames to predict.

    Outputs: logits (N, steps, C, H, W); `to_frames` makes frames of them.

    Example:
        >>> network = FramePredictor(1, 64)
        >>> network.predict(torch.rand(2, 10, 1, 64, 64), steps=15).shape
        torch.Size([2, 15, 1, 64, 64])
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: int | Sequence[int] = 64,
        kernel_size: int | Sequence[int] = 3,
        *,
        patch_size: int = 1,
        head_kernel_size: Sequence[int] = (1, 3, 3),
        bias: bool = True,
        peephole: str | Sequence[int] | None = None,
        recurrent_activation: str = "sigmoid",
        output_activation: str = "sigmoid",
        backend: str = "auto",
    ) -> None:
        super().__init__(in_channels, patch_size, output_activation)
        widths = [hidden_channels] * 2 if isinstance(hidden_channels, int) else list(hidden_channels)
        kernel = tuple(head_kernel_size)
        if len(kernel) != 3 or not all(k > 0 and k % 2 for k in kernel):
            raise ValueError(f"head_kernel_size must be three odd numbers (time, rows, columns), got {kernel}")
        if widths and widths[0] < 1:
            raise ValueError(f"hidden_channels must be at least 1, got {hidden_channels}")

        def stack(channels: int) -> nn.ModuleList:
            return cell_stack(
                channels,
                widths,
                kernel_size,
                bias=bias,
                peephole=peephole,
                recurrent_activation=recurrent_activation,
                backend=backend,
            )

        self.encoder = stack(self.patch_channels)
        self.decoder = stack(widths[-1])
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.head = nn.Conv3d(widths[-1], self.patch_channels, kernel, padding=padding)

    def forward(self, video: Tensor, steps: int = 10) -> Tensor:
        """See the class."""
        _, encoded = read_frames(self.encoder, self._to_patches(video, steps))  # type: ignore[arg-type]
        x, _ = encoded[-1]
        states: Sequence[tuple[Tensor, Tensor] | None] = [None] * len(self.decoder)
        outputs = []
        step_on = ConvLSTMCell.unrolled_stack(self.decoder)  # type: ignore[arg-type]
        for step in range(steps):
            output, states = step_on(None if step else x, states)
            outputs.append(output)
        return self._from_patches(self._head(outputs))

    def _head(self, frames: Sequence[Tensor]) -> Tensor:
        """The 3D convolution of T frames (N, C, H, W), as (N, T, C', H, W)."""
        weight = self.head.weight
        if frames[0].is_cuda and weight.shape[2] == 1 and weight[:, 0].numel() <= _FEW_PRODUCTS:
            return convolve_frames(frames, weight[:, :, 0], self.head.bias)
        return self.head(torch.stack(list(frames), dim=2)).transpose(1, 2)  # Conv3d wants (N, C, T, H, W)
