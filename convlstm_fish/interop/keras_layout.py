"""How Keras lays out the arrays that PyTorch lays out otherwise, both ways.

Keras keeps input channels last and output channels after them, PyTorch the output channels first. The gates of a
ConvLSTM have one order in both: i, f, c (here g), o.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Layout = Callable[[np.ndarray], np.ndarray]


def gates_from_keras(kernel: np.ndarray) -> np.ndarray:
    """(kh, kw, in, 4*out) as (4*out, in, kh, kw)."""
    return kernel.transpose(3, 2, 0, 1)


def gates_to_keras(kernel: np.ndarray) -> np.ndarray:
    """(4*out, in, kh, kw) as (kh, kw, in, 4*out)."""
    return kernel.transpose(2, 3, 1, 0)


def dense_from_keras(kernel: np.ndarray) -> np.ndarray:
    """(in, out) as (out, in); its own inverse."""
    return kernel.T


def flattened_from_keras(height: int, width: int) -> Layout:
    """For a dense kernel over a flattened image: ((H, W, C), out) as (out, (C, H, W))."""
    return lambda kernel: (
        kernel.reshape(height, width, -1, kernel.shape[1]).transpose(3, 2, 0, 1).reshape(kernel.shape[1], -1)
    )


def flattened_to_keras(height: int, width: int) -> Layout:
    """For a dense kernel over a flattened image: (out, (C, H, W)) as ((H, W, C), out)."""
    return lambda kernel: kernel.reshape(len(kernel), -1, height, width).transpose(2, 3, 1, 0).reshape(-1, len(kernel))
