"""A module of frames, at every step of a clip."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from convlstm_fish import TimeDistributed


def test_every_frame_by_itself() -> None:
    convolution = nn.Conv2d(3, 4, 3, stride=2)
    x = torch.randn(2, 5, 3, 8, 9)
    y = TimeDistributed(convolution)(x)
    for t in range(5):
        assert torch.allclose(y[:, t], convolution(x[:, t]), atol=1e-6)
    first = TimeDistributed(convolution, batch_first=False)(x.transpose(0, 1))
    assert torch.equal(first, y.transpose(0, 1))


def test_vectors_and_strided_views() -> None:
    linear = nn.Linear(3, 2)
    x = torch.randn(5, 3, 4).permute(0, 2, 1)
    assert torch.allclose(TimeDistributed(linear)(x), linear(x))


def test_padding_is_not_seen() -> None:
    """The statistics of a batch norm are those of the frames that exist."""
    lengths = torch.tensor([2, 5, 1])
    x = torch.randn(3, 5, 2, 4, 4)
    frames = torch.cat([clip[:n] for clip, n in zip(x, lengths.tolist())])
    for n, length in enumerate(lengths.tolist()):
        x[n, length:] = float("nan")
    for batch_first in (True, False):
        norm, judge = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        layer = TimeDistributed(norm, batch_first=batch_first)
        y = layer(x if batch_first else x.transpose(0, 1), lengths)
        y = y if batch_first else y.transpose(0, 1)
        expected = judge(frames)
        assert torch.allclose(torch.cat([clip[:n] for clip, n in zip(y, lengths.tolist())]), expected, atol=1e-5)
        assert torch.allclose(norm.running_mean, judge.running_mean)
        assert all(y[n, length:].eq(0).all() for n, length in enumerate(lengths.tolist()))


@pytest.mark.parametrize("training", [False, True])
def test_compiles_with_lengths(training: bool) -> None:
    """One graph for clips of any length; batch statistics, which must not count padding, break it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    frame = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    layer = TimeDistributed(frame).train(training)
    judge = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=not training)
    for lengths in ([2, 5, 1], [5, 5, 4]):
        x = torch.randn(3, 5, 2, 4, 4)
        for n, length in enumerate(lengths):
            x[n, length:] = float("nan")
        found, expected = compiled(x, torch.tensor(lengths)), judge(x, lengths)
        assert torch.allclose(found, expected, atol=1e-6)
        for one, other in zip(layer.buffers(), judge.buffers()):
            assert torch.allclose(one, other)
        found.square().sum().backward()
        expected.square().sum().backward()
    for one, other in zip(layer.parameters(), judge.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_refuses_what_is_no_clip() -> None:
    with pytest.raises(ValueError, match=r"x must be \(N, T, ...\) with at least three dimensions, got \(2, 3\)"):
        TimeDistributed(nn.Identity())(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"lengths must lie in 1..3"):
        TimeDistributed(nn.Identity())(torch.zeros(2, 3, 4), torch.tensor([1, 4]))
