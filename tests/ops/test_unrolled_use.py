"""Uses of steps called one by one that go beyond a loop and a backward pass, against the reference.

On a GPU (``pytest -m gpu``), and in Triton's interpreter as test_triton.py does.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from interpreter import interpreted, not_interpreted, on_both
from kernel_cases import TOLERANCE, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from convlstm_fish.ops import conv_lstm, unroll_stack

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

SIZE = (3, 4)
# Channels of the input and the layers: convolved by cuDNN, and by our kernels, which the interpreter is slow with.
stacks = pytest.mark.parametrize(
    ("channels", "device"),
    [
        pytest.param((64, 64, 64), "cpu", marks=interpreted),
        pytest.param((64, 64, 64), "cuda", marks=pytest.mark.gpu),
        pytest.param((8, 8), "cuda", marks=pytest.mark.gpu),
    ],
)
Results = list[Tensor]


def leaf(*shape: int, seed: int, device: str) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random) / 4).to(device).requires_grad_()


class Loop:
    """A stack with its weights, in steps on (2, C, H, W)."""

    def __init__(self, channels: Sequence[int], backend: str, device: str, steps: int = 4) -> None:
        self.backend = backend
        pairs = enumerate(itertools.pairwise(channels))
        self.layers = [
            {
                "weight_ih": leaf(4 * wide, narrow, 3, 3, seed=3 * k, device=device),
                "weight_hh": leaf(4 * wide, wide, 3, 3, seed=3 * k + 1, device=device),
                "bias": leaf(4 * wide, seed=3 * k + 2, device=device),
            }
            for k, (narrow, wide) in pairs
        ]
        self.weights = [w for layer in self.layers for w in layer.values()]
        self.x = leaf(steps, 2, channels[0], *SIZE, seed=99, device=device)
        self.step = unroll_stack([layer | {"backend": backend} for layer in self.layers])
        self.states: Any = [None] * len(self.layers)

    def __call__(self, x: Tensor | None) -> Tensor:
        output, self.states = self.step(x, self.states)
        return output

    def gradients(self, total: Tensor, **options: Any) -> Results:
        return list(torch.autograd.grad(total, [self.x, *self.weights], **options))


def compare(
    use: Callable[[Loop], Sequence[Tensor | None]], channels: Sequence[int], device: str, precision: Any
) -> None:
    """Whether the kernels find what the reference finds."""
    precision(False)
    found, truth = (use(Loop(channels, backend, device)) for backend in ("triton", "reference"))
    for ours, theirs in zip(found, truth, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
        else:
            assert relative_error(ours, theirs.double()) < TOLERANCE["float32"]


@pytest.mark.early
@not_interpreted
def test_the_interpreter_in_a_process_of_its_own(interpret: Callable[[str], None]) -> None:
    interpret(__file__)


@stacks
def test_a_backward_pass_within_another(
    channels: Sequence[int], device: str, precision: Callable[[bool], None]
) -> None:
    def use(loop: Loop) -> Results:
        total, middle, side = torch.zeros((), device=device), loop.x, list[Tensor]()

        def aside(_: Tensor) -> None:
            side.extend(torch.autograd.grad(middle, loop.x, retain_graph=True))

        for t in range(3):
            if t == 1:

                def again(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
                    loop.states = list(zip(flat[::2], flat[1::2]))
                    return (loop(x), *(each for state in loop.states for each in state))

                flat = [each for state in loop.states for each in state]
                output, *flat = checkpoint(again, loop.x[t], *flat, use_reentrant=True)
                loop.states = list(zip(flat[::2], flat[1::2]))
            else:
                output = loop(loop.x[t])
            if t == 0:
                middle = output.mean()
            if t == 2:
                output.register_hook(aside)
            total = total + output.square().sum()
        total.backward()
        return [loop.x.grad, *side, *(w.grad for w in loop.weights)]  # type: ignore[list-item]

    compare(use, channels, device, precision)


@stacks
def test_checkpoints_and_then_a_step_that_is_fed_back(
    channels: Sequence[int], device: str, precision: Callable[[bool], None]
) -> None:
    def use(loop: Loop) -> Results:
        total, states = torch.zeros((), device=device), loop.states
        for t in range(3):
            x = None if t else loop.x[0]
            output, states = checkpoint(loop.step, x, states, use_reentrant=False)
            total = total + output.square().sum()
        found = loop.gradients(total)
        return [*found, loop.step(None, states)[0]]

    compare(use, channels, device, precision)


@stacks
def test_a_state_that_is_changed_or_looked_at_before_it_is_fed_back(
    channels: Sequence[int], device: str, precision: Callable[[bool], None]
) -> None:
    def use(loop: Loop) -> Results:
        with torch.no_grad():
            loop(loop.x[0])
            loop(None)
            loop.states[-1][0].mul_(0)  # as for clips that have ended
            quiet = loop(None)
        loop.states = [None] * len(loop.states)
        loop(loop.x[1])
        loop(None)
        loop.states[-1][0].register_hook(lambda gradient: 0 * gradient)
        return [quiet, *loop.gradients(loop(None).square().sum())]

    compare(use, channels, device, precision)


@stacks
def test_layers_that_a_loss_does_not_read_have_no_gradient(
    channels: Sequence[int], device: str, precision: Callable[[bool], None]
) -> None:
    def use(loop: Loop) -> Sequence[Tensor | None]:
        loop(loop.x[0])
        loop(loop.x[1])
        return loop.gradients(loop.states[0][1].sum(), allow_unused=True)

    compare(use, channels, device, precision)


@stacks
def test_outputs_may_be_changed_in_place(
    channels: Sequence[int], device: str, precision: Callable[[bool], None]
) -> None:
    def use(loop: Loop) -> Results:
        loop(loop.x[0])
        first = loop(loop.x[1])
        c = loop.states[0][1].mul_(2)
        return [first, *loop.gradients(c.square().sum() + first.sum())]

    compare(use, channels, device, precision)


@stacks
def test_a_second_derivative_is_refused(
    channels: Sequence[int], device: str, precision: Callable[[bool], None]
) -> None:
    precision(False)
    loop = Loop(channels, "triton", device)
    loop(loop.x[0])
    total = loop(loop.x[1]).square().sum()
    for wanted in (loop.weights[:1], [loop.x]):
        (first,) = torch.autograd.grad(total, wanted, create_graph=True)
        for of in (loop.weights[1:2], [loop.x]):
            with pytest.raises(RuntimeError, match=r"no second derivative; take backend='reference'"):
                torch.autograd.grad(total + first.square().sum(), of, retain_graph=True)
    output, _ = conv_lstm(loop.x.transpose(0, 1), None, **loop.layers[0], backend="triton")
    (first,) = torch.autograd.grad(output.square().sum(), loop.weights[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; take backend='reference'"):
        first.sum().backward()


@stacks
def test_weights_that_have_changed_are_told(
    channels: Sequence[int], device: str, precision: Callable[[bool], None]
) -> None:
    precision(False)
    loop = Loop(channels, "triton", device)
    total = loop(loop.x[0]).square().sum()
    loop.gradients(total, retain_graph=True)
    with torch.no_grad():
        loop.weights[0].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place since the step whose gradient is wanted"):
        loop.gradients(total)
    with pytest.raises(RuntimeError, match="the weights have changed since the first step"):
        loop(loop.x[1])
    # A fused optimizer does not count what it does as a change.
    loop = Loop(channels, "triton", device)
    loop(loop.x[0]).sum().backward()
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1, device=device))], lr=1.0, fused=True).step()
    loop(loop.x[1])
    torch.optim.SGD(loop.weights, lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match="the weights have changed since the first step"):
        loop(loop.x[2])


@stacks
def test_weights_of_inference_mode_and_weights_that_are_thawed(
    channels: Sequence[int], device: str, precision: Callable[[bool], None]
) -> None:
    def use(loop: Loop) -> Results:
        for weight in loop.weights:
            weight.requires_grad_(False)
        quiet = loop(loop.x[0])
        for weight in loop.weights:
            weight.requires_grad_(True)
        found = [quiet, *torch.autograd.grad(loop(loop.x[1]).sum(), loop.weights)]
        with torch.inference_mode():
            copies = [{name: w.clone() for name, w in layer.items()} for layer in loop.layers]
            step = unroll_stack([each | {"backend": loop.backend} for each in copies])
            _, states = step(loop.x[0], [None] * len(copies))
            states[-1][0].mul_(0.5)
            return [*found, step(None, states)[0].clone()]

    compare(use, channels, device, precision)


@on_both
def test_gates_near_zero_keep_their_digits(device: str, precision: Callable[[bool], None]) -> None:
    precision(False)
    weight, none = torch.zeros(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    weight[2] = 1
    x = torch.tensor([1e-20, -1e-7, 1e-5, -1e-3, 0.05, 0.0999, -0.1001, 0.3]).view(1, 1, 1, 1, 8).to(device)
    for size in (x, -x):
        _, (h, c) = conv_lstm(size, None, weight.to(device), none.to(device), backend="triton")
        truth = 0.5 * size[:, 0].double().tanh()
        torch.testing.assert_close(c.double(), truth, rtol=1e-6, atol=0)
        torch.testing.assert_close(h.double(), 0.5 * truth.tanh(), rtol=1e-6, atol=0)
