"""Padding and sizes against TensorFlow's published rule and against PyTorch's convolutions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from convlstm_fish.ops.geometry import compute_dtype, geometry, same_padding, state_dtype


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "expected"),
    [
        # From TensorFlow's notes on padding: out = ceil(in / stride), the odd row at the end.
        (13, 6, 5, 1, (1, 2)),
        (5, 2, 1, 1, (0, 1)),
        (5, 3, 1, 1, (1, 1)),
        (5, 4, 1, 1, (1, 2)),
        (6, 3, 2, 1, (0, 1)),
        (7, 3, 2, 1, (1, 1)),
        (8, 2, 4, 1, (0, 0)),
        (9, 3, 1, 4, (4, 4)),
        (9, 2, 1, 3, (1, 2)),
    ],
)
def test_same_padding(size: int, kernel: int, stride: int, dilation: int, expected: tuple[int, int]) -> None:
    assert same_padding(size, kernel, stride, dilation) == expected


def test_sizes_are_those_of_the_convolution() -> None:
    for size, kernel, stride, dilation, padding in itertools.product(
        range(1, 9), (1, 2, 3, 5), (1, 2, 3), (1, 2), ("same", "valid", 0, 2)
    ):
        before = 0
        try:
            where = geometry((size,), (kernel,), stride, padding, dilation)
        except ValueError:
            assert padding != "same"
            assert size + 2 * (padding if isinstance(padding, int) else 0) < dilation * (kernel - 1) + 1
            continue
        before, after = where.pads[0]
        out = F.conv1d(
            F.pad(torch.zeros(1, 1, size), (before, after)), torch.zeros(1, 1, kernel), None, stride, 0, dilation
        )
        assert where.out == (out.shape[2],)
        if padding == "same":
            assert where.out == (math.ceil(size / stride),)


def test_dtypes() -> None:
    frame = torch.zeros(1)
    assert compute_dtype(frame) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(frame) == torch.bfloat16
        assert compute_dtype(frame.double()) == torch.float64
    assert state_dtype(torch.bfloat16) == state_dtype(torch.float16) == torch.float32
    assert state_dtype(torch.float64) == torch.float64
