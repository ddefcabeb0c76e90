"""The CPU's channels-last path against the reference: values, every gradient, and second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from convlstm_fish.ops import channels_last, conv_lstm, conv_lstm_reference
from convlstm_fish.ops.channels_last import conv_lstm_channels_last, covers

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one step of one pixel": {"steps": 1, "size": (1, 1), "kernel": (1, 1)},
    "stateless, no bias, valid, hard sigmoid": {
        "hx": False, "bias": False, "options": {"padding": "valid", "recurrent_activation": "hard_sigmoid"},
    },
    "even kernel": {"kernel": (2, 4), "options": {"recurrent_activation": "hard_sigmoid_v3"}},
    "more padding than kernel": {"options": {"padding": (2, 3)}},
    "backwards in time, dropout": {"mask": True, "options": {"reverse": True}},
    "last state only": {"options": {"return_sequences": False}},
    "last state only, backwards": {"hx": False, "options": {"return_sequences": False, "reverse": True}},
    "long and wide": {"steps": 23, "channels": 7, "hidden": 9, "size": (3, 11), "kernel": (3, 5)},
}  # fmt: skip


def make(
    steps: int = 4, channels: int = 3, hidden: int = 5, size: tuple[int, int] = (6, 7),
    kernel: tuple[int, int] = (3, 3), hx: bool = True, bias: bool = True, mask: bool = False,
    options: dict[str, Any] | None = None,
) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Any]]:  # fmt: skip
    """Leaves by name, the mask, and the options of a call."""
    torch.manual_seed(3)
    options = options or {}
    clips = 2
    leaves = {
        "x": torch.randn(clips, steps, channels, *size),
        "weight_ih": torch.randn(4 * hidden, channels, *kernel) / 4,
        "weight_hh": torch.randn(4 * hidden, hidden, *kernel) / 4,
    }
    with torch.no_grad():
        _, (h, _) = conv_lstm_reference(leaves["x"], None, leaves["weight_ih"], leaves["weight_hh"], **options)
    if hx:
        leaves |= {"h_0": torch.randn(h.shape).tanh(), "c_0": torch.randn(h.shape)}
    if bias:
        leaves["bias"] = torch.randn(4 * hidden)
    return leaves, (torch.rand(h.shape) > 0.3) / 0.7 if mask else None, options


def call(function: Any, leaves: dict[str, Tensor], mask: Tensor | None, options: dict[str, Any]) -> dict[str, Tensor]:
    """What a call returns, by name."""
    hx = (leaves["h_0"], leaves["c_0"]) if "h_0" in leaves else None
    args = (leaves["x"], hx, leaves["weight_ih"], leaves["weight_hh"], leaves.get("bias"))
    output, (h_n, c_n) = function(*args, recurrent_mask=mask, **options)
    return {k: v for k, v in {"output": output, "h_n": h_n, "c_n": c_n}.items() if v is not None}


def gradients(values: dict[str, Tensor], leaves: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Gradients of the sum of all values with weights of their own."""
    random = torch.Generator().manual_seed(5)
    total = sum((v * torch.randn(v.shape, generator=random, dtype=torch.float64)).sum() for v in values.values())
    wanted = {k: v for k, v in leaves.items() if v.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()), **options)))


@pytest.mark.parametrize("frozen", [(), ("x",), ("x", "h_0", "c_0"), ("weight_ih", "bias")])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("for_avx2", [False, True])
def test_values_and_gradients_of_the_reference(
    for_avx2: bool, name: str, frozen: tuple[str, ...], poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for choice in ("_by_planes", "_in_reverse"):
        monkeypatch.setattr(channels_last, choice, lambda _: for_avx2)
    leaves, mask, options = make(**CASES[name])
    leaves = {k: v.double().requires_grad_(k not in frozen) for k, v in leaves.items()}
    mask = None if mask is None else mask.double()
    args = (leaves["x"], None, leaves["weight_ih"], leaves["weight_hh"])
    assert covers(*args, recurrent_mask=mask, **options)
    ours, truth = (call(function, leaves, mask, options) for function in (conv_lstm_channels_last, conv_lstm_reference))
    assert type(ours["h_n"].grad_fn).__name__ == "_ChannelsLastBackward"
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients(ours, leaves), gradients(truth, leaves), rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(call(conv_lstm_channels_last, leaves, mask, options), truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("only", ["output", "h_n", "c_n"])
def test_one_result_alone_may_be_used(only: str) -> None:
    leaves, _, options = make()
    leaves = {k: v.double().requires_grad_() for k, v in leaves.items()}
    ours, truth = ({only: call(f, leaves, None, options)[only]} for f in (conv_lstm_channels_last, conv_lstm_reference))
    torch.testing.assert_close(gradients(ours, leaves), gradients(truth, leaves), rtol=1e-11, atol=1e-12)


def test_second_derivatives() -> None:
    leaves, mask, options = make(**CASES["backwards in time, dropout"])
    leaves = {k: v.double().requires_grad_() for k, v in leaves.items()}
    found = []
    for function in (conv_lstm_channels_last, conv_lstm_reference):
        first = gradients(call(function, leaves, mask, options), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in first.values())
        found.append(dict(zip(leaves, torch.autograd.grad(penalty, list(leaves.values())))))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_gradients_that_can_be_differentiated_of_a_sequence_in_pieces() -> None:
    """The second piece starts from a state that the same weights made, which are not to be counted twice."""
    leaves, mask, options = make(hx=False)
    leaves = {k: v.double().requires_grad_() for k, v in leaves.items()}
    found = []
    for function in (conv_lstm_channels_last, conv_lstm_reference):
        head, tail = ({**leaves, "x": x} for x in leaves["x"].split(2, dim=1))
        first = call(function, head, mask, options)
        second = call(function, {**tail, "h_0": first["h_n"], "c_0": first["c_n"]}, mask, options)
        once = gradients(second, leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in once.values())
        found.append((once, torch.autograd.grad(penalty, list(leaves.values()))))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_autocast_keeps_c_and_the_gradients_wide() -> None:
    leaves, mask, options = make(steps=6)
    truth_leaves = {k: v.double().requires_grad_() for k, v in leaves.items()}
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    with torch.autocast("cpu", torch.bfloat16):
        ours = call(conv_lstm_channels_last, leaves, mask, options)
    assert [ours[k].dtype for k in ("output", "h_n", "c_n")] == [torch.bfloat16, torch.bfloat16, torch.float32]
    truth = call(conv_lstm_reference, truth_leaves, mask, options)
    pairs = [(ours[k], truth[k]) for k in truth]
    ours_d, truth_d = gradients(ours, leaves), gradients(truth, truth_leaves)
    assert all(g.dtype == torch.float32 for g in ours_d.values())
    pairs += [(ours_d[k], truth_d[k]) for k in truth_d]
    for value, right in pairs:
        assert float((value.detach().double() - right.detach()).norm() / right.detach().norm()) < 2e-2


def test_outputs_may_be_changed_in_place() -> None:
    leaves, mask, options = make()
    leaves = {k: v.double().requires_grad_() for k, v in leaves.items()}
    found = []
    for function in (conv_lstm_channels_last, conv_lstm_reference):
        values = call(function, leaves, mask, options)
        torch.nn.functional.relu_(values["output"])
        values["h_n"].mul_(2)
        values["c_n"].add_(1)
        found.append(gradients(values, leaves))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_a_strided_clip_and_one_laid_out_channels_last() -> None:
    leaves, mask, options = make()
    video = torch.randn(2, 8, 3, 12, 14)[:, ::2, :, ::2, ::2]
    last = video.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    truth = call(conv_lstm_reference, {**leaves, "x": video}, mask, options)
    for x in (video, last):
        torch.testing.assert_close(
            call(conv_lstm_channels_last, {**leaves, "x": x}, mask, options), truth, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"stride": 2}, (2, 4, 3, 6, 7)),
        ({"dilation": (1, 2)}, (2, 4, 3, 6, 7)),
        ({"lengths": torch.tensor([4, 2])}, (2, 4, 3, 6, 7)),
        ({"checkpoint_every": 2}, (2, 4, 3, 6, 7)),
        ({"detach_every": 2}, (2, 4, 3, 6, 7)),
        ({}, (2, 4, 3, 6)),
    ],
)
def test_what_it_does_not_cover_goes_to_the_reference(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kernel = (3,) * (len(shape) - 3)
    x, w_x, w_h = torch.randn(shape), torch.randn(20, 3, *kernel), torch.randn(20, 5, *kernel)
    assert not covers(x, None, w_x, w_h, **options)
    ours, truth = (function(x, None, w_x, w_h, **options) for function in (conv_lstm, conv_lstm_reference))
    torch.testing.assert_close(ours, truth, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("clips", "size", "hidden", "taken"), [(4, 48, 16, True), (1, 8, 16, False), (2, 16, 128, False)]
)
def test_auto_takes_it_where_it_pays(clips: int, size: int, hidden: int, taken: bool) -> None:
    x = torch.randn(clips, 1, 4, size, size)
    w_x, w_h = torch.randn(4 * hidden, 4, 5, 5, requires_grad=True), torch.randn(4 * hidden, hidden, 5, 5)
    for backend, wanted in (("auto", taken), ("reference", False)):
        _, (h, _) = conv_lstm(x, None, w_x, w_h, backend=backend)
        assert (type(h.grad_fn).__name__ == "_ChannelsLastBackward") is wanted
