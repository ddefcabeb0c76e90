"""One step, its gates, and how a cell starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convlstm_fish import ConvLSTM, ConvLSTMCell


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"peephole": (5, 6), "stride": 2},
        {"padding": "valid", "norm": "layer"},
        {"recurrent_activation": "hard_sigmoid"},
    ],
    ids=str,
)
def test_steps_are_the_layers_steps(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = ConvLSTM(3, 4, 3, dtype=torch.float64, **options)
    cell = layer.cells[0]
    x = torch.randn(2, 5, 3, 5, 6, dtype=torch.float64)
    output, (_, c_n) = layer(x)
    state = None
    for t in range(5):
        made = cell.gates(x[:, t], state)
        state = cell(x[:, t], state)
        assert torch.allclose(state[0], output[:, t], rtol=1e-10, atol=1e-12)
        assert torch.allclose(made["h"], state[0], rtol=1e-10, atol=1e-12)
        assert torch.allclose(made["c"], state[1], rtol=1e-10, atol=1e-12)
        for name in "ifo":
            assert made[name].min() >= 0
            assert made[name].max() <= 1
    assert torch.allclose(state[1], c_n[0], rtol=1e-10, atol=1e-12)


def test_gates_make_the_state() -> None:
    """c = f c + i g, h = o tanh(c), and swapped kernels swap the gates."""
    torch.manual_seed(0)
    cell = ConvLSTMCell(3, 4, 3, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    state = (torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(2, 4, 5, 6, dtype=torch.float64))
    made = cell.gates(x, state)
    assert torch.allclose(made["c"], made["f"] * state[1] + made["i"] * made["g"])
    assert torch.allclose(made["h"], made["o"] * made["c"].tanh())
    with torch.no_grad():
        for weight in (cell.weight_ih, cell.weight_hh, cell.bias):
            weight.copy_(torch.cat([weight[12:], weight[4:12], weight[:4]]))
    swapped = cell.gates(x, state)
    assert torch.equal(swapped["i"], made["o"])
    assert torch.equal(swapped["o"], made["i"])


def test_one_frame_without_a_batch() -> None:
    cell = ConvLSTMCell(3, 4, 3)
    x, state = torch.randn(1, 3, 5, 6), (torch.randn(1, 4, 5, 6), torch.randn(1, 4, 5, 6))
    h, c = cell(x[0], (state[0][0], state[1][0]))
    assert torch.equal(h, cell(x, state)[0][0])
    assert torch.equal(c, cell(x, state)[1][0])
    with pytest.raises(ValueError, match=r"x must be \(N, 3, \*spatial\) with 2 spatial dimensions, got \(5, 6\)"):
        cell(x[0, 0])
    with pytest.raises(ValueError, match=r"x must have in_channels=3 channels, got shape \(1, 2, 5, 6\)"):
        cell(x[:, :2])


def test_shapes_of_the_parameters() -> None:
    cell = ConvLSTMCell(3, 4, (5, 2), peephole=(8, 9), padding="valid", stride=2, norm="group", norm_groups=2)
    assert {name: tuple(p.shape) for name, p in cell.named_parameters()} == {
        "weight_ih": (16, 3, 5, 2),
        "weight_hh": (16, 4, 5, 2),
        "bias": (16,),
        "weight_ci": (4, 2, 4),
        "weight_cf": (4, 2, 4),
        "weight_co": (4, 2, 4),
        "norm_ih": (16,),
        "norm_hh": (16,),
        "norm_c": (4,),
        "norm_c_bias": (4,),
    }
    assert cell(torch.zeros(1, 3, 8, 9))[0].shape == (1, 4, 2, 4)
    with pytest.raises(ValueError, match=r"weight_ci must have shape .* got \(4, 2, 4\)"):
        cell(torch.zeros(1, 3, 10, 9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_starts_in_every_dtype(dtype: torch.dtype) -> None:
    cell = ConvLSTMCell(3, 4, 3, peephole="channel", dtype=dtype)
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in cell.parameters())
    assert cell.bias.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 8
    assert cell.weight_ci.eq(0).all()
    assert ConvLSTMCell(3, 4, 3, unit_forget_bias=False).bias.eq(0).all()
    before = cell.weight_hh.clone()
    cell.reset_parameters()
    assert not torch.equal(before, cell.weight_hh)


def test_the_meta_device_makes_no_memory() -> None:
    cell = ConvLSTMCell(3, 4, 3, peephole="channel", norm="layer", device="meta")
    assert all(p.is_meta for p in cell.parameters())
    cell.to_empty(device="cpu").reset_parameters()
    assert all(torch.isfinite(p).all() for p in cell.parameters())
