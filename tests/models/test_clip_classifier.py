"""ClipClassifier against the same layers written out, and its options one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlstm_fish import ClipClassifier, ConvLSTM

VIDEO = (2, 4, 3, 12, 14)


def video(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(VIDEO, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(**options: Any) -> ClipClassifier:
    torch.manual_seed(0)
    return ClipClassifier(3, **{"hidden_channels": (4, 5), **options}).double()


def test_is_the_layers_in_their_order() -> None:
    """ConvLSTM, max pool, batch norm, ConvLSTM, last step, global max, linear."""
    model = network(padding="valid", bias=False, recurrent_activation="hard_sigmoid")
    first, second = model.layers
    x = video()
    with torch.no_grad():
        model.norms[0].running_mean.normal_()
        model.norms[0].running_var.uniform_(0.5, 2)
    model.eval()
    y = first(x)[0]
    y = torch.stack([F.max_pool2d(y[:, t], 2) for t in range(4)], dim=1)
    norm = model.norms[0]
    y = (y - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + 1e-3).sqrt()
    second.return_sequences = True
    y = second(y)[0][:, -1]
    second.return_sequences = False
    expected = F.linear(y.flatten(2).max(2).values, model.classifier.weight, model.classifier.bias)
    assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():  # pool and norm go together
        assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-12)
        seen = []
        model.pools[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
        assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-12)
        assert seen == [(8, 4, 5, 6)]
    assert not list(model.norms[0].parameters()), "no scale, no shift"
    assert (norm.eps, norm.momentum) == (1e-3, 0.01)


def test_stem_dense_layers_and_flatten() -> None:
    model = network(
        stem_channels=(6, 7),
        head="flatten",
        image_size=VIDEO[3:],
        dense_features=(8, 9),
        num_classes=10,
        pool_size=[2, 3],
    )
    x = video()
    model.eval()
    frames = x.flatten(0, 1)
    for convolution in (m for m in model.stem.modules() if isinstance(m, nn.Conv2d)):
        frames = F.relu(F.conv2d(frames, convolution.weight, convolution.bias, padding=1))
    y = frames.unflatten(0, VIDEO[:2])
    y = model.layers[0](y)[0].flatten(0, 1)
    y = F.batch_norm(F.max_pool2d(y, 2), model.norms[0].running_mean, model.norms[0].running_var, eps=1e-3)
    y = F.max_pool2d(model.layers[1](y.unflatten(0, VIDEO[:2]))[0], 3).flatten(1)
    assert y.shape == (2, 5 * 2 * 2)
    for linear in (m for m in model.dense if isinstance(m, nn.Linear)):
        y = F.relu(linear(y))
    assert torch.allclose(model(x), model.classifier(y), rtol=1e-10, atol=1e-12)
    assert model(x).shape == (2, 10)


def there(modules: nn.ModuleList) -> list[bool]:
    return [not isinstance(module, nn.Identity) for module in modules]


def test_one_value_stands_between_layers_and_a_list_after_each() -> None:
    model = network()
    assert there(model.pools) == there(model.norms) == [True, False]
    model = network(pool_size=[0, 2], batch_norm=[False, True])
    assert there(model.pools) == there(model.norms) == [False, True]
    model = network(batch_norm=False, pool_size=0)
    assert there(model.pools) == there(model.norms) == [False, False]
    model = network(kernel_size=[5, 3], padding=[1, "valid"], bias=[False, True])
    assert [layer.cells[0].kernel_size for layer in model.layers] == [(5, 5), (3, 3)]
    assert [layer.cells[0].padding for layer in model.layers] == [(1, 1), "valid"]
    assert [layer.cells[0].bias is None for layer in model.layers] == [True, False]
    assert model(video()).shape == (2, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"peephole": "channel"},
        {"peephole": "pixel", "image_size": VIDEO[3:]},
        {"peephole": "pixel", "image_size": VIDEO[3:], "padding": "valid"},
        {"recurrent_activation": "hard_sigmoid_v3"},
        {"head": "avg"},
        {"batch_norm_affine": True},
        {"batch_norm_eps": 0.3},
        {"hidden_channels": (4,)},
        {"pool_size": 3},
        {"dense_features": (6,)},
    ],
    ids=str,
)
def test_every_option_matters_and_trains(options: dict[str, Any]) -> None:
    plain, model = network(), network(**options)
    with torch.no_grad():
        for p in (*plain.parameters(), *model.parameters()):
            p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p))
    assert not torch.allclose(plain(video()), model(video()))
    model(video()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["dropout", "recurrent_dropout"])
def test_dropout_is_for_training(name: str) -> None:
    model = network(**{name: 0.5})
    assert not torch.equal(model(video()), model(video()))
    model.eval()
    assert torch.equal(model(video()), model(video()))


def test_clips_of_different_length_are_each_clip_alone() -> None:
    model = network(stem_channels=(4,), peephole="channel").eval()
    x, lengths = video(), torch.tensor([2, 4])
    x[0, 2:] = float("nan")
    logits = model(x, lengths)
    for n, length in enumerate(lengths.tolist()):
        assert torch.allclose(logits[n], model(x[n : n + 1, :length])[0], rtol=1e-10, atol=1e-12)
    model.train()
    model(x, lengths).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.isfinite(model.norms[0].running_mean).all()


def test_gates_of_the_last_step() -> None:
    model = network(stem_channels=(3,), dropout=0.5)
    x = video()
    made = model.gates(x)
    assert set(made) == {"h", "c", "i", "f", "g", "o"}
    assert all(value.shape == (2, 4, 12, 14) and not value.requires_grad for value in made.values())
    model.eval()
    output, (_, c_n) = model.layers[0](model.stem(x))
    assert torch.allclose(made["h"], output[:, -1], rtol=1e-10, atol=1e-12)
    assert torch.allclose(made["c"], c_n[0], rtol=1e-10, atol=1e-12)
    assert torch.allclose(model.gates(x[:, :1])["h"], output[:, 0], rtol=1e-10, atol=1e-12)


def test_exports_with_lengths() -> None:
    model = network(stem_channels=(3,)).eval()
    x = video()
    x[0, 2:] = float("nan")
    program = torch.export.export(model, (video(), torch.tensor([4, 4])), strict=False)
    assert not any("convlstm_fish" in str(node.target) for node in program.graph.nodes)
    lengths = torch.tensor([2, 4])
    assert torch.allclose(program.module()(x, lengths), model(x, lengths), rtol=1e-10, atol=1e-12)


def test_checkpointing_changes_nothing() -> None:
    plain, saving = network(), network(checkpoint_every=2)
    for model in (plain, saving):
        model(video()).sum().backward()
    for one, other in zip(saving.parameters(), plain.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_compiles_whole_and_runs_under_autocast() -> None:
    model = network().float()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = video(dtype=torch.float32)
    model.eval()
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model(x).float(), model(x.float()).float(), atol=3e-2)
        model.train()
        assert torch.isfinite(model(x)).all()


def test_learns() -> None:
    """Which half of the frame flickers: a few steps of Adam are enough."""
    torch.manual_seed(0)
    model = ClipClassifier(1, (4, 4), num_classes=2)
    label = torch.arange(16) % 2
    x = torch.zeros(16, 5, 1, 8, 12)
    x[label == 0, ::2, :, :, :6] = 1
    x[label == 1, ::2, :, ::2] = 1
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(model(x), label).backward()
        optimiser.step()
    assert (model(x).argmax(1) == label).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_channels": ()}, "at least one ConvLSTM layer, got none"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"head": "mean"}, "head must be one of .* got 'mean'"),
        ({"peephole": "all"}, 'peephole must be None, "channel" or "pixel", got \'all\''),
        ({"head": "flatten"}, r'head="flatten" needs image_size=\(H, W\), got None'),
        ({"peephole": "pixel"}, r'peephole="pixel" needs image_size'),
        ({"image_size": (12,)}, r"image_size must be \(H, W\), got \(12,\)"),
        ({"kernel_size": [3, 3, 3]}, "kernel_size must be one value or a list of 2, one per ConvLSTM layer"),
        ({"batch_norm": [True]}, "batch_norm must be one value or a list of 2"),
        ({"image_size": (4, 4), "pool_size": [4, 4]}, r"image_size \(4, 4\) leaves no pixel after layer 2"),
        ({"image_size": (2, 2), "padding": "valid"}, "too small for kernel_size"),
    ],
    ids=str,
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_is_made_of_the_layers_people_import() -> None:
    assert all(isinstance(layer, ConvLSTM) for layer in network().layers)
