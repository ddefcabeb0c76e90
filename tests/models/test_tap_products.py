"""A convolution as products with its taps, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_fish.models import FramePredictor
from convlstm_fish.models.tap_products import convolve_frames


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 5)])
def test_is_the_convolution_and_its_gradients(kernel: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    frames, weight = [normal(2, 5, 6, 7) for _ in range(3)], normal(2, 5, *kernel)
    extra = [normal(2)] if bias else []
    truth = torch.stack([F.conv2d(frame, weight, *extra, padding="same") for frame in frames], 1)
    found = convolve_frames(frames, weight, extra[0] if bias else None)
    torch.testing.assert_close(found, truth)
    cotangent = torch.randn_like(truth)
    leaves = [*frames, weight, *extra]
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, cotangent), torch.autograd.grad(truth, leaves, cotangent)
    )


def test_second_derivative() -> None:
    torch.manual_seed(0)
    frame, weight = normal(1, 2, 3, 4), normal(1, 2, 3, 3)
    assert torch.autograd.gradgradcheck(lambda frame, weight: convolve_frames([frame], weight, None), (frame, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3)])
def test_a_network_on_the_gpu_has_the_head_of_one_on_the_cpu(kernel: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    network = FramePredictor(1, 8, head_kernel_size=kernel, backend="reference").double()
    video = torch.rand(2, 3, 1, 8, 8, dtype=torch.float64)
    truth = network(video, 2)
    torch.testing.assert_close(network.cuda()(video.cuda(), 2).cpu(), truth)
