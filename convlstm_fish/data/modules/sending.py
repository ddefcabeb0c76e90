"""Pixels travel to a GPU while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

AHEAD = 2  # batches that may lie on the GPU before it comes to them: one that is there, one that travels


class Sender:
    """Copies from pinned memory to a GPU by a stream of its own, beside the step that is being computed.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._begun: deque[torch.cuda.Event] = deque()

    def send(self, pieces: Sequence[Tensor]) -> Tensor:
        """Copies of the pieces, all of one shape and in pinned memory, stacked in the order of the current stream."""
        computing = torch.cuda.current_stream(self.device)
        if len(self._begun) == AHEAD:  # else batches would heap up there, this process being faster than the GPU
            self._begun.popleft().synchronize()
        self._begun.append(computing.record_event())
        with torch.cuda.stream(self._stream):
            there = torch.empty(len(pieces), *pieces[0].shape, dtype=pieces[0].dtype, device=self.device)
            for place, piece in zip(there, pieces):
                place.copy_(piece, non_blocking=True)
        computing.wait_stream(self._stream)
        there.record_stream(computing)  # only then is its memory used again
        return there
