"""Which layers the kernels cover, how they cut the work, and how much shared memory that takes."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from convlstm_fish.ops.hopper_kernels.compiled import SHARED_BYTES, SHARED_EACH, Constants, available


class Shape(NamedTuple):
    """What a layer's kernels are compiled for."""

    channels: int
    hidden: int
    size_in: tuple[int, int]
    size: tuple[int, int]
    pads: tuple[int, int]
    activation: int
    half: bool
    fast: bool
    bias: bool

    @property
    def gates(self) -> int:
        return 4 * self.hidden

    @property
    def steps_x(self) -> int:
        """Blocks of 16 rows of the input's weight; of 4 channels, a row of taps is one."""
        return 3 if self.channels == 4 else 9 * self.channels // 16

    @property
    def columns_x(self) -> int:
        """Of the adjoint product, for the gradient of x."""
        return -(-self.channels // 16) * 16

    @property
    def fused(self) -> bool:
        """Whether the backward step can make the adjoint product itself: its weights are small."""
        return self.hidden == 16

    @property
    def rows(self) -> int:
        """Of both weights as the forward step reads them."""
        return 16 * (self.steps_x + 9 * self.hidden // 16)


class Plan(NamedTuple):
    """How one kernel cuts its work.

    Attributes:
        groups: warpgroups down and across a program's tile, 8 x 8 pixels each.
        teams: of so many warpgroups in a program, each with tiles of its own.
        shared: bytes of shared memory of a program.
        programs: a multiprocessor.
        threads: of a program.
        constants: what the kernel is compiled with.
    """

    groups: tuple[int, int]
    teams: int
    shared: int
    programs: int
    threads: int
    constants: Constants

    def tiles(self, size: tuple[int, int]) -> int:
        """Of an image."""
        return -(-size[0] // (8 * self.groups[0])) * -(-size[1] // (8 * self.groups[1]))


def _plane(pixels: int, chunks: int) -> int:
    """Bytes from a plane of 8 channels to the next; as in common.cuh."""
    wanted = 16 if chunks >= 8 else 128 // chunks % 128
    return pixels * 16 + (wanted - pixels * 16) % 128


def _image(pixels: int, channels: int) -> int:
    """Bytes of an image's pixels in planes."""
    return pixels * 16 if channels == 4 else _plane(pixels, channels // 8) * (channels // 8)


def _plan(
    shape: Shape, groups: tuple[int, int], teams: int, stages: int, fixed: int, stage: int, most: int, **constants: int
) -> Plan | None:
    shared = fixed + stages * stage * teams
    if shared + SHARED_EACH > SHARED_BYTES and stages > 2:
        return _plan(shape, groups, teams, stages - 1, fixed, stage, most, **constants)
    programs = min(most, SHARED_BYTES // (shared + SHARED_EACH))
    if programs == 0:
        return None
    threads = 128 * constants.setdefault("GROUPS", groups[0] * groups[1]) * teams
    known = {
        "HIDDEN": shape.hidden, "C_IN": shape.channels, "H": shape.size[0], "W": shape.size[1],
        "HI": shape.size_in[0], "WI": shape.size_in[1], "PY": shape.pads[0], "PX": shape.pads[1],
        "ACT": shape.activation, "FAST": int(shape.fast), "HALF": int(shape.half), "HAS_BIAS": int(shape.bias),
        "WY": groups[0], "WX": groups[1], "PROGRAMS": programs, "TEAMS": teams, "STAGES": stages, "FUSED": 0, "C_X": 0,
    }  # fmt: skip
    return Plan(groups, teams, shared, programs, threads, tuple((known | constants).items()))


def _patch(groups: tuple[int, int]) -> int:
    return (8 * groups[0] + 2) * (8 * groups[1] + 2)


@functools.cache
def plan_forward(shape: Shape) -> Plan | None:
    """Of the forward step."""
    groups = (1, 1)
    stage = _image(_patch(groups), shape.channels) + _image(_patch(groups), shape.hidden)
    teams, most = (3, 2) if shape.hidden == 16 else (4, 1)
    return _plan(shape, groups, teams, 2, shape.rows * shape.gates * 2, stage, most)


@functools.cache
def plan_backward(shape: Shape, fused: bool) -> Plan | None:
    """Of the backward step, which makes the adjoint product itself if ``fused``."""
    groups = (1, 1)
    stage = _image(_patch(groups), shape.channels) + _image(_patch(groups), shape.hidden)
    fixed = shape.rows * shape.gates * 2
    if fused:
        stage += _image(_patch(groups), shape.gates)
        fixed += 9 * shape.gates * shape.hidden * 2
    # With more teams a thread has too few registers.
    teams = 4 if shape.hidden == 16 and not fused else 3
    return _plan(shape, groups, teams, 3 if fused else 2, fixed, stage, 1, FUSED=int(fused))


@functools.cache
def plan_adjoint(shape: Shape, with_x: bool) -> Plan | None:
    """Of the gradient of h and, ``with_x``, of x."""
    groups, teams, most = ((1, 2), 1, 3) if shape.hidden == 16 else ((1, 1), 2, 1)
    columns = shape.hidden + shape.columns_x * with_x
    fixed = 9 * shape.gates * columns * 2
    return _plan(
        shape, groups, teams, 2, fixed, _image(_patch(groups), shape.gates), most, C_X=shape.columns_x * with_x
    )


@functools.cache
def plan_sums(shape: Shape) -> Plan | None:
    """Of the weights' gradients; 64 columns a program."""
    groups = (2, 2)
    few = shape.rows <= 12 * 16
    pixels = 64 * groups[0] * groups[1]
    stage = _image(_patch(groups), shape.channels) + _image(_patch(groups), shape.hidden) + 8 * _plane(pixels, 8)
    return _plan(shape, groups, 1, 2, 0, stage, 2 if few else 1, GROUPS=1 if few else 2)


@functools.cache
def _fits(shape: Shape) -> bool:
    # The tiles of the input's gradient are the input's, and have to include the state's pixels.
    inside = all(p <= 1 and i + p > s for i, p, s in zip(shape.size_in, shape.pads, shape.size))
    plans = [plan_forward(shape), plan_sums(shape), *(plan_adjoint(shape, with_x) for with_x in (False, True))]
    plans += [plan_backward(shape, fused) for fused in (False, shape.fused)]
    # Within a frame places are counted in 32 bits.
    countable = shape.gates * max(math.prod(shape.size), math.prod(shape.size_in)) < 2**31
    return inside and countable and None not in plans


def covers(
    shape: Shape, kernel: tuple[int, int], kernel_x: tuple[int, int], stride: tuple[int, int],
    dilation: tuple[int, int], dtype: torch.dtype, device: torch.device,
) -> bool:  # fmt: skip
    """Whether the kernels take such a layer."""
    return (
        dtype in (torch.bfloat16, torch.float16)
        and kernel == kernel_x == (3, 3)
        and stride == dilation == (1, 1)
        and shape.hidden in (16, 32)
        and shape.channels in (4, 16, 32)
        and available(device)
        and _fits(shape)
    )
