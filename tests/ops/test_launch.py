"""A kernel that is launched again takes the compiled form that fits its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from convlstm_fish.ops.triton_kernels import max_pool_triton
from convlstm_fish.ops.triton_kernels.launch import Launcher, launch, prepare


class Loose:
    """A kernel of two arguments and a constant."""

    arg_names = ("x", "n", "BM")
    do_not_specialize = ("n",)

    def fn(self) -> None:
        """What its launchers are remembered by."""


def test_a_form_is_told_by_dtype_alignment_and_value() -> None:
    block = torch.zeros(64, dtype=torch.uint8)
    start = -block.data_ptr() % 16
    aligned, odd = block[start : start + 16], block[start + 1 : start + 17]
    launcher = Launcher(Loose(), {"BM": 64}, 4, 0)

    def form(*args: Any) -> tuple[Any, ...]:
        return launcher.form(args)[0]

    assert form(aligned) != form(odd)
    assert form(aligned) != form(aligned.view(torch.int8))
    assert form(None) == (None,)
    assert form(16) != form(17)
    assert form(aligned, 16) == form(aligned, 17)
    assert form(aligned, 16) != form(aligned, 1 << 31)
    assert launcher.form((odd, 16))[1] == [odd.data_ptr(), 16]


def test_the_same_constants_have_one_launcher() -> None:
    kernel = Loose()
    assert prepare(kernel, {"BM": 64}, 4) is prepare(kernel, {"BM": 64}, 4)
    others = [prepare(kernel, {"BM": 32}, 4), prepare(kernel, {"BM": 64}, 8), prepare(kernel, {"BM": 64}, 4, 80)]
    assert all(other is not prepare(kernel, {"BM": 64}, 4) for other in others)


class Greedy:
    """A kernel that fits with two stages of each kind."""

    arg_names = ("x", "STAGES", "STAGES_BACK", "BM")

    def __init__(self, least: int) -> None:
        self.least, self.tried = least, list[tuple[int, int]]()

    def fn(self) -> None:
        """What its launchers are remembered by."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(x: Tensor, *, STAGES: int, STAGES_BACK: int, BM: int, **options: Any) -> None:
            self.tried.append((STAGES, STAGES_BACK))
            if max(STAGES, STAGES_BACK) > self.least:
                raise OutOfResources(200 << 10, 99 << 10, "shared memory")

        return start


def test_less_shared_memory_takes_fewer_stages() -> None:
    kernel, constants = Greedy(2), {"STAGES": 4, "STAGES_BACK": 3, "BM": 64}
    launch(kernel, (1,), (torch.zeros(1),), constants, 4)
    assert kernel.tried == [(4, 3), (3, 2), (2, 2)]
    assert constants["STAGES"] == 4
    with pytest.raises(OutOfResources, match="shared memory"):
        launch(Greedy(1), (1,), (torch.zeros(1),), constants, 4)


@pytest.mark.gpu
def test_a_tensor_that_is_not_on_the_gpu_is_refused_by_a_known_kernel() -> None:
    from convlstm_fish.ops.triton_kernels.convolved import copy_into

    source, target = (torch.rand(1, 2, 2, 8, device="cuda") for _ in range(2))
    copy_into(target, source)
    assert torch.equal(target, source)
    with pytest.raises(ValueError, match="cpu tensor"):
        copy_into(target.cpu(), source)


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
