"""Every kernel compiles for a Hopper GPU on a machine that has none; the tensor cores' own instructions are in it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

pytestmark = pytest.mark.slow


class _Driver:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Makes every launch a compilation for sm_90 alone, on CPU tensors; the PTX of each kernel by name."""
    from triton.runtime import driver, jit

    from convlstm_fish.ops.triton_kernels import op

    if torch.cuda.is_available():
        pytest.skip("the kernels run on this machine")
    ptx: dict[str, list[str]] = {}
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        ptx.setdefault(self.__name__, []).append(kernel.asm["ptx"])

    monkeypatch.setattr(jit.JITFunction, "run", compile_only)
    monkeypatch.setattr(op, "unsupported", lambda *args, **options: None)
    monkeypatch.setattr(driver, "_active", _Driver())
    return ptx


@pytest.mark.parametrize(
    ("dtype", "sizes", "everything"),
    [
        (torch.bfloat16, (4, 16), False),
        (torch.float16, (16, 32), True),
        (torch.float32, (3, 5), True),
        (torch.bfloat16, (64, 64), True),  # keeps its gates
    ],
    ids=str,
)
def test_kernels_compile(
    dtype: torch.dtype, sizes: tuple[int, int], everything: bool, compiled: dict[str, list[str]]
) -> None:
    from convlstm_fish.ops.triton_kernels import conv_lstm_triton

    channels, hidden = sizes

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    state, bias, peephole, options = None, None, None, {}
    if everything:
        state = (zeros(2, hidden, 16, 16), zeros(2, hidden, 16, 16))
        bias = zeros(4 * hidden)
        peephole = (zeros(hidden, 1, 1), zeros(hidden, 1, 1), zeros(hidden, 16, 16))
        options = {"lengths": torch.tensor([3, 2]), "recurrent_mask": torch.ones(2, hidden, 16, 16, dtype=dtype)}
    output, (_, c_n) = conv_lstm_triton(
        zeros(2, 3, channels, 16, 16), state, zeros(4 * hidden, channels, 3, 3), zeros(4 * hidden, hidden, 3, 3),
        bias, peephole, **options,
    )  # fmt: skip
    (output.float().sum() + c_n.sum()).backward()
    assert compiled.keys() >= {"forward_step", "backward_step", "weight_gradients", "image_gradient"}
    if dtype != torch.float32:
        for name in ("forward_step", "backward_step", "weight_gradients", "image_gradient"):
            assert all("wgmma" in ptx for ptx in compiled[name]), name
