"""ConvLSTM against Keras 3's ConvLSTM1D, 2D and 3D on its torch backend, in float64: values and all gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from convlstm_fish import ConvLSTM

keras = pytest.importorskip("keras")

N, T, C, HIDDEN = 2, 4, 3, 2


def keras_2_hard_sigmoid(x: Any) -> Any:
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)


def keras_3_hard_sigmoid(x: Any) -> Any:
    """As Keras writes it. Its torch backend calls torch's hardsigmoid, whose gradient has 1/6 in float32 only."""
    return keras.ops.relu6(x + 3.0) / 6.0


ACTIVATIONS = {"sigmoid": "sigmoid", "hard_sigmoid": keras_2_hard_sigmoid, "hard_sigmoid_v3": keras_3_hard_sigmoid}


def test_keras_3_hard_sigmoid_is_keras_3s() -> None:
    z = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert torch.allclose(keras_3_hard_sigmoid(z), keras.activations.hard_sigmoid(z), rtol=1e-12, atol=0)


def from_keras(kernel: Tensor) -> Tensor:
    """(*kernel, in, 4 * out) to (4 * out, in, *kernel)."""
    return kernel.permute(-1, -2, *range(kernel.dim() - 2))


def twins(size: tuple[int, ...], kernel: Any, **options: Any) -> tuple[Any, ConvLSTM]:
    """A Keras layer with random weights, bias included, and ours with the same ones."""
    names = {"stride": "strides", "dilation": "dilation_rate", "bias": "use_bias"}
    keras_options = {names.get(k, k): v for k, v in options.items()}
    activation = options.get("recurrent_activation", "sigmoid")
    keras_options["recurrent_activation"] = ACTIVATIONS[activation]
    judge = getattr(keras.layers, f"ConvLSTM{len(size)}D")(
        HIDDEN,
        kernel,
        **{"padding": "same", "return_sequences": True, **keras_options},
        return_state=True,
        dtype="float64",
    )
    judge.build((N, T, *size, C))
    generator = np.random.default_rng(1)
    for weight in judge.cell.weights:
        weight.assign(generator.normal(size=weight.shape) * 0.5)
    ours = {k: v for k, v in options.items() if k not in ("go_backwards", "stateful")}
    layer = ConvLSTM(C, HIDDEN, kernel, spatial_dims=len(size), dtype=torch.float64, **ours)
    cell = layer.cells[0]
    with torch.no_grad():
        cell.weight_ih.copy_(from_keras(judge.cell.kernel.value))
        cell.weight_hh.copy_(from_keras(judge.cell.recurrent_kernel.value))
        if cell.bias is not None:
            cell.bias.copy_(judge.cell.bias.value)
    return judge, layer


def clips(size: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, T, C, *size, generator=generator, dtype=torch.float64).requires_grad_()


def judge_all(judge: Any, layer: ConvLSTM, found: list[Tensor], expected: list[Tensor], leaves: list[Tensor]) -> None:
    """Values equal; and gradients of all weights and of ``leaves`` equal for random cotangents of everything."""
    generator = torch.Generator().manual_seed(7)
    loss, judged_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for one, other in zip(found, expected):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
        cotangent = torch.randn(one.shape, generator=generator, dtype=torch.float64)
        loss, judged_loss = loss + (one * cotangent).sum(), judged_loss + (other * cotangent).sum()
    judged_weights = [w.value for w in judge.trainable_weights]
    cell = layer.cells[0]
    weights = [cell.weight_ih, cell.weight_hh] + ([] if cell.bias is None else [cell.bias])
    grads = torch.autograd.grad(loss, [*weights, *leaves])
    judged = list(torch.autograd.grad(judged_loss, [*judged_weights, *leaves]))
    judged[:2] = [from_keras(g) for g in judged[:2]]
    for one, other in zip(grads, judged):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((6, 7), 3, {}),
        ((6, 7), 3, {"padding": "valid"}),
        ((6, 7), (2, 4), {}),
        ((6, 7), (2, 4), {"padding": "valid", "bias": False}),
        ((6, 7), 3, {"stride": 2}),
        ((7, 6), (3, 4), {"stride": (3, 2)}),
        ((6, 7), 3, {"stride": 2, "padding": "valid"}),
        ((6, 7), 3, {"dilation": 2}),
        ((6, 7), (2, 3), {"dilation": 2, "padding": "valid"}),
        ((6, 7), 3, {"recurrent_activation": "hard_sigmoid"}),
        ((6, 7), 3, {"recurrent_activation": "hard_sigmoid_v3", "padding": "valid"}),
        ((9,), 3, {}),
        ((9,), 4, {"stride": 2}),
        ((9,), 2, {"dilation": 3, "padding": "valid", "recurrent_activation": "hard_sigmoid"}),
        ((3, 4, 5), 3, {}),
        ((4, 3, 5), (2, 1, 3), {"stride": (2, 1, 2)}),
        ((4, 3, 5), (2, 3, 2), {"padding": "valid", "bias": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("sequences", [True, False])
def test_values_and_gradients(size: tuple[int, ...], kernel: Any, options: dict[str, Any], sequences: bool) -> None:
    judge, layer = twins(size, kernel, return_sequences=sequences, **options)
    x = clips(size)
    output, (h_n, c_n) = layer(x)
    channel = 2 if sequences else 1
    found = [output.movedim(channel, -1), h_n[0].movedim(1, -1), c_n[0].movedim(1, -1)]
    judge_all(judge, layer, found, list(judge(x.movedim(2, -1))), [x])


def test_initial_state() -> None:
    judge, layer = twins((6, 7), 3)
    x = clips((6, 7))
    state = [torch.randn(N, 6, 7, HIDDEN, dtype=torch.float64).requires_grad_() for _ in range(2)]
    output, (h_n, c_n) = layer(x, tuple(s.movedim(-1, 1)[None] for s in state))
    expected = judge(x.movedim(2, -1), initial_state=state)
    found = [output.movedim(2, -1), h_n[0].movedim(1, -1), c_n[0].movedim(1, -1)]
    judge_all(judge, layer, found, list(expected), [x, *state])


def test_stateful_is_carried_state() -> None:
    judge, layer = twins((6, 7), 3, stateful=True)
    state = None
    for seed in range(3):
        x = clips((6, 7), seed).detach()
        output, state = layer(x, state)
        expected = judge(x.movedim(2, -1))
        for one, other in zip(
            (output.movedim(2, -1), state[0][0].movedim(1, -1), state[1][0].movedim(1, -1)), expected
        ):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_go_backwards_is_the_reverse_direction() -> None:
    """Keras hands the steps out in the order in which it computed them, we in the order of time."""
    judge, layer = twins((6, 7), 3, go_backwards=True)
    x = clips((6, 7))
    output, (h_n, c_n) = layer.cells[0].sequence(x, reverse=True)
    found = [output.flip(1).movedim(2, -1), h_n.movedim(1, -1), c_n.movedim(1, -1)]
    judge_all(judge, layer, found, list(judge(x.movedim(2, -1))), [x])


@pytest.mark.parametrize("lengths", [None, [2, 4]], ids=["full", "lengths"])
@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("size", [(9,), (6, 7), (3, 4, 5)], ids=["1D", "2D", "3D"])
def test_bidirectional_and_lengths(size: tuple[int, ...], sequences: bool, lengths: list[int] | None) -> None:
    """Keras masks steps: it carries the state over them, where we compute nothing and put out zeros."""
    kind = getattr(keras.layers, f"ConvLSTM{len(size)}D")
    one_way = kind(HIDDEN, 3, padding="same", return_sequences=sequences, return_state=True, dtype="float64")
    judge = keras.layers.Bidirectional(one_way, dtype="float64")
    judge.build((N, T, *size, C))
    layer = ConvLSTM(
        C, HIDDEN, 3, spatial_dims=len(size), bidirectional=True, return_sequences=sequences, dtype=torch.float64
    )
    generator = np.random.default_rng(1)
    parts = (judge.forward_layer, judge.backward_layer)
    for weight in (w for part in parts for w in part.cell.weights):
        weight.assign(generator.normal(size=weight.shape) * 0.5)
    with torch.no_grad():
        for cell, part in zip(layer.cells, parts):
            for ours, theirs in zip((cell.weight_ih, cell.weight_hh), part.cell.weights):
                ours.copy_(from_keras(theirs.value))
            cell.bias.copy_(part.cell.bias.value)
    x = clips(size)
    there = torch.ones(N, T, dtype=torch.bool) if lengths is None else torch.arange(T) < torch.tensor(lengths)[:, None]
    output, (h_n, c_n) = layer(x, None, lengths)
    expected, *states = judge(x.movedim(2, -1), mask=None if lengths is None else there)
    if sequences:
        assert output[~there].eq(0).all()
        output, expected = output.movedim(2, -1)[there], expected[there]
    else:
        output = output.movedim(1, -1)
    found = [output, *(state[k].movedim(1, -1) for k in (0, 1) for state in (h_n, c_n))]
    expected = [expected, *states]
    cotangents = [torch.randn_like(y) for y in found]
    for one, other in zip(found, expected):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    inputs = [x, *(p for cell in layer.cells for p in (cell.weight_ih, cell.weight_hh, cell.bias))]
    judged = [x, *(w.value for part in parts for w in part.cell.weights)]
    grads = torch.autograd.grad(sum((y * g).sum() for y, g in zip(found, cotangents)), inputs)
    theirs = torch.autograd.grad(sum((y * g).sum() for y, g in zip(expected, cotangents)), judged)
    for one, other in zip(grads, theirs):
        other = other if other.shape == one.shape else from_keras(other)
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_starts_as_keras_starts() -> None:
    """The same distributions: Glorot's limit, orthogonal columns in Keras's layout, forget bias 1."""
    judge = keras.layers.ConvLSTM2D(8, (3, 5))
    judge.build((None, T, 6, 7, C))
    cell = ConvLSTM(C, 8, (3, 5)).cells[0]
    kernel, recurrent, bias = (w.value.detach() for w in judge.cell.weights)
    limit = (6 / (3 * 5 * (C + 32))) ** 0.5
    for weight in (kernel, cell.weight_ih.detach()):
        assert weight.abs().max() <= limit
        assert weight.abs().max() > 0.98 * limit
        assert abs(weight.var().item() / (limit**2 / 3) - 1) < 0.1
    ours = cell.weight_hh.detach().permute(2, 3, 1, 0).reshape(-1, 32)
    for matrix in (recurrent.reshape(-1, 32), ours):
        assert torch.allclose(matrix.T @ matrix, torch.eye(32), atol=1e-5)
    assert torch.equal(cell.bias, bias)


def test_dropout_is_where_keras_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras with our masks, at every gate and step, gives our values and gradients."""
    judge, layer = twins((6, 7), 3, dropout=0.4, recurrent_dropout=0.3)
    ones = torch.ones(N, 6, 7, C, dtype=torch.float64)
    drawn = judge.cell.get_dropout_mask(ones)[0]
    judge.cell.reset_dropout_mask()
    x = clips((6, 7))
    masks: list[Tensor] = []
    real = torch.nn.functional.dropout

    def spy(*args: Any) -> Tensor:
        masks.append(real(*args))
        return masks[-1]

    monkeypatch.setattr(torch.nn.functional, "dropout", spy)
    output, (h_n, c_n) = layer(x)
    monkeypatch.undo()
    of_x, of_h = masks[0][:, 0].movedim(1, -1), masks[1].movedim(1, -1)
    assert torch.allclose(of_x.unique(), drawn.unique()), "the same two values"
    assert of_x.shape == drawn.shape, "one for each element of a frame"
    judge.cell.get_dropout_mask = lambda _: [of_x] * 4
    judge.cell.get_recurrent_dropout_mask = lambda _: [of_h] * 4
    expected = judge(x.movedim(2, -1), training=True)
    judge_all(judge, layer, [output.movedim(2, -1), h_n[0].movedim(1, -1), c_n[0].movedim(1, -1)], list(expected), [x])
