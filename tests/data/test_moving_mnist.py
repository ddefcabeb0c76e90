"""The generator of moving digits against the standard step-by-step rule, written here as a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from convlstm_fish.data.moving_mnist import bounce, moving_digits, render, standard_motion, uniform_draws


def stepwise(start: float, velocity: float, frames: int) -> list[float]:
    """The rule: step; at or past a wall stand on the wall and turn round."""
    x, direction, out = start, 1, []
    for _ in range(frames):
        x += direction * velocity
        if x <= 0:
            x, direction = 0.0, -direction
        elif x >= 1:
            x, direction = 1.0, -direction
        out.append(x)
    return out


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (7, 28, 28), generator=generator, dtype=torch.uint8)


def test_bounce_is_the_stepwise_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(500, generator=generator, dtype=torch.float64)
    velocity = (torch.rand(500, generator=generator, dtype=torch.float64) - 0.5) * 0.9
    velocity[:20] *= 1e-3  # never arrives
    ours = bounce(start, velocity, 50)
    theirs = torch.tensor([stepwise(x, v, 50) for x, v in zip(start.tolist(), velocity.tolist())], dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert (ours == 0).any()
    assert (ours == 1).any()
    still = bounce(start, torch.zeros_like(start), 5)
    torch.testing.assert_close(still, start[:, None].expand(-1, 5))


def test_sequences_are_the_standard_generators(digits: torch.Tensor) -> None:
    keys = torch.arange(40)
    video = moving_digits(digits, keys, seed=3)
    assert video.shape == (40, 20, 64, 64)
    assert video.dtype == torch.uint8
    draws = uniform_draws(3, keys, 8).view(40, 2, 4)
    for n in range(40):
        expected = np.zeros((20, 64, 64), np.uint8)
        for which, x, y, turn in draws[n].tolist():
            image = digits[int(which * 7)].numpy()
            xs = stepwise(x, 0.1 * math.cos(2 * math.pi * turn), 20)
            ys = stepwise(y, 0.1 * math.sin(2 * math.pi * turn), 20)
            for t in range(20):
                top, left = int(36 * ys[t]), int(36 * xs[t])
                place = expected[t, top : top + 28, left : left + 28]
                np.maximum(place, image, out=place)
        np.testing.assert_array_equal(video[n].numpy(), expected)


def test_a_sequence_depends_on_seed_and_key_only(digits: torch.Tensor) -> None:
    together = moving_digits(digits, torch.arange(100, 130), seed=5)
    alone = moving_digits(digits, torch.tensor([117]), seed=5)
    shuffled = moving_digits(digits, torch.tensor([129, 117, 4]), seed=5)
    assert torch.equal(together[17], alone[0])
    assert torch.equal(shuffled[1], alone[0])
    assert torch.equal(shuffled[0], together[29])
    assert not torch.equal(moving_digits(digits, torch.tensor([117]), seed=6), alone)
    assert len({frames.numpy().tobytes() for frames in together}) == 30


def test_the_stream_keeps_its_values() -> None:
    # A checkpoint resumed by a later version must see the same sequences: these numbers may never change.
    draws = uniform_draws(0, torch.tensor([0, 1]), 2)
    assert draws.tolist() == [[0.2558852031320078, 0.08832385701148338], [0.8760379420462315, 0.6708220978549694]]


@pytest.mark.parametrize("seed", [0, 1, 2**63, -5])
def test_draws_are_uniform_and_independent(seed: int) -> None:
    draws = uniform_draws(seed, torch.arange(20_000), 4)
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(0), torch.full((4,), 0.5, dtype=torch.float64), rtol=0, atol=0.01)
    counts = torch.stack([torch.histc(column, 20, 0, 1) for column in draws.T])
    assert (counts - 1000).abs().max() < 5.5 * math.sqrt(1000)
    shifted = torch.cat([draws[1:], draws[:-1]], dim=1)  # beside the next key's
    correlation = torch.corrcoef(shifted.T) - torch.eye(8)
    assert correlation.abs().max() < 0.035


def test_a_digit_can_stand_still(digits: torch.Tensor) -> None:
    motion = standard_motion(torch.arange(9), seed=1, n_digits=7, frames=12, per_clip=3, step_length=(0.2, 0.0, 0.0))
    assert motion.top.shape == (9, 3, 12)
    for place in (motion.top, motion.left):
        assert (place[:, 1:] == place[:, 1:, :1]).all()
        assert place.min() >= 0
        assert place.max() <= 36
    moved = (motion.top[:, 0] != motion.top[:, 0, :1]) | (motion.left[:, 0] != motion.left[:, 0, :1])
    assert moved.any(1).all()
    assert render(digits, motion).shape == (9, 12, 64, 64)


def test_a_frame_of_the_size_of_a_digit_is_the_digit(digits: torch.Tensor) -> None:
    video = moving_digits(digits, torch.arange(3), seed=0, frames=2, image_size=28, per_clip=1)
    which = (uniform_draws(0, torch.arange(3), 4)[:, 0] * 7).long()
    assert torch.equal(video, digits[which][:, None].expand(-1, 2, -1, -1))


def test_wrong_values_are_named(digits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="20"):
        moving_digits(digits, torch.arange(3), seed=0, image_size=20)
    for lengths in (1.0, -0.1, (0.1,), (0.1, 0.2, 0.3)):
        with pytest.raises(ValueError, match="step_length"):
            moving_digits(digits, torch.arange(3), seed=0, step_length=lengths)


@pytest.mark.gpu
def test_the_gpu_makes_the_same_sequences(digits: torch.Tensor) -> None:
    keys = torch.arange(2000)
    on_gpu = moving_digits(digits.cuda(), keys, seed=9).cpu()
    assert torch.equal(uniform_draws(9, keys.cuda(), 8).cpu(), uniform_draws(9, keys, 8))
    differing = (on_gpu != moving_digits(digits, keys, seed=9)).flatten(1).any(1)
    assert differing.float().mean() <= 0.001  # sine and cosine may differ in their last bit
