"""Calls of the ConvLSTM kernels, and their comparison with the float64 reference: values and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convlstm_fish.ops import conv_lstm_reference, geometry, unroll

# Relative error in the Frobenius norm. Never widened.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "tf32": 1e-3, "float32": 1e-5}


class Case(NamedTuple):
    """One call: sizes, what is passed, and the options."""

    clips: int = 2
    steps: int = 3
    channels: int = 3
    height: int = 9
    width: int = 7
    hidden: int = 5
    kernel: tuple[int, int] = (3, 3)
    kernel_h: tuple[int, int] = (3, 3)
    hx: bool = True
    bias: bool = True
    peephole: str | None = None
    mask: bool = False
    lengths: tuple[int, ...] | None = None
    sequences: bool = True
    options: dict[str, Any] = {}  # noqa: RUF012


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value - truth‖ / ‖truth‖; NaN never passes a comparison."""
    return float((value.detach().double() - truth.detach()).norm() / truth.detach().norm())


def run(
    case: Case, function: Callable[..., Any], dtype: torch.dtype, device: str, tensors: dict[str, Any], **options: Any
) -> dict[str, Tensor]:
    """Outputs and gradients of one call, with random cotangents on every output, by name."""
    cast = {k: v.to(device, dtype, copy=True).requires_grad_() for k, v in tensors["arguments"].items()}
    hx = (cast["h_0"], cast["c_0"]) if case.hx else None
    peephole = tuple(cast[k] for k in ("w_ci", "w_cf", "w_co")) if case.peephole else None
    mask = tensors["mask"].to(device, dtype) if case.mask else None
    lengths = None if case.lengths is None else torch.tensor(case.lengths, device=device)
    output, (h_n, c_n) = function(
        cast["x"], hx, cast["weight_ih"], cast["weight_hh"], cast.get("bias"), peephole, recurrent_mask=mask,
        lengths=lengths, return_sequences=case.sequences, **case.options, **options,
    )  # fmt: skip
    results = {"output": output, "h_n": h_n, "c_n": c_n}
    results = {k: v for k, v in results.items() if v is not None}
    sum((v.double() * tensors["cotangents"][k].to(device)).sum() for k, v in results.items()).backward()
    return results | {f"d {k}": v.grad for k, v in cast.items()}


def make(case: Case) -> dict[str, Any]:
    """Random float64 arguments and cotangents for a case."""
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    o = case.options
    sizes = (case.height, case.width)
    out = geometry(sizes, case.kernel, o.get("stride", 1), o.get("padding", "same"), o.get("dilation", 1)).out
    state = (case.clips, case.hidden, *out)
    fan = case.channels * case.kernel[0] * case.kernel[1] + case.hidden * case.kernel_h[0] * case.kernel_h[1]
    arguments = {
        "x": normal(case.clips, case.steps, case.channels, *sizes),
        "weight_ih": normal(4 * case.hidden, case.channels, *case.kernel) / fan**0.5,
        "weight_hh": normal(4 * case.hidden, case.hidden, *case.kernel_h) / fan**0.5,
    }
    if case.hx:
        arguments |= {"h_0": normal(*state).tanh(), "c_0": normal(*state)}
    if case.bias:
        arguments["bias"] = normal(4 * case.hidden)
    if case.peephole:
        shape = (case.hidden, 1, 1) if case.peephole == "channel" else (case.hidden, *out)
        arguments |= {name: normal(*shape) for name in ("w_ci", "w_cf", "w_co")}
    return {
        "arguments": arguments,
        "mask": (torch.rand(state, generator=random, dtype=torch.float64) > 0.25) / 0.75,
        "cotangents": {
            "output": normal(case.clips, case.steps, case.hidden, *out),
            "h_n": normal(*state),
            "c_n": normal(*state),
        },
    }


def check(case: Case, function: Callable[..., Any], dtype: torch.dtype, device: str, tolerance: float) -> None:
    """Compares one call with the float64 reference on operands that the dtype can hold."""
    tensors = make(case)
    for group in (tensors["arguments"], tensors["cotangents"]):
        for name, value in group.items():
            group[name] = value.to(dtype).double()
    tensors["mask"] = tensors["mask"].to(dtype).double()
    truth = run(case, conv_lstm_reference, torch.float64, device, tensors)
    found = run(case, function, dtype, device, tensors)
    assert found.keys() == truth.keys()
    errors = {name: relative_error(found[name], truth[name]) for name in truth}
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, f"relative errors over {tolerance}: {wrong}"


def unrolled(
    device: str, dtype: torch.dtype, case: Case, tensors: dict[str, Any], feed_back: bool, backend: str
) -> dict[str, Tensor]:
    """Outputs and gradients of steps whose input depends on the state before, with random cotangents on all of them.

    Without ``feed_back`` it does not: in 16 bits the addition would round by as much as the kernel may be off.
    """
    cast = {k: v.to(device, dtype, copy=True).requires_grad_() for k, v in tensors["arguments"].items()}
    peephole = tuple(cast[k] for k in ("w_ci", "w_cf", "w_co")) if case.peephole else None
    parameters = (cast["weight_ih"], cast["weight_hh"], cast.get("bias"), peephole)
    step = unroll(*parameters, backend=backend, **case.options)  # type: ignore[arg-type]
    state, total, results = (cast["h_0"], cast["c_0"]), 0.0, {}
    for t in range(case.steps):
        x = cast["x"][:, t]
        state = step(x + 0.1 * state[0].mean(1, keepdim=True) if feed_back else x, state)
        results[f"h_{t + 1}"] = state[0]
        total = total + (state[0].double() * tensors["cotangents"]["output"][:, t].to(device)).sum()
    results["c_n"] = state[1]
    total = total + (state[1].double() * tensors["cotangents"]["c_n"].to(device)).sum()
    names = list(cast)
    gradients = torch.autograd.grad(total, [cast[name] for name in names])  # type: ignore[arg-type]
    return results | {f"d {name}": gradient for name, gradient in zip(names, gradients)}


def check_unrolled(device: str, dtype: torch.dtype, case: Case, tolerance: float) -> None:
    """Compares the steps with the float64 reference's."""
    tensors = make(case)
    for name, value in tensors["arguments"].items():
        tensors["arguments"][name] = value.to(dtype).double()
    truth = unrolled(device, torch.float64, case, tensors, dtype.itemsize > 2, "reference")
    found = unrolled(device, dtype, case, tensors, dtype.itemsize > 2, "triton")
    errors = {name: relative_error(found[name], truth[name]) for name in truth}
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, f"relative errors over {tolerance}: {wrong}"


def check_not_a_number(function: Callable[..., Any], dtype: torch.dtype, device: str, case: Case) -> None:
    """A pixel that is not a number makes what the reference makes of it: nothing is hidden."""
    a = {k: v.to(device, dtype) for k, v in make(case)["arguments"].items()}
    a["x"][0, 0, 0, 2, 2] = float("nan")
    args = (a["x"], None, a["weight_ih"], a["weight_hh"])
    truth, found = (call(*args, **case.options)[0].isnan() for call in (conv_lstm_reference, function))
    assert truth.any()
    assert found[truth].all()
