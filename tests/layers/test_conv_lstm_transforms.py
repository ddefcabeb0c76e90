"""ConvLSTM under torch.export, whose programs need nothing of this package, and under the transforms of torch.func."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from convlstm_fish import ConvLSTM


def test_exports_without_this_package() -> None:
    torch.manual_seed(0)
    layer = ConvLSTM(2, 3, (2, 3), 2, bidirectional=True, peephole="channel", dtype=torch.float64).eval()
    x = torch.randn(3, 4, 2, 6, 5, dtype=torch.float64)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: auto, 3: auto, 4: auto},))
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert not any("convlstm_fish" in str(target) for target in targets)
    y = torch.randn(5, 4, 2, 7, 9, dtype=torch.float64)
    assert torch.allclose(program.module()(y)[0], layer(y)[0], rtol=1e-10, atol=1e-12)


def test_exports_with_lengths() -> None:
    torch.manual_seed(0)
    layer = ConvLSTM(2, 3, 3, bidirectional=True, dtype=torch.float64).eval()
    x = torch.randn(3, 4, 2, 6, 5, dtype=torch.float64)
    program = torch.export.export(layer, (x, None, torch.tensor([4, 4, 4]))).module()
    lengths = torch.tensor([3, 1, 4])
    x[1, 1:] = float("nan")
    output, states = layer(x, None, lengths)
    exported, exported_states = program(x, None, lengths)
    for one, other in zip((exported, *exported_states), (output, *states)):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func.jacfwd itself
def test_works_under_torch_func() -> None:
    torch.manual_seed(0)
    layer = ConvLSTM(2, 3, 3, peephole="channel", dtype=torch.float64)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(4, 3, 2, 3, 2, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], clip: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (clip[None],))[0].square().sum()

    per_clip = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for name, p in layer.named_parameters():
        (expected,) = torch.autograd.grad(layer(x)[0].square().sum(), [p])
        assert torch.allclose(per_clip[name].sum(0), expected, rtol=1e-10, atol=1e-12)
    of_clip = torch.func.jacrev(loss, argnums=1)(weights, x[0])
    assert torch.allclose(of_clip, torch.func.jacfwd(loss, argnums=1)(weights, x[0]), rtol=1e-10, atol=1e-12)
    hessian = torch.func.hessian(loss, argnums=1)(weights, x[0, :2]).reshape(24, 24)
    assert torch.allclose(hessian, hessian.T, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func.jvp itself
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"norm": "group", "norm_groups": 3}], ids=str)
def test_forward_mode_and_ensembles(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layers = [ConvLSTM(2, 3, 3, dtype=torch.float64, **options) for _ in range(3)]
    x = torch.randn(4, 3, 2, 4, 2, dtype=torch.float64)
    lengths = torch.tensor([3, 1, 2, 3])
    weights, _ = torch.func.stack_module_state(layers)  # type: ignore[arg-type]
    skeleton = copy.deepcopy(layers[0]).to("meta")

    def run(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(skeleton, weights, (x, None, lengths))[0]

    for layer, output in zip(layers, torch.func.vmap(run)(weights)):
        assert torch.allclose(layer(x, None, lengths)[0], output, rtol=1e-10, atol=1e-12)
    tangent, cotangent = torch.randn_like(x), torch.randn(4, 3, layers[0](x)[0].shape[2], 4, 2, dtype=torch.float64)

    def of_clip(x: Tensor) -> Tensor:
        return layers[0](x, None, lengths)[0]

    forwards = (torch.func.jvp(of_clip, (x,), (tangent,))[1] * cotangent).sum()
    backwards = (torch.func.vjp(of_clip, x)[1](cotangent)[0] * tangent).sum()
    assert torch.allclose(forwards, backwards, rtol=1e-10, atol=1e-12)


def test_checkpoints_do_not_stand_in_the_way_of_torch_func() -> None:
    torch.manual_seed(0)
    layer = ConvLSTM(2, 3, 3, checkpoint_every=2, dtype=torch.float64)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(4, 5, 2, 3, 2, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], clip: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (clip[None],))[0].square().sum()

    per_clip = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    layer(x)[0].square().sum().backward()
    for name, p in layer.named_parameters():
        assert torch.allclose(per_clip[name].sum(0), p.grad, rtol=1e-10, atol=1e-12)
