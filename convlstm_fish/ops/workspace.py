"""Large tensors on a CPU in memory that is used again.

Memory that is touched for the first time costs several times what writing it does, and a training step would get all
of its own anew: the allocator gives what is freed back to the system.
"""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, of a cache line and of the widest vector instructions
_MOST = 2 << 30  # bytes that are kept while nobody uses them
_SLACK = 1.25  # how much larger than asked for a buffer may be


class Workspace:
    """Buffers that return when the tensor in them is freed.

    Args:
        most: bytes that are kept while nobody uses them; the longest unused go first.
    """

    def __init__(self, most: int = _MOST) -> None:
        self.most = most
        self._free: list[np.ndarray] = []
        self._lock = threading.RLock()  # a buffer may return while the lock is held, in the same thread

    def empty(self, *shape: int, dtype: torch.dtype, zero: bool = False) -> Tensor:
        """A new tensor, of zeros if asked for.

        It lies on huge pages, which NumPy asks the system for and torch does not.
        """
        if torch.are_deterministic_algorithms_enabled():  # torch may be asked to fill what it makes
            return torch.zeros(shape, dtype=dtype) if zero else torch.empty(shape, dtype=dtype)
        count = math.prod(shape) * dtype.itemsize
        buffer = self._take(count + _ALIGNMENT)
        used = buffer[:]  # dies with the tensor, the buffer does not
        weakref.finalize(used, self._give, buffer).atexit = False
        raw = torch.from_numpy(used)
        start = -raw.data_ptr() % _ALIGNMENT
        tensor = raw[start : start + count].view(dtype).view(shape)
        return tensor.zero_() if zero else tensor

    def _take(self, count: int) -> np.ndarray:
        with self._lock:
            fitting = [buffer for buffer in self._free if count <= buffer.nbytes <= _SLACK * count]
            if fitting:
                found = min(fitting, key=lambda buffer: buffer.nbytes)
                self._free = [buffer for buffer in self._free if buffer is not found]
                return found
        return np.empty(count, np.uint8)

    def _give(self, buffer: np.ndarray) -> None:
        with self._lock:
            self._free.append(buffer)
            while sum(each.nbytes for each in self._free) > self.most:
                self._free.pop(0)

    def clear(self) -> None:
        """Give all that nobody uses back to the system."""
        with self._lock:
            self._free.clear()


WORKSPACE = Workspace()
