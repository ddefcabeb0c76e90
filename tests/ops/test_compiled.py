"""torch.compile sees one operator, whatever the number of steps, and the same numbers come out."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from convlstm_fish.layers import ConvLSTM
from convlstm_fish.ops.compiled import conv_lstm_compiled
from convlstm_fish.ops.equations import Norm, Weights
from convlstm_fish.ops.geometry import geometry
from convlstm_fish.ops.reference import Recipe

CASES: list[dict[str, Any]] = [
    {},
    {"peephole": (5, 6), "bidirectional": True, "num_layers": 2, "kernel_size": (2, 3), "lengths": [2, 6, 3]},
    {"return_sequences": False, "recurrent_activation": "hard_sigmoid", "bias": False},
    {"checkpoint_every": 2, "lengths": [2, 6, 3]},
    {"checkpoint_every": 4, "return_sequences": False, "bidirectional": True},
    {"norm": "group", "norm_groups": 2, "detach_every": 2},
    {"stride": 2, "dilation": 2, "padding": 3},
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def outputs_and_gradients(run: Any, layer: ConvLSTM, x: Tensor, lengths: Tensor | None) -> list[Tensor]:
    output, (h_n, c_n) = run(x, None, lengths)
    loss = output.square().sum() + h_n.sum() + c_n.square().sum()
    return [output, h_n, c_n, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_compiled_equals_eager_without_graph_breaks(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    options = dict(options)
    lengths = torch.tensor(options.pop("lengths")) if "lengths" in options else None
    layer = ConvLSTM(2, 4, options.pop("kernel_size", 3), dtype=torch.float64, **options)
    x = torch.randn(3, 6, 2, 5, 6, dtype=torch.float64).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = outputs_and_gradients(layer, layer, x, lengths)
    for one, other in zip(outputs_and_gradients(compiled, layer, x, lengths), expected):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        for one, other in zip(compiled(x, None, lengths)[1], layer(x, None, lengths)[1]):
            assert torch.equal(one, other)


def test_compiled_under_autocast() -> None:
    torch.manual_seed(0)
    layer = ConvLSTM(2, 4, 3)
    x = torch.randn(3, 6, 2, 5, 6).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_and_gradients(compiled, layer, x, None)
        expected = outputs_and_gradients(layer, layer, x, None)
    assert found[1].dtype == torch.bfloat16
    assert found[2].dtype == torch.float32
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=3e-2, atol=3e-2 * float(other.detach().abs().max()))


@pytest.mark.parametrize("steps", [3, 30])
def test_the_graph_does_not_grow_with_time(steps: int) -> None:
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph

    layer = ConvLSTM(2, 4, 3, num_layers=2)
    torch.compile(layer, backend=count, fullgraph=True)(torch.randn(2, steps, 2, 5, 6))
    assert len(graphs) == 1
    assert graphs[0] < 40


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck reads it
def test_the_operator_keeps_torchs_rules() -> None:
    """Schema, fake tensors and autograd registration, by torch.library.opcheck."""
    torch.manual_seed(0)
    seen: list[tuple[Any, ...]] = []
    operator = torch.ops.convlstm_fish.conv_lstm_reference

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is operator.default:
                seen.append(tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args))
            return func(*args, **(kwargs or {}))

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape).requires_grad_()

    where = geometry((5, 6), (3, 2))
    w = Weights(
        leaf(16, 2, 3, 2), leaf(16, 4, 3, 2), leaf(16), (leaf(4, 1, 1), leaf(4, 5, 6), leaf(4, 1, 1)), None, None
    )
    norm = Norm(1, 1, leaf(16), leaf(16), leaf(4), leaf(4))
    start = (leaf(3, 4, 5, 6), leaf(3, 4, 5, 6))
    with Spy():
        for weights, lengths, sequences, every in (
            (w, None, True, None),
            (w._replace(norm=norm, mask=leaf(3, 4, 5, 6)), torch.tensor([4, 1, 2]), False, 3),
        ):
            recipe = Recipe(where, "sigmoid", not sequences, None)
            conv_lstm_compiled(leaf(3, 4, 2, 5, 6), start, weights, recipe, lengths, sequences, every)
    assert len(seen) == 2
    for args in seen:
        wanted = tuple(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
        torch.library.opcheck(operator, wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit")  # by the compiler itself
def test_compile_time_is_flat_in_time() -> None:
    """Compiling for 1000 steps takes no longer than for 10, forward and backward, with the default compiler."""
    seconds = {}
    for steps in (5, 10, 100, 1000):  # the first warms the compiler up
        torch._dynamo.reset()
        layer = ConvLSTM(1, 4, 3)
        x = torch.randn(1, steps, 1, 4, 4)
        layer(x)[0].sum().backward()
        begin = time.perf_counter()
        layer(x)[0].sum().backward()
        eager = time.perf_counter() - begin
        compiled = torch.compile(layer, fullgraph=True)
        begin = time.perf_counter()
        compiled(x)[0].sum().backward()
        seconds[steps] = time.perf_counter() - begin - eager
    print(seconds)
    assert seconds[1000] < 2 * seconds[10] + 3.0
