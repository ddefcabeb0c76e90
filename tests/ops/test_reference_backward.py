"""The gradient derived by hand against autograd's, and autograd's against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from convlstm_fish.ops import conv_lstm_reference
from convlstm_fish.ops.equations import Norm, Weights
from convlstm_fish.ops.geometry import geometry
from convlstm_fish.ops.packing import pack, schedule
from convlstm_fish.ops.reference import Recipe, walk
from convlstm_fish.ops.reference_backward import conv_lstm_backward, recall_marks, recall_sequences

N, T, C, HIDDEN, SIZE = 3, 5, 2, 4, (5, 6)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def largest_error(
    *,
    activation: str = "sigmoid",
    peephole: tuple[int, ...] | None = None,
    mask: bool = False,
    bias: bool = True,
    norm: bool = False,
    lengths: list[int] | None = None,
    reverse: bool = False,
    detach_every: int | None = None,
    kernel: tuple[int, int] = (3, 3),
    stride: int | tuple[int, int] = 1,
    block_steps: int = 2,
    marks: bool = False,
    sequence: bool = True,
) -> float:
    """Largest relative error over all gradients of one call with cotangents on every h and on the final h and c."""
    torch.manual_seed(1)
    where = geometry(SIZE, kernel, stride, "same")
    plan = schedule(None if lengths is None else torch.tensor(lengths), N, T, torch.device("cpu"))
    recipe = Recipe(where, activation, reverse, detach_every)
    leaves = {
        "frames": leaf(sum(plan.active), C, *SIZE),
        "h_0": leaf(N, HIDDEN, *where.out),
        "c_0": leaf(N, HIDDEN, *where.out),
        "weight_ih": leaf(4 * HIDDEN, C, *kernel),
        "weight_hh": leaf(4 * HIDDEN, HIDDEN, *kernel),
    }
    if bias:
        leaves["bias"] = leaf(4 * HIDDEN)
    if peephole is not None:
        leaves |= {name: leaf(HIDDEN, *peephole) for name in ("weight_ci", "weight_cf", "weight_co")}
    if norm:
        sizes = {"norm_ih": 4 * HIDDEN, "norm_hh": 4 * HIDDEN, "norm_c": HIDDEN, "norm_c_bias": HIDDEN}
        leaves |= {name: leaf(size) for name, size in sizes.items()}
    if mask:
        leaves["mask"] = leaf(N, HIDDEN, *where.out)
    w = Weights(
        leaves["weight_ih"],
        leaves["weight_hh"],
        leaves.get("bias"),
        None if peephole is None else (leaves["weight_ci"], leaves["weight_cf"], leaves["weight_co"]),
        Norm(4, 2, *(leaves[name] for name in ("norm_ih", "norm_hh", "norm_c", "norm_c_bias"))) if norm else None,
        leaves.get("mask"),
    )
    frames, start = leaves["frames"], (leaves["h_0"], leaves["c_0"])
    done = walk(frames, start, w, recipe, plan, block_steps, keep_h=True, keep_c=True, keep_marks=True)
    h, c = torch.cat(done.h), torch.cat(done.c)
    grad_h = torch.randn_like(h) if sequence else None
    grad_end = (torch.randn_like(done.state[0]), torch.randn_like(done.state[1]))
    loss = sum((state * grad).sum() for state, grad in zip(done.state, grad_end))
    if grad_h is not None:
        loss = loss + (h * grad_h).sum()
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    with torch.no_grad():
        if marks:
            recall = recall_marks(done.marks, frames, start, w, recipe, plan, block_steps)
        else:
            recall = recall_sequences(h, c, start, recipe, plan)
        found = conv_lstm_backward(grad_h, grad_end, frames, start, w, recipe, plan, recall, block_steps=block_steps)
    assert found.keys() == expected.keys()
    return max(float((found[k] - expected[k]).abs().max() / expected[k].abs().max()) for k in expected)


@pytest.mark.parametrize("activation", ["sigmoid", "hard_sigmoid", "hard_sigmoid_v3"])
@pytest.mark.parametrize("peephole", [None, (1, 1), SIZE])
@pytest.mark.parametrize("lengths", [None, [2, 5, 3]])
@pytest.mark.parametrize("reverse", [False, True])
def test_hand_derived_gradient(
    activation: str, peephole: tuple[int, ...] | None, lengths: list[int] | None, reverse: bool
) -> None:
    assert largest_error(activation=activation, peephole=peephole, lengths=lengths, reverse=reverse) < 1e-10


@pytest.mark.parametrize(
    "options",
    [
        {"mask": True},
        {"mask": True, "lengths": [2, 5, 3], "reverse": True},
        {"bias": False, "sequence": False},
        {"kernel": (2, 4), "stride": (2, 1)},
        {"kernel": (4, 3), "lengths": [5, 1, 5]},
        {"norm": True},
        {"norm": True, "bias": False, "peephole": (1, 1), "mask": True, "lengths": [2, 5, 3]},
        {"detach_every": 2},
        {"detach_every": 2, "lengths": [2, 5, 3]},
        {"detach_every": 1, "lengths": [2, 5, 3], "reverse": True},
        {"detach_every": 2, "lengths": [2, 4, 3], "reverse": True, "mask": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("block_steps", [1, 2, 5])
def test_hand_derived_gradient_with_every_option(options: dict[str, Any], marks: bool, block_steps: int) -> None:
    assert largest_error(**options, marks=marks, block_steps=block_steps) < 1e-10


def test_the_input_gradient_is_left_out_when_not_wanted() -> None:
    torch.manual_seed(0)
    where = geometry(SIZE, (3, 3))
    plan = schedule(None, N, T, torch.device("cpu"))
    recipe = Recipe(where, "sigmoid", False, None)
    zeros = torch.zeros(N, HIDDEN, *SIZE)
    w = Weights(torch.randn(16, C, 3, 3), torch.randn(16, HIDDEN, 3, 3), None, None, None, None)
    frames = torch.randn(N * T, C, *SIZE)
    done = walk(frames, (zeros, zeros), w, recipe, plan, T, keep_h=True, keep_c=True)
    recall = recall_sequences(torch.cat(done.h), torch.cat(done.c), (zeros, zeros), recipe, plan)
    ends = (torch.ones_like(zeros), zeros)
    found = conv_lstm_backward(
        None, ends, frames, (zeros, zeros), w, recipe, plan, recall, block_steps=2, need_frames=False
    )
    assert set(found) == {"h_0", "c_0", "weight_ih", "weight_hh"}


@pytest.mark.parametrize("reverse", [False, True])
def test_autograd_against_finite_differences(reverse: bool) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1])
    args = [
        leaf(2, 3, 1, 2, 3), leaf(2, 2, 2, 3), leaf(2, 2, 2, 3), leaf(8, 1, 2, 3), leaf(8, 2, 3, 2), leaf(8),
        leaf(2, 1, 1), leaf(2, 1, 1), leaf(2, 2, 3), leaf(2, 2, 2, 3),
    ]  # fmt: skip

    def call(x: Tensor, h: Tensor, c: Tensor, w: Tensor, u: Tensor, b: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *peephole, mask = rest
        output, state = conv_lstm_reference(
            x, (h, c), w, u, b, tuple(peephole), lengths=lengths, reverse=reverse, recurrent_mask=mask
        )
        return output, *state

    assert torch.autograd.gradcheck(call, args, fast_mode=True)


def test_packing_sorts_as_torch_does() -> None:
    lengths = [2, 5, 3, 5, 1]
    x = torch.randn(5, 6, 2)
    expected = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    plan = schedule(torch.tensor(lengths), 5, 6, x.device)
    assert torch.equal(pack(x, plan), expected.data)
    assert plan.active == expected.batch_sizes.tolist()
