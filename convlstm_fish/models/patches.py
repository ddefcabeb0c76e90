"""Frames cut into patches that become channels: a smaller image with more channels, and back."""

from __future__ import annotations

from torch import Tensor


def to_patches(video: Tensor, patch_size: int) -> Tensor:
    """Each patch of patch_size x patch_size pixels becomes one pixel with patch_size**2 times the channels.

    The new channels are ordered (row in patch, column in patch, channel), the order of PredRNN's and OpenSTL's
    ``reshape_patch``. torch.nn.PixelUnshuffle orders (channel, row, column), the same for one channel only.

    Args:
        video: (..., C, H, W), H and W multiples of patch_size.
        patch_size: side of a patch; 1 changes nothing.

    Returns:
        (..., C * patch_size**2, H / patch_size, W / patch_size).

    Raises:
        ValueError: a size that patch_size does not divide.
    """
    if patch_size == 1:
        return video
    *lead, channels, height, width = video.shape
    p = patch_size
    if height % p or width % p:
        raise ValueError(f"patch_size={p} does not divide the image size {(height, width)}")
    cut = video.reshape(-1, channels, height // p, p, width // p, p).permute(0, 3, 5, 1, 2, 4)
    return cut.reshape(*lead, p * p * channels, height // p, width // p)


def from_patches(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `to_patches`."""
    if patch_size == 1:
        return patches
    *lead, channels, height, width = patches.shape
    p = patch_size
    if channels % (p * p):
        raise ValueError(f"{channels} channels are no patches of {p}x{p} pixels")
    cut = patches.reshape(-1, p, p, channels // (p * p), height, width).permute(0, 3, 4, 1, 5, 2)
    return cut.reshape(*lead, channels // (p * p), height * p, width * p)
