"""Max pooling is torch.nn.MaxPool2d, whatever runs it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from convlstm_fish.layers import MaxPool2d
from convlstm_fish.ops import max_pool


@pytest.mark.parametrize("size", [1, 2, 3])
def test_values_are_those_of_torch(size: int) -> None:
    frames = torch.rand(4, 3, 7, 8)
    assert torch.equal(MaxPool2d(size)(frames), F.max_pool2d(frames, size))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        MaxPool2d(0)
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cuda'"):
        max_pool(torch.rand(1, 1, 4, 4), 2, backend="cuda")


def test_a_named_backend_that_cannot_run_raises() -> None:
    with pytest.raises(RuntimeError, match="backend='triton' cannot pool"):
        max_pool(torch.rand(1, 1, 4, 4, dtype=torch.float64), 2, backend="triton")


@pytest.mark.gpu
def test_auto_takes_the_kernel_for_channels_last_frames() -> None:
    frames = torch.rand(4, 3, 7, 8, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    found = max_pool(frames, 2)
    assert "max_pool" in type(found.grad_fn).__name__ or "max_pool" in str(found.grad_fn.next_functions)
    truth = F.max_pool2d(frames, 2)
    cotangent = torch.rand_like(truth)
    assert torch.equal(found, truth)
    gradients = [torch.autograd.grad(pooled, frames, cotangent)[0] for pooled in (found, truth)]
    assert torch.equal(*gradients)
