"""Steps called one by one, of a layer and of layers fed by one another, against the float64 reference.

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
from kernel_cases import TOLERANCE, Case, check_unrolled, make, relative_error
from torch import Tensor

from convlstm_fish.ops import unroll, unroll_stack

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

UNROLLED = {
    "plain": Case(2, 3, 3, 5, 4),
    "one": Case(1, 1, 3, 5, 4, bias=False),
    "pixel": Case(1, 2, 3, 5, 4, 6, (2, 3), (4, 2), peephole="pixel"),
    "kept-gates": Case(1, 3, 12, 5, 4, 64, peephole="channel"),
    "convolved-few": Case(2, 3, 4, 5, 4, 64),
    "convolved": Case(2, 3, 16, 5, 4, 64, peephole="channel"),
}


@pytest.mark.early
@not_interpreted
def test_the_interpreter_in_a_process_of_its_own(interpret: Callable[[str], None]) -> None:
    interpret(__file__)


@interpreted
@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled_in_the_interpreter(name: str, poisoned: None, precision: Callable[[bool], None]) -> None:
    precision(False)
    check_unrolled("cpu", torch.float32, UNROLLED[name], TOLERANCE["float32"])


@interpreted
def test_unrolled_with_room_for_few_steps(
    poisoned: None, precision: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from convlstm_fish.ops.triton_kernels import weights as module

    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 2 * 5 * 4 * 4 * 5 * 4)  # two steps
    precision(False)
    check_unrolled("cpu", torch.float32, Case(2, 5, 3, 5, 4), TOLERANCE["float32"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled(name: str, dtype: str, poisoned: None, precision: Callable[[bool], None]) -> None:
    precision(dtype == "tf32")
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    check_unrolled("cuda", kind, UNROLLED[name], TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize(("channels", "hidden"), [(3, 5), (3, 64), (16, 64)])
def test_unrolled_from_no_state(channels: int, hidden: int, poisoned: None, precision: Callable[[bool], None]) -> None:
    precision(False)
    a = {k: v.float().requires_grad_() for k, v in make(Case(1, 1, channels, 5, 4, hidden))["arguments"].items()}
    leaves = [a["x"], a["weight_ih"], a["bias"]]
    found, truth = [], []
    for results, backend in ((found, "triton"), (truth, "reference")):
        h, c = unroll(a["weight_ih"], a["weight_hh"], a["bias"], backend=backend)(a["x"][:, 0], None)
        results += [h, c, *torch.autograd.grad(h.sum() + c.square().sum(), leaves)]
    assert all(relative_error(ours, theirs.double()) < TOLERANCE["float32"] for ours, theirs in zip(found, truth))


@interpreted
def test_unrolled_passes_stand_alone(precision: Callable[[bool], None]) -> None:
    precision(False)
    a = {k: v.float().requires_grad_() for k, v in make(UNROLLED["plain"])["arguments"].items()}
    step = unroll(a["weight_ih"], a["weight_hh"], backend="triton")
    frozen = unroll(a["weight_ih"].detach(), a["weight_hh"].detach(), backend="triton")
    state = fixed = (a["h_0"], a["c_0"])
    for t in range(2):
        state, fixed = step(a["x"][:, t], state), frozen(a["x"][:, t], fixed)
    total = state[0].square().sum()
    weights = [a["weight_ih"], a["weight_hh"]]
    # Leaves the weights' part of the pass undone.
    (dx,) = torch.autograd.grad(total, a["x"], retain_graph=True)
    assert torch.equal(dx, torch.autograd.grad(fixed[0].square().sum(), a["x"])[0])
    once = torch.autograd.grad(total, weights, retain_graph=True)
    for one, other in zip(once, torch.autograd.grad(total, weights)):
        assert torch.equal(one, other)
    with torch.no_grad():
        a["weight_hh"].mul_(2)
    with pytest.raises(RuntimeError, match="weights have changed"):
        step(a["x"][:, 0], state)
    with torch.no_grad():
        quiet = unroll(a["weight_ih"], a["weight_hh"], backend="triton")(a["x"][:, 0], state)[0]
    assert not quiet.requires_grad


def two_layers(device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """The last output of two layers that read each other's states, and the gradients of x and all weights."""
    random = torch.Generator().manual_seed(2)
    shapes = [(1, 16, 5, 4), *[(256, 64, 3, 3)] * 4]
    tensors = [torch.randn(shape, generator=random, dtype=torch.float64) / 8 for shape in shapes]
    first, *weights = (t.to(dtype).double().to(device, dtype).requires_grad_() for t in tensors)
    x = first.repeat(1, 4, 1, 1)
    layers = [unroll(*weights[:2], backend=backend), unroll(*weights[2:], backend=backend)]
    states: list[Any] = [None, None]
    for _ in range(6):
        for k, step in enumerate(layers):
            states[k] = step(x, states[k])
            x = states[k][0]
    return [x, *torch.autograd.grad(x.double().square().sum(), [first, *weights])]


# The channels of the input and of the layers of a stack: 64 are convolved, on an image with its input where that has
# 16 or 64, and all others are not.
STACKS = {
    "narrow": (3, 5, 4),
    "convolved": (16, 64, 64, 64),
    "few": (3, 64, 64),
    "into-narrow": (16, 64, 5),
    "from-narrow": (3, 16, 64),
    "few-between": (2, 64, 4, 64),
    # Those that end as they begin read the last layer's h themselves.
    "fed-back": (64, 64, 64),
    "fed-back-alone": (64, 64),
    "fed-back-narrow": (5, 8, 5),
    "fed-back-few": (4, 64, 4),
}


def stack_results(
    channels: Sequence[int], state: bool, device: str, dtype: torch.dtype, backend: str
) -> dict[str, Tensor]:
    """Outputs and gradients of steps of a stack that reads its own output, with random cotangents on all of them."""
    random = torch.Generator().manual_seed(3)
    n, size, steps = 2, (3, 4), 4

    def leaf(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=random, dtype=torch.float64) / 4
        return value.to(device, dtype).requires_grad_()

    leaves = {"x": leaf(n, steps, channels[0], *size)}  # of which those that feed back read the first
    layers = []
    for k, (narrow, wide) in enumerate(itertools.pairwise(channels)):
        leaves |= {f"w_ih {k}": leaf(4 * wide, narrow, 3, 3), f"w_hh {k}": leaf(4 * wide, wide, 3, 3)}
        leaves |= {f"bias {k}": leaf(4 * wide), f"h_0 {k}": leaf(n, wide, *size), f"c_0 {k}": leaf(n, wide, *size)}
        names = {"weight_ih": f"w_ih {k}", "weight_hh": f"w_hh {k}", "bias": f"bias {k}"}
        layers.append({name: leaves[key] for name, key in names.items()} | {"backend": backend})
    step = unroll_stack(layers)
    states: Any = [(leaves[f"h_0 {k}"], leaves[f"c_0 {k}"]) if state else None for k in range(len(layers))]
    results, total, output = {}, torch.zeros((), dtype=torch.float64, device=device), None
    for t in range(steps):
        x = leaves["x"][:, t]
        if output is not None and channels[0] == channels[-1]:
            x = None if t != 2 else 0.1 * output  # by another way, too, and after it
        elif output is not None:
            x = x + 0.1 * output.mean(1, keepdim=True)
        output, states = step(x, states)
        results[f"output {t}"] = output
        total = total + (output.double() * torch.randn(output.shape, generator=random).to(device)).sum()
    for k, hx in enumerate(states):
        for name, value in zip("hc", hx):
            results[f"{name}_n {k}"] = value
            total = total + (value.double() * torch.randn(value.shape, generator=random).to(device)).sum()
    names = [name for name in leaves if state or "_0" not in name]
    found = torch.autograd.grad(total, [leaves[name] for name in names])
    return results | {f"d {name}": gradient for name, gradient in zip(names, found)}


@pytest.mark.parametrize(
    ("name", "state", "device"),
    [
        *(pytest.param(*case, "cuda", marks=pytest.mark.gpu) for case in itertools.product(STACKS, (False, True))),
        # The interpreter takes its time: those that differ most.
        pytest.param("narrow", True, "cpu", marks=interpreted),
        pytest.param("convolved", False, "cpu", marks=interpreted),
        pytest.param("few", False, "cpu", marks=interpreted),
        pytest.param("into-narrow", True, "cpu", marks=interpreted),
        pytest.param("fed-back", True, "cpu", marks=interpreted),
        pytest.param("fed-back-alone", False, "cpu", marks=interpreted),
    ],
)
def test_unrolled_stack(name: str, state: bool, device: str, poisoned: None, precision: Callable[[bool], None]) -> None:
    precision(False)
    truth = stack_results(STACKS[name], state, device, torch.float64, "reference")
    found = stack_results(STACKS[name], state, device, torch.float32, "triton")
    assert found.keys() == truth.keys()
    errors = {key: relative_error(value, truth[key]) for key, value in found.items()}
    wrong = {key: error for key, error in errors.items() if not error < TOLERANCE["float32"]}
    assert not wrong, f"relative errors over {TOLERANCE['float32']}: {wrong}"


@on_both
def test_unrolled_images_are_read_as_sequences(
    device: str, poisoned: None, precision: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from convlstm_fish.ops.triton_kernels.convolved import ConvolvedSums

    added, add = [], ConvolvedSums.add

    def count(self: Any, images: Tensor, da: Tensor) -> None:
        added.append(len(images))
        add(self, images, da)

    monkeypatch.setattr(ConvolvedSums, "add", count)
    precision(False)
    truth = two_layers(device, torch.float64, "reference")
    found = two_layers(device, torch.float32, "triton")
    assert sorted(added) == [1, 1, 5, 5]  # a step without a state before it has no such image
    assert all(relative_error(ours, theirs) < TOLERANCE["float32"] for ours, theirs in zip(found, truth))
