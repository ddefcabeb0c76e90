"""A kernel that is launched again takes the compiled form that fits its arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from convlstm_fish.ops.triton_kernels import max_pool_triton
from convlstm_fish.ops.triton_kernels.launch import _form


def test_a_form_is_told_by_dtype_alignment_and_value() -> None:
    block = torch.zeros(64, dtype=torch.uint8)
    start = -block.data_ptr() % 16
    aligned, odd = block[start : start + 16], block[start + 1 : start + 17]
    assert _form(aligned, True) != _form(odd, True)
    assert _form(aligned, True) != _form(aligned.view(torch.int8), True)
    assert _form(None, True) is None
    assert _form(16, True) != _form(17, True)
    assert _form(16, False) == _form(17, False)
    assert _form(16, False) != _form(1 << 31, False)


@pytest.mark.gpu
def test_pooling_of_frames_that_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def frames(offset: int) -> Tensor:
        memory = torch.randn(2 * 6 * 10 * 16 + offset, device="cuda", dtype=torch.bfloat16)
        return memory[offset:].view(2, 6, 10, 16).permute(0, 3, 1, 2)

    for offset in (0, 1, 0, 1):  # 1: two bytes past what a wide load may take
        x = frames(offset)
        assert torch.equal(max_pool_triton(x, 2), torch.nn.functional.max_pool2d(x, 2))

    def asked(*args: object, **kwargs: object) -> None:
        raise AssertionError("Triton was asked for a form that is known")

    monkeypatch.setattr(JITFunction, "run", asked)
    for offset in (0, 1):
        x = frames(offset)
        assert torch.equal(max_pool_triton(x, 2), torch.nn.functional.max_pool2d(x, 2))
