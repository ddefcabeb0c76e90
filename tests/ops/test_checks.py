"""Every call that is not documented is refused, with the value named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convlstm_fish.ops import conv_lstm
from convlstm_fish.ops.equations import Norm

x = torch.zeros


def good() -> dict[str, Any]:
    """A call that runs."""
    return {"input": x(2, 3, 5, 6, 7), "hx": None, "weight_ih": x(12, 5, 3, 3), "weight_hh": x(12, 3, 3, 3)}


def test_the_good_call_runs() -> None:
    output, (h_n, c_n) = conv_lstm(**good())
    assert output.shape == (2, 3, 3, 6, 7)
    assert h_n.shape == c_n.shape == (2, 3, 6, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": x(2, 3, 5)}, r"1 to 3 spatial dimensions, got \(2, 3, 5\)"),
        ({"input": x(2, 3, 5, 1, 1, 1, 1)}, r"1 to 3 spatial dimensions"),
        ({"input": x(2, 0, 5, 6, 7)}, r"at least one clip of one step, got shape \(2, 0, 5, 6, 7\)"),
        ({"input": x(0, 3, 5, 6, 7)}, r"at least one clip of one step, got shape \(0, 3, 5, 6, 7\)"),
        ({"weight_ih": x(12, 4, 3, 3)}, r"weight_ih must have shape \(4 \* hidden_channels, 5, .* got \(12, 4, 3, 3\)"),
        ({"weight_ih": x(10, 5, 3, 3)}, r"weight_ih must .* got \(10, 5, 3, 3\)"),
        ({"weight_ih": x(12, 5, 3)}, r"2 kernel sizes, got \(12, 5, 3\)"),
        ({"weight_hh": x(12, 4, 3, 3)}, r"weight_hh must .* \(12, 3, \.\.\.\) .* got \(12, 4, 3, 3\)"),
        ({"bias": x(3)}, r"bias must have shape \(4 \* hidden_channels,\) = \(12,\), got \(3,\)"),
        (
            {"weight_hh": x(12, 3, 3, 3).double()},
            r"weight_hh is torch.float64 and input torch.float32: cast one of them",
        ),
        ({"bias": x(12).bfloat16()}, r"bias is torch.bfloat16 and input torch.float32"),
        ({"recurrent_activation": "relu"}, r"recurrent_activation must be one of .* got 'relu'"),
        ({"padding": "full"}, r"padding must be \"same\", \"valid\" or ints, got 'full'"),
        ({"padding": -1}, r"padding must be an int >= 0 or 2 of them, got -1"),
        ({"padding": (1, 1, 1)}, r"padding must be an int >= 0 or 2 of them, got \(1, 1, 1\)"),
        ({"stride": 0}, r"stride must be an int >= 1 or 2 of them, got 0"),
        ({"dilation": (1, 0)}, r"dilation must be an int >= 1 or 2 of them, got \(1, 0\)"),
        ({"padding": "valid", "dilation": 3}, r"frames of size \(6, 7\) are too small for kernel_size \(3, 3\)"),
        ({"peephole": (x(3, 1, 1),)}, r"peephole must be \(weight_ci, weight_cf, weight_co\), got 1"),
        ({"peephole": (x(3, 1, 1), x(3, 6, 7), x(3, 7, 6))}, r"weight_co must have shape .* got \(3, 7, 6\)"),
        ({"hx": x(2, 3, 6, 7)}, r"hx must be \(h_0, c_0\)"),
        ({"hx": (x(2, 3, 6, 7), x(1, 3, 6, 7))}, r"c_0 must have shape .* = \(2, 3, 6, 7\), got \(1, 3, 6, 7\)"),
        ({"hx": (x(2, 3, 6, 6), x(2, 3, 6, 7))}, r"h_0 must have shape .* got \(2, 3, 6, 6\)"),
        ({"recurrent_mask": x(2, 3, 1, 1)}, r"recurrent_mask must have shape .* got \(2, 3, 1, 1\)"),
        ({"weight_hh": x(12, 3, 3, 3, device="meta")}, r"weight_hh is on meta and input on cpu: move one of them"),
        ({"hx": (x(2, 3, 6, 7), x(2, 3, 6, 7, device="meta"))}, r"c_0 is on meta and input on cpu: move one"),
        ({"lengths": torch.tensor([1, 2, 3])}, r"lengths must be .* of shape \(2,\), got torch.int64 \(3,\)"),
        ({"lengths": torch.tensor([1.0, 2.0])}, r"lengths must be a whole-number tensor .* got torch.float32"),
        ({"lengths": [1, 2]}, r"lengths must be a whole-number tensor .* got \[1, 2\]"),
        ({"lengths": torch.tensor([0, 2])}, r"lengths must lie in 1\.\.3 \(the steps of input\), got 0"),
        ({"lengths": torch.tensor([1, 4])}, r"lengths must lie in 1\.\.3 \(the steps of input\), got 4"),
        ({"checkpoint_every": 0}, r"checkpoint_every must be at least 1 step, got 0"),
        ({"detach_every": -2}, r"detach_every must be at least 1 step, got -2"),
        ({"norm": Norm(5, 1, x(12), x(12), x(3), x(3))}, r"norm groups must divide the channels: 5 of 12"),
        ({"norm": Norm(1, 1, x(12), x(3), x(3), x(3))}, r"norm\.weight_hh must have shape .* = \(12,\), got \(3,\)"),
        ({"backend": "cuda"}, r"backend must be one of .* got 'cuda'"),
    ],
    ids=lambda v: str(v)[:60] if isinstance(v, str) else next(iter(v)),
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_lstm(**good() | change)


def test_refuses_whole_numbers() -> None:
    with pytest.raises(TypeError, match=r"input must be floating point, got torch\.uint8"):
        conv_lstm(**good() | {"input": torch.zeros(2, 3, 5, 6, 7, dtype=torch.uint8)})
