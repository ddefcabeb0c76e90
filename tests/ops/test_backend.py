"""Which implementation runs, and what is said about it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import convlstm_fish.ops.backend as backend
from convlstm_fish.ops import conv_lstm, conv_lstm_reference, unroll, unroll_stack


def call() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "input": torch.randn(2, 3, 5, 6, 7),
        "hx": None,
        "weight_ih": torch.randn(12, 5, 3, 3),
        "weight_hh": torch.randn(12, 3, 3, 3),
    }


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_on_the_cpu_the_reference_runs_without_a_word(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        output, _ = conv_lstm(**call(), backend=name)
    assert torch.equal(output, conv_lstm_reference(**call())[0])
    assert not caplog.records


def test_a_named_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="backend='triton' cannot run this call"):
        conv_lstm(**{k: v.double() if v is not None else v for k, v in call().items()}, backend="triton")
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        conv_lstm(**call(), backend="triton")


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_what_does_not_fit_is_told_by_every_backend(name: str) -> None:
    with pytest.raises(TypeError, match=r"input must be floating point, got torch\.int64"):
        conv_lstm(**call() | {"input": torch.ones(2, 3, 5, 6, 7, dtype=torch.int64)}, backend=name)
    with pytest.raises(ValueError, match="detach_every must be at least 1 step, got 0"):
        conv_lstm(**call(), detach_every=0, backend=name)


@pytest.mark.gpu
def test_auto_says_once_that_it_falls_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    monkeypatch.setattr(backend, "_said", set())
    case = {k: None if v is None else v.cuda() for k, v in call().items()}
    for _ in range(3):
        conv_lstm(**case)
    assert [record.getMessage() for record in caplog.records] == [
        "the ConvLSTM runs on the reference backend, not on the Triton kernel: triton is not installed"
    ]


@pytest.mark.gpu
def test_auto_takes_the_kernel_where_it_can() -> None:
    case = {k: None if v is None else v.cuda().bfloat16() for k, v in call().items()}
    assert backend.triton_unsupported(*case.values()) is None
    by_kernel = conv_lstm(**case, backend="triton")[0]
    assert torch.equal(conv_lstm(**case)[0], by_kernel)
    assert torch.allclose(by_kernel, conv_lstm(**case, backend="reference")[0], atol=3e-2)


def test_a_stack_steps_as_its_layers_do() -> None:
    layers = [{"weight_ih": torch.randn(12, 3, 3, 3), "weight_hh": torch.randn(12, 3, 3, 3)} for _ in range(2)]
    x = h = torch.randn(1, 3, 4, 5)
    step, first, second = unroll_stack(layers), unroll(**layers[0]), unroll(**layers[1])
    states: Any = [None, None]
    hx: Any = [None, None]
    for number in range(3):
        output, states = step(x if number == 0 else None, states)
        hx[0] = first(h, hx[0])
        hx[1] = second(hx[0][0], hx[1])
        h = hx[1][0]
        assert torch.equal(output, h)
        assert all(torch.equal(a, b) for ours, theirs in zip(states, hx) for a, b in zip(ours, theirs))


def test_a_stack_refuses_what_it_cannot_step() -> None:
    layer = {"weight_ih": torch.rand(4, 1, 1, 1), "weight_hh": torch.rand(4, 1, 1, 1)}
    step = unroll_stack([layer])
    with pytest.raises(ValueError, match="one of each of the 1 layers, got 2"):
        step(torch.rand(1, 1, 2, 2), [None, None])
    with pytest.raises(ValueError, match="the last layer needs a state, got None"):
        step(None, [None])
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'fast'"):
        unroll_stack([layer | {"backend": "fast"}])
