"""Moving digits: the standard Moving MNIST motion as a pure, vectorised function of (seed, sequence number).

Source of the data set: Srivastava, Mansimov and Salakhutdinov 2015, *Unsupervised Learning of Video Representations
using LSTMs* (arXiv:1502.04681). The motion is that of the generator which PredRNN, SimVP and OpenSTL train on: a digit
starts anywhere on the canvas, moves ``step_length`` of the free way per frame in a random direction, stops at a wall
for the frame in which it reaches it and comes back; digits overlap by the brighter pixel. The first frame shows the
digits after their first step.

Everything runs on whichever device the digits lie on, so a training batch is drawn on the GPU from its sequence numbers
alone: sequence ``k`` of seed ``s`` is the same whatever the batch, the process or the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The 64 bits of ``value`` as the signed integer that torch.int64 holds."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(z: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014) on int64 tensors, which wrap around."""

    def shifted(bits: Tensor, n: int) -> Tensor:
        return (bits >> n) & ((1 << (64 - n)) - 1)  # >> keeps the sign, the mask drops it

    z = (z ^ shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ shifted(z, 31)


def uniform_draws(seed: int, keys: Tensor, count: int) -> Tensor:
    """``count`` numbers in [0, 1) for each key, a pure function of (seed, key).

    A counter-based generator: every draw is a hash, so any sequence can be made alone, in any order, on any device.

    Args:
        seed: any integer.
        keys: (N,) int64.
        count: numbers per key.

    Returns:
        (N, count) float64 with 53 random bits each.
    """
    stream = int(_mix(torch.tensor(_signed(seed * _GAMMA + 1))))  # a plain number: nothing is copied to a GPU
    state = _mix(_mix(keys.to(torch.int64)) + stream)
    steps = torch.arange(1, count + 1, device=keys.device) * _signed(_GAMMA)
    bits = _mix(state[:, None] + steps)
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def bounce(start: Tensor, velocity: Tensor, frames: int) -> Tensor:
    """Positions in [0, 1] of a point that stops at a wall when it reaches it and then turns round.

    The step-by-step rule is x <- x + d*v; if x is at or past a wall, x is put on the wall and d <- -d. Between walls
    the way is straight, so the position at step t follows in closed form: with speed s = abs(v), the first wall is
    reached at step n = ceil(distance / s) and every later one K = ceil(1 / s) steps after the last.

    Args:
        start: position before the first step, any shape, in [0, 1].
        velocity: way per frame, same shape, abs(velocity) < 1.
        frames: number of steps to return, the first of them after one step.

    Returns:
        (*shape, frames) positions.
    """
    step = torch.arange(1, frames + 1, device=start.device, dtype=start.dtype)
    start, velocity = start[..., None], velocity[..., None]
    speed = velocity.abs().clamp_min(torch.finfo(start.dtype).tiny)
    upwards = velocity > 0
    to_wall = torch.where(upwards, 1 - start, start)
    first = torch.ceil(to_wall / speed).clamp(1, 2**31)
    period = torch.ceil(1 / speed).clamp(max=2**31)
    since = step - first
    crossings = torch.floor(since / period)
    way = (since - crossings * period) * speed
    from_upper = upwards ^ (crossings % 2 == 1)  # which wall the point last left
    after = torch.where(from_upper, 1 - way, way)
    return torch.where(since < 0, start + step * velocity, after)


@dataclass(frozen=True)
class Motion:
    """Which digits a batch of sequences shows, and where: ``which`` (N, D) and ``top``, ``left`` (N, D, T), int64."""

    which: Tensor
    top: Tensor
    left: Tensor


def standard_motion(
    keys: Tensor,
    *,
    seed: int,
    n_digits: int,
    digit_size: int = 28,
    image_size: int = 64,
    frames: int = 20,
    per_clip: int = 2,
    step_length: float | Sequence[float] = 0.1,
) -> Motion:
    """Digits and paths of the sequences ``keys``.

    Args:
        keys: (N,) int64 sequence numbers.
        seed: of the whole stream.
        n_digits: how many digits there are to draw from.
        digit_size: side of a digit in pixels.
        image_size: side of a frame in pixels.
        frames: frames of a sequence.
        per_clip: digits in a sequence.
        step_length: way per frame as a fraction of the free way; one value, or one per digit of the sequence
            (0 stands still).

    Returns:
        The motion, on the device of ``keys``.
    """
    if image_size < digit_size:
        raise ValueError(f"image_size must be at least the size of a digit, {digit_size}, got {image_size}")
    lengths = [float(step_length)] * per_clip if isinstance(step_length, int | float) else list(step_length)
    if len(lengths) != per_clip or not all(0 <= s < 1 for s in lengths):
        raise ValueError(f"step_length must be {per_clip} value(s) in [0, 1), got {step_length}")
    draws = uniform_draws(seed, keys, 4 * per_clip).view(-1, per_clip, 4)
    which = (draws[..., 0] * n_digits).long()
    angle = draws[..., 3] * (2 * np.pi)
    way = torch.cat([draws.new_full((1,), length) for length in lengths])
    free = image_size - digit_size
    left = (bounce(draws[..., 1], torch.cos(angle) * way, frames) * free).long()
    top = (bounce(draws[..., 2], torch.sin(angle) * way, frames) * free).long()
    return Motion(which, top, left)


def render(digits: Tensor, motion: Motion, image_size: int = 64) -> Tensor:
    """The frames of a motion: digits on black, the brighter pixel on top.

    Args:
        digits: (K, S, S) uint8.
        motion: from `standard_motion`, on the same device.
        image_size: side of a frame in pixels.

    Returns:
        (N, T, image_size, image_size) uint8.
    """
    n, per_clip, frames = motion.top.shape
    size, device = digits.shape[-1], digits.device
    video = torch.zeros(n, frames, image_size, image_size, dtype=torch.uint8, device=device)
    flat = video.view(-1)
    offsets = torch.arange(size, device=device)
    inside = offsets[:, None] * image_size + offsets
    origin = torch.arange(n * frames, device=device).view(n, frames) * image_size**2
    for d in range(per_clip):
        corner = origin + motion.top[:, d] * image_size + motion.left[:, d]
        where = corner[..., None, None] + inside
        flat[where] = torch.maximum(flat[where], digits[motion.which[:, d]][:, None])
    return video


def moving_digits(
    digits: Tensor,
    keys: Tensor,
    *,
    seed: int,
    frames: int = 20,
    image_size: int = 64,
    per_clip: int = 2,
    step_length: float | Sequence[float] = 0.1,
) -> Tensor:
    """Moving MNIST sequences, a pure function of (digits, seed, key).

    Args:
        digits: (K, S, S) uint8; their device is where the sequences are made.
        keys: (N,) int64 sequence numbers, moved to that device.
        seed, frames, image_size, per_clip, step_length: see `standard_motion`.

    Returns:
        (N, frames, image_size, image_size) uint8.
    """
    motion = standard_motion(
        keys.to(digits.device),
        seed=seed,
        n_digits=len(digits),
        digit_size=digits.shape[-1],
        image_size=image_size,
        frames=frames,
        per_clip=per_clip,
        step_length=step_length,
    )
    return render(digits, motion, image_size)
