"""The Triton kernels against the float64 reference: values and every gradient.

On a GPU, compiled, in every dtype (``pytest -m gpu tests/ops/test_triton.py``). Anywhere, in Triton's interpreter,
which must be chosen before Triton is first imported: in a process of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreter import interpreted, not_interpreted, on_both
from kernel_cases import TOLERANCE, Case, check, check_not_a_number, make, relative_error, run
from torch import Tensor

from convlstm_fish.ops import conv_lstm, conv_lstm_reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
from convlstm_fish.ops.triton_kernels.tuning import Tile

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


@pytest.mark.early
@not_interpreted
def test_the_interpreter_in_a_process_of_its_own(interpret: Callable[[str], None]) -> None:
    interpret(__file__)


@interpreted
@pytest.mark.parametrize("name", SMALL)
def test_interpreter_gives_the_reference_and_its_gradients(
    name: str, poisoned: None, precision: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from convlstm_fish.ops.triton_kernels import conv_lstm_triton, tuning

    precision(False)
    case, chosen = SMALL[name], tuning.choose
    if name.startswith("kept-gates-"):  # 64 channels take the interpreter half a minute each
        case = case._replace(hidden=6)
        monkeypatch.setattr(tuning, "choose", lambda *args: chosen(*args)._replace(keep_gates=True))
    check(case, conv_lstm_triton, torch.float32, "cpu", TOLERANCE["float32"])


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


@on_both
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
    with pytest.raises(RuntimeError, match="no second derivative"):
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
