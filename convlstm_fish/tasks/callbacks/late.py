"""Looking at what a GPU works out without making it wait."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """A tensor that is copied to the host behind the work that is queued; read a step later, nothing waits for it.

    Args:
        value: on any device.
    """

    def __init__(self, value: Tensor) -> None:
        self._host, self._copied = value, None
        if value.is_cuda:
            self._host = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(value.device))

    def read(self) -> Tensor:
        """The value, on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
