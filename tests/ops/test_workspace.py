"""Memory that is used again is nobody else's, and no more of it is kept than allowed."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from convlstm_fish.ops.workspace import Workspace


def test_memory_returns_when_its_tensor_is_freed() -> None:
    workspace = Workspace()
    first = workspace.empty(100, 30, dtype=torch.float32)
    assert first.shape == (100, 30)
    assert first.data_ptr() % 64 == 0
    place = first.data_ptr()
    view, other = first[3:], workspace.empty(100, 30, dtype=torch.float32)
    assert other.data_ptr() != place
    del first
    third = workspace.empty(100, 30, dtype=torch.float32)
    assert third.data_ptr() != place  # a view is left
    del view
    again = workspace.empty(50, 58, dtype=torch.float32)  # a little smaller
    assert again.data_ptr() == place
    del again
    assert workspace.empty(20, 30, dtype=torch.float32).data_ptr() != place  # too small for it


def test_zeros_are_zeros_where_something_lay() -> None:
    workspace = Workspace()
    workspace.empty(1000, dtype=torch.float64).fill_(3.0)
    assert not workspace.empty(1000, dtype=torch.float64, zero=True).any()


def test_no_more_than_allowed_is_kept() -> None:
    workspace = Workspace(most=10_000)
    tensors = [workspace.empty(4000, dtype=torch.uint8) for _ in range(4)]
    places = [t.data_ptr() for t in tensors]
    del tensors
    assert sum(b.nbytes for b in workspace._free) <= 10_000
    assert workspace.empty(4000, dtype=torch.uint8).data_ptr() in places
    workspace.clear()
    assert workspace._free == []


def test_a_gradient_keeps_its_memory() -> None:
    workspace = Workspace()
    x = torch.rand(300, requires_grad=True)
    held = workspace.empty(300, dtype=torch.float32)
    held.fill_(2.0)
    y = x * held
    del held
    workspace.empty(300, dtype=torch.float32).fill_(5.0)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((300,), 2.0))


def test_threads() -> None:
    workspace = Workspace()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            mine = workspace.empty(500, dtype=torch.int32).fill_(number)
            if not bool((mine == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()


@pytest.mark.usefixtures("poisoned")
def test_what_is_not_written_is_seen() -> None:
    workspace = Workspace()
    assert workspace.empty(10, dtype=torch.float32).isnan().all()
