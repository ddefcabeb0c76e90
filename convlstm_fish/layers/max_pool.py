"""Max pooling that takes the Triton kernel where there is one."""

from __future__ import annotations

from torch import Tensor, nn

from convlstm_fish.ops import max_pool


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d over windows of ``size`` x ``size`` pixels side by side; cut ones at the edges are left out.

    Args:
        size: of the windows.
        backend: "auto", "reference" or "triton"; see :func:`convlstm_fish.ops.max_pool`.

    Inputs: (frames, C, H, W).

    Outputs: (frames, C, H // size, W // size).
    """

    def __init__(self, size: int, *, backend: str = "auto") -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        super().__init__(size)
        self.size, self.backend = size, backend

    def forward(self, frames: Tensor) -> Tensor:
        """See the class."""
        return max_pool(frames, self.size, backend=self.backend)
