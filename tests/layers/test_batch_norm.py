"""Batch norm is torch.nn.BatchNorm2d, whatever runs it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convlstm_fish.layers import BatchNorm2d
from convlstm_fish.ops import batch_norm


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_state_and_gradients_are_those_of_torch(options: dict[str, object], device: str) -> None:
    ours, judge = BatchNorm2d(3, **options).to(device), nn.BatchNorm2d(3, **options).to(device)  # type: ignore[arg-type]
    assert ours.state_dict().keys() == judge.state_dict().keys()
    for training in (True, True, False):
        frames = torch.rand(4, 3, 5, 6, device=device).to(memory_format=torch.channels_last).requires_grad_()
        cotangent = torch.rand(4, 3, 5, 6, device=device)
        found, truth = ours.train(training)(frames), judge.train(training)(frames)
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(y, frames, cotangent)[0] for y in (found, truth)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(frames), judge(frames), rtol=1e-5, atol=1e-5)
        pooled = nn.functional.max_pool2d(frames, 2)
        torch.testing.assert_close(ours(frames, pool_size=2), judge(pooled), rtol=1e-5, atol=1e-5)
    for name, value in judge.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_named() -> None:
    frames = torch.rand(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cuda'"):
        batch_norm(frames, None, None, training=True, backend="cuda")
    with pytest.raises(RuntimeError, match="backend='triton' cannot normalise"):
        batch_norm(frames.double(), None, None, training=True, backend="triton")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        BatchNorm2d(1)(torch.rand(1, 1, 1, 1))
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNorm2d(1)(torch.rand(1, 1, 4))


@pytest.mark.gpu
def test_auto_takes_the_kernel_for_channels_last_frames() -> None:
    frames = torch.rand(4, 3, 7, 8, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    found = batch_norm(frames, None, None, training=True)
    assert "batch_norm" in str(found.grad_fn.next_functions)
    assert "NativeBatchNorm" not in str(found.grad_fn.next_functions)
