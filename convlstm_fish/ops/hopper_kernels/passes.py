"""The steps of one call, forward and backward; what the Triton kernels' passes do, for the layers covered here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convlstm_fish.ops.hopper_kernels.compiled import aligned
from convlstm_fish.ops.hopper_kernels.steps import Steps, prepare_backward


def run_forward(
    steps: Steps, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, reverse: bool, keep_h: bool, keep_c: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the steps on x (N, T, H, W, C), with a state (N, H', W', C_h) before the first or None.

    Returns:
        h of every step (N, T, H', W', C_h), or without ``keep_h`` (N, 2, H', W', C_h), where step s lies at s % 2; c_n;
        and c of every step, empty without ``keep_c``.
    """
    clips, many = x.shape[:2]
    frame = (*steps.shape.size, steps.shape.hidden)
    if keep_c:
        prepare_backward(steps.shape)
    x = aligned(x)
    h = x.new_empty(clips, many if keep_h else 2, *frame)
    cells = x.new_empty((clips, many, *frame) if keep_c else (0,))
    c = x.new_empty((clips, *frame), dtype=torch.float32)
    h_in, c_in = (None, None) if h_0 is None or c_0 is None else (aligned(h_0), aligned(c_0))
    for s in range(many):
        t = many - 1 - s if reverse else s
        h_out = h[:, t if keep_h else s % 2]
        steps.forward(x[:, t], h_in, h_out, c_in, c, cells[:, t] if keep_c else None)
        h_in, c_in = h_out, c
    return h, c, cells


def run_backward(
    steps: Steps, dout: Tensor | None, dh_n: Tensor | None, dc: Tensor, h: Tensor, cells: Tensor, x: Tensor,
    h_0: Tensor | None, c_0: Tensor | None, reverse: bool, chunk: int, da: Tensor, dbias: Tensor | None,
    dx: Tensor | None, need_state: bool, take_up: Callable[[int, int], None],
) -> Tensor | None:  # fmt: skip
    """Runs the steps backward; ``dc``, the gradient of c_n, becomes that of c_0. x and h_0 are aligned.

    Args:
        chunk: after so many steps ``take_up(s, chunk)`` is called, with the first step's number, to read their ``da``.
        dbias: sums to add to, or None.
        dx: to write the gradient of x into, or None.

    Returns:
        The gradient of h_0, None unless ``need_state``.
    """
    many = x.shape[1]
    dout = None if dout is None else aligned(dout)
    dh = None if dh_n is None else aligned(dh_n)
    state = (None, None) if h_0 is None or c_0 is None else (h_0, c_0.to(x.dtype))
    # The gradient of h is made where it is needed if the weights are small; with that of x it is a product of its own.
    fused = steps.shape.fused and dx is None
    waiting, da_next = 0, None
    for s in reversed(range(many)):
        t, before = (many - 1 - s, many - s) if reverse else (s, s - 1)
        h_in, c_in = state if s == 0 else (h[:, before], cells[:, before])
        da_here = da[:, s % da.shape[1]]
        steps.backward(
            x[:, t], h_in, c_in, da_next, dh, None if dout is None else dout[:, t], dc, da_here, dbias, fused
        )
        da_next, dh = da_here, None
        need_h = need_state if s == 0 else not fused
        if need_h or dx is not None:
            dh = torch.empty_like(dc, dtype=x.dtype) if need_h else None
            steps.adjoint(da_here, dh, None if dx is None else dx[:, t])
        waiting += 1
        if waiting == chunk or s == 0:
            take_up(s, waiting)
            waiting = 0
    return dh
