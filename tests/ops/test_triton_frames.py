"""The Triton kernels of single frames, pooling and batch norm, against torch.

On a GPU (``pytest -m gpu``), and in Triton's interpreter as test_triton.py does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreter import interpreted, not_interpreted
from torch import Tensor

from convlstm_fish.ops import batch_norm, max_pool

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}  # relative, in the Frobenius norm


@pytest.mark.early
@not_interpreted
def test_the_interpreter_in_a_process_of_its_own(interpret: Callable[[str], None]) -> None:
    interpret(__file__)


def check_norm(device: str, dtype: torch.dtype, tolerance: float, affine: bool, offset: float) -> None:
    """Compares the batch norm, its gradients and what it does to the running statistics with torch's in float64."""
    random = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).double()

    frames, cotangent = (normal(3, 5, 7, 6) * 0.5 + offset).to(dtype).double(), normal(3, 5, 7, 6)
    extra = [normal(5), normal(5)] if affine else []
    found, truth = {}, {}
    for results, where, kind, backend in ((truth, "cpu", torch.float64, None), (found, device, dtype, "triton")):
        wide = torch.float64 if backend is None else torch.float32
        x = frames.to(where, kind).to(memory_format=torch.channels_last).requires_grad_()
        parameters = [p.to(where, wide).requires_grad_() for p in extra]
        running = [torch.zeros(5, dtype=wide, device=where), torch.ones(5, dtype=wide, device=where)]
        args = (*running, *(parameters or [None, None]))
        options: Any = {"training": True, "momentum": 0.3, "eps": 1e-3}
        if backend is None:
            y = torch.nn.functional.batch_norm(x, *args, **options)
        else:
            y = batch_norm(x, *args, **options, backend=backend)
        gradients = torch.autograd.grad(y, [x, *parameters], cotangent.to(where, y.dtype))
        results |= {"y": y, "mean": running[0], "variance": running[1]}
        results |= {f"d{k}": g for k, g in enumerate(gradients)}
        with torch.no_grad():
            options["training"] = False
            for size in (1, 2, 3):
                if backend is None:
                    pooled = torch.nn.functional.max_pool2d(x, size)
                    y = torch.nn.functional.batch_norm(pooled, *args, **options)
                else:
                    y = batch_norm(x, *args, **options, pool_size=size, backend=backend)
                results[f"inference, pooled by {size}"] = y
    errors = {
        k: float((found[k].detach().cpu().double() - v.detach()).norm() / v.detach().norm()) for k, v in truth.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, f"relative errors over {tolerance}: {wrong}"


@interpreted
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_in_the_interpreter(affine: bool, poisoned: None) -> None:
    check_norm("cpu", torch.float32, 1e-5, affine, offset=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_batch_norm(dtype: str, affine: bool, poisoned: None) -> None:
    check_norm("cuda", getattr(torch, dtype), TOLERANCE[dtype], affine, offset=0.5)


@pytest.mark.gpu
def test_batch_norm_of_a_mean_far_from_0(poisoned: None) -> None:
    check_norm("cuda", torch.float32, 1e-4, False, offset=100.0)  # the frames themselves hold 7 digits, 2 of them mean


def check_pool(device: str, dtype: torch.dtype, height: int, width: int, size: int) -> None:
    """Compares the pooling with torch's, with ties and a NaN."""
    from convlstm_fish.ops.triton_kernels import max_pool_triton

    random = torch.Generator().manual_seed(2)
    frames = torch.randn(3, 5, height, width, generator=random).mul(2).round().to(device, dtype)
    frames[0, 0, 0, 1] = float("nan")
    frames.requires_grad_()
    cotangent = torch.randn(3, 5, height // size, width // size, generator=random).to(device, dtype)
    truth = torch.nn.functional.max_pool2d(frames, size)
    found = max_pool_triton(frames, size)
    torch.testing.assert_close(found, truth, rtol=0, atol=0, equal_nan=True)
    gradients = [torch.autograd.grad(pooled, frames, cotangent)[0] for pooled in (found, truth)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 2), (6, 7, 3)])
def test_pooling_in_the_interpreter(height: int, width: int, size: int, poisoned: None) -> None:
    check_pool("cpu", torch.float32, height, width, size)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 2), (6, 7, 3), (118, 158, 2)])
def test_pooling(height: int, width: int, size: int, dtype: torch.dtype, poisoned: None) -> None:
    check_pool("cuda", dtype, height, width, size)


def check_transpose(device: str, dtype: torch.dtype) -> None:
    """Compares the layout that a call's input is brought into with torch's."""
    from convlstm_fish.ops.triton_kernels.transpose import few_channels_last, suits

    random = torch.Generator().manual_seed(4)
    for channels in (2, 3, 4, 8):
        frames = torch.randn(5, channels, 7, 61, generator=random).to(device)
        assert suits(frames)
        found = few_channels_last(frames, dtype)
        assert found.is_contiguous()
        assert torch.equal(found, frames.permute(0, 2, 3, 1).to(dtype))
    assert not suits(frames.to(memory_format=torch.channels_last))
    assert not suits(torch.randn(5, 1, 7, 61))
    assert not suits(frames.requires_grad_())


@interpreted
def test_pooling_of_frames_without_a_window() -> None:
    assert max_pool(torch.empty(0, 3, 4, 4), 2, backend="triton").shape == (0, 3, 2, 2)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        max_pool(torch.ones(1, 3, 4, 4), 5, backend="triton")


@interpreted
def test_transpose_in_the_interpreter(poisoned: None) -> None:
    check_transpose("cpu", torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_transpose(dtype: str, poisoned: None) -> None:
    check_transpose("cuda", getattr(torch, dtype))
