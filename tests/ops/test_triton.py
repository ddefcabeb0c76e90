"""The Triton kernels against the float64 reference: values and every gradient.

On a GPU, compiled, in every dtype (``pytest -m gpu tests/ops/test_triton.py``). Anywhere, in Triton's interpreter,
which must be chosen before Triton is first imported: in a process of its own.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from kernel_cases import TOLERANCE, Case, check, check_not_a_number, check_unrolled, make, relative_error, run
from torch import Tensor

from convlstm_fish.ops import conv_lstm, conv_lstm_reference, unroll, unroll_stack

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
from convlstm_fish.ops.triton_kernels.tuning import Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, started by another test")

SMALL = {
    "plain": Case(1, 2, 3, 5, 4),
    "stateless-valid": Case(1, 2, 4, 6, 6, 16, hx=False, bias=False,
                            options={"padding": "valid", "recurrent_activation": "hard_sigmoid"}),
    "even-kernels": Case(1, 2, 3, 5, 4, 6, (2, 3), (4, 2), peephole="channel", mask=True),
    "strided-reverse": Case(1, 2, 3, 6, 5, kernel_h=(1, 3), peephole="pixel", options={
        "stride": 2, "dilation": (1, 2), "recurrent_activation": "hard_sigmoid_v3", "reverse": True}),
    "kept-gates": Case(1, 2, 12, 5, 4, 64, peephole="channel"),
    "kept-gates-mask": Case(1, 3, 2, 3, 4, 64, mask=True, options={"reverse": True}),
    "kept-gates-reverse": Case(1, 3, 10, 3, 4, 64, hx=False, options={"reverse": True}),
    "kept-gates-valid": Case(1, 3, 16, 5, 4, 64, hx=False, bias=False, options={"padding": "valid"}),
    "kept-gates-lengths": Case(2, 2, 2, 3, 4, 64, lengths=(1, 2)),
    "convolved": Case(2, 3, 16, 5, 4, 64, peephole="channel"),
    "convolved-reverse": Case(1, 3, 24, 3, 4, 72, hx=False, bias=False, options={
        "reverse": True, "recurrent_activation": "hard_sigmoid"}),
    "convolved-last": Case(1, 2, 16, 5, 6, 64, (5, 3), (5, 3), peephole="pixel", sequences=False),
    "convolved-few": Case(2, 3, 3, 6, 7, 64, (3, 3), (5, 3), options={"reverse": True, "stride": 2}),
    "convolved-few-stateless": Case(1, 3, 1, 5, 6, 72, hx=False, peephole="channel", options={"padding": "valid"}),
    "convolved-one-step": Case(1, 1, 16, 3, 4, 64, (1, 1), (1, 1)),
    "short-lengths": Case(steps=2, height=3, width=4, lengths=(2, 1), sequences=False),
    "short-lengths-reverse": Case(steps=2, height=3, width=4, lengths=(1, 2), mask=True, options={"reverse": True}),
    "one-step": Case(steps=1, height=1, width=1, kernel=(1, 1), kernel_h=(1, 1), hidden=3, channels=1),
}  # fmt: skip
LARGE = {
    "serenity-1": Case(3, 5, 4, 61, 47, 16, hx=False, bias=False, options={
        "padding": "valid", "recurrent_activation": "hard_sigmoid"}),
    "serenity-2": Case(3, 5, 16, 29, 23, 32, hx=False, bias=False, sequences=False, options={"padding": "valid"}),
    "wide-input": Case(2, 3, 32, 13, 37, 16, bias=False),
    "wide-state": Case(2, 3, 4, 13, 37, 32, bias=False),
    "narrow-bias": Case(2, 3, 16, 13, 37, 32),
    "long": Case(2, 63, 5, 13, 17, 5),
    "lengths": Case(clips=3, steps=5, lengths=(5, 1, 3), mask=True),
    "lengths-reverse": Case(clips=3, steps=5, lengths=(2, 5, 1), mask=True, options={"reverse": True}),
    "holmdk": Case(2, 4, 64, 24, 20, 64),
    "openstl": Case(2, 3, 16, 16, 16, 128, (5, 5), (5, 5)),
    "wide": Case(1, 3, 7, 11, 10, 256, (1, 1), (3, 3)),
    "odd-width": Case(2, 3, 20, 15, 14, 48, (7, 7), (5, 3), peephole="channel", mask=True),
}  # fmt: skip


@pytest.fixture
def precision() -> Iterator[Callable[[bool], None]]:
    """Sets whether float32 convolutions may use TF32, and sets it back."""
    before = torch.backends.cudnn.allow_tf32

    def allow(tf32: bool) -> None:
        torch.backends.cudnn.allow_tf32 = tf32

    yield allow
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_interpreter_in_a_process_of_its_own(interpret: Callable[[str], None]) -> None:
    interpret(__file__)


@interpreted
@pytest.mark.parametrize("name", SMALL)
def test_interpreter_gives_the_reference_and_its_gradients(
    name: str, poisoned: None, precision: Callable[[bool], None]
) -> None:
    from convlstm_fish.ops.triton_kernels import conv_lstm_triton

    precision(False)
    check(SMALL[name], conv_lstm_triton, torch.float32, "cpu", TOLERANCE["float32"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", {**SMALL, **LARGE})
def test_kernel_gives_the_reference_and_its_gradients(
    name: str, dtype: str, poisoned: None, precision: Callable[[bool], None]
) -> None:
    precision(dtype == "tf32")
    case = {**SMALL, **LARGE}[name]
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)

    def function(*args: Any, **options: Any) -> Any:
        return conv_lstm(*args, **options, backend="triton")

    check(case, function, kind, "cuda", TOLERANCE[dtype])


OTHER_TILES = Tile(32, 16, 16, 16, 32, 0, 4, 1, held=2), Tile(32, 16, 16, 16, 32, 16, 4, 3, 1, halo=1)


@interpreted
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("channels", [3, 16])
def test_convolved_layer_whose_input_needs_no_gradient(
    channels: int, steps: int, poisoned: None, precision: Callable[[bool], None]
) -> None:
    precision(False)
    a = {k: v.float() for k, v in make(Case(1, steps, channels, 5, 4, 64))["arguments"].items()}
    weight = a["weight_hh" if steps > 1 else "weight_ih"].requires_grad_()
    found, truth = (
        torch.autograd.grad(conv_lstm(a["x"], None, a["weight_ih"], a["weight_hh"], backend=backend)[0].sum(), weight)
        for backend in ("triton", "reference")
    )
    assert relative_error(found[0], truth[0].double()) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("activation", ["sigmoid", "hard_sigmoid", "hard_sigmoid_v3"])
@pytest.mark.parametrize(("channels", "hidden"), [(3, 5), (4, 16), (16, 64)])
def test_what_is_not_a_number_stays_so(channels: int, hidden: int, activation: str, device: str) -> None:
    case = Case(1, 2, channels, 5, 5, hidden, options={"recurrent_activation": activation})

    def function(*args: Any, **options: Any) -> Any:
        return conv_lstm(*args, **options, backend="triton")

    check_not_a_number(function, torch.float32 if device == "cpu" else torch.bfloat16, device, case)


@interpreted
def test_interpreter_with_tiles_of_the_16_bit_kernels(
    poisoned: None, precision: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from convlstm_fish.ops.triton_kernels import conv_lstm_triton, tuning

    chosen = tuning.choose

    def choose(*args: Any) -> tuning.Tiles:
        forward, backward = OTHER_TILES
        return chosen(*args)._replace(forward=forward, backward=backward, image=backward)

    monkeypatch.setattr(tuning, "choose", choose)
    precision(False)
    case = Case(2, 3, 4, 6, 19, 8, bias=False, peephole="channel")
    check(case, conv_lstm_triton, torch.float32, "cpu", TOLERANCE["float32"])


UNROLLED = {
    "plain": Case(2, 3, 3, 5, 4),
    "one": Case(1, 1, 3, 5, 4, bias=False),
    "pixel": Case(1, 2, 3, 5, 4, 6, (2, 3), (4, 2), peephole="pixel"),
    "kept-gates": Case(1, 3, 12, 5, 4, 64, peephole="channel"),
    "convolved-few": Case(2, 3, 4, 5, 4, 64),
    "convolved": Case(2, 3, 16, 5, 4, 64, peephole="channel"),
}


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
@pytest.mark.parametrize(("channels", "hidden", "state"), [(3, 5, True), (3, 64, True), (16, 64, False)])
def test_operators_foretell_their_results(channels: int, hidden: int, state: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from convlstm_fish.ops.triton_kernels.operators import _backward, conv_lstm_forward

    def agree(operator: Any, *args: Any) -> Any:
        found = operator(*args)
        with FakeTensorMode() as mode:
            told = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in told]
        assert all(one.stride() == other.stride() for one, other in zip(found, told) if one.numel())
        return found

    a = {k: v.float() for k, v in make(Case(2, 2, channels, 2, 3, hidden))["arguments"].items()}
    x, *hx = (a[k].movedim(-3, -1).contiguous() for k in ("x", "h_0", "c_0"))
    tensors = (x, *(hx if state else (None, None)), a["weight_ih"], a["weight_hh"], a["bias"], *[None] * 5)
    options = ([2, 3], [1, 1], [1, 1], [1, 1], 0, False, False)
    agree(conv_lstm_forward, *tensors, *options, False, False)
    h, h_n, _, *kept = agree(conv_lstm_forward, *tensors, *options, True, True)
    agree(_backward, torch.ones_like(h), torch.ones_like(h_n), None, h, *kept, *tensors, *options, True, state)


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


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
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


@pytest.mark.gpu
def test_same_bits_twice() -> None:
    tensors = make(LARGE["serenity-1"])
    first, second = (
        run(LARGE["serenity-1"], conv_lstm, torch.bfloat16, "cuda", tensors, backend="triton") for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["serenity-1", "holmdk"])
def test_on_a_gpu_that_is_not_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = make(LARGE[name])
    here, there = (
        run(LARGE[name], conv_lstm, torch.bfloat16, device, tensors, backend="triton")
        for device in ("cuda:0", "cuda:1")
    )
    for key, value in here.items():
        assert there[key].device.index == 1
        assert torch.equal(value.cpu(), there[key].cpu()), key


@pytest.mark.gpu
def test_strided_input_and_inference_agree_with_training(precision: Callable[[bool], None]) -> None:
    precision(False)
    case = SMALL["plain"]
    a = {k: v.float().cuda() for k, v in make(case)["arguments"].items()}
    video = torch.randn(1, 4, 3, 5, 8, device="cuda")[:, ::2, :, :, ::2]
    args = (video, (a["h_0"], a["c_0"]), a["weight_ih"], a["weight_hh"], a["bias"])
    truth, state = conv_lstm_reference(
        video.double(), (a["h_0"].double(), a["c_0"].double()), *(t.double() for t in args[2:])
    )
    for sequences in (True, False):
        output, (h_n, c_n) = conv_lstm(*args, return_sequences=sequences, backend="triton")
        if sequences:
            assert relative_error(output, truth) < TOLERANCE["float32"]
        assert relative_error(h_n, state[0]) < TOLERANCE["float32"]
        assert relative_error(c_n, state[1]) < TOLERANCE["float32"]


@pytest.mark.gpu
def test_autocast_computes_in_its_dtype_and_keeps_c_and_gradients_wide() -> None:
    a = {k: v.float().cuda().requires_grad_() for k, v in make(SMALL["plain"])["arguments"].items()}
    with torch.autocast("cuda", torch.bfloat16):
        output, (h_n, c_n) = conv_lstm(a["x"], None, a["weight_ih"], a["weight_hh"], a["bias"], backend="triton")
    assert (output.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    output.float().sum().backward()
    assert a["weight_ih"].grad.dtype == torch.float32


@pytest.mark.gpu
def test_second_derivative_and_transforms_are_refused() -> None:
    a = {k: v.float().cuda().requires_grad_() for k, v in make(SMALL["plain"])["arguments"].items()}

    def total(x: Tensor) -> Tensor:
        return conv_lstm(x, None, a["weight_ih"], a["weight_hh"], backend="triton")[0].square().sum()

    (first,) = torch.autograd.grad(total(a["x"]), a["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        torch.autograd.grad(first.sum(), a["x"])
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(total)(a["x"].detach())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of Inductor's own code
def test_compiles_into_one_graph() -> None:
    a = {k: v.float().cuda().requires_grad_() for k, v in make(SMALL["plain"])["arguments"].items()}

    def layer(x: Tensor) -> Tensor:
        return conv_lstm(2 * x, None, a["weight_ih"], a["weight_hh"], a["bias"], backend="triton")[0].relu()

    compiled = torch.compile(layer, fullgraph=True)
    eager = torch.autograd.grad(layer(a["x"]).sum(), (a["x"], a["weight_hh"]))
    found = torch.autograd.grad(compiled(a["x"]).sum(), (a["x"], a["weight_hh"]))
    for left, right in zip(eager, found):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "not in torch.float64"),
        ({"shape": (1, 2, 3, 8)}, "2 spatial dimensions"),
        ({"options": {"checkpoint_every": 2}}, "checkpoint_every"),
        ({"options": {"detach_every": 2}}, "detach_every"),
        ({"options": {"norm": ()}}, "normalisation"),
    ],
)
def test_unsupported_says_why(change: dict[str, Any], reason: str) -> None:
    from convlstm_fish.ops.triton_kernels import unsupported

    x = torch.zeros(change.get("shape", (1, 2, 3, 8, 8)), dtype=change.get("dtype", torch.float32))
    weights = (torch.zeros(8, 3, 3, 3), torch.zeros(8, 2, 3, 3))
    said = unsupported(x, None, *weights, **change.get("options", {}))
    assert said is not None
    assert reason in said
