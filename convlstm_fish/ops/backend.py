"""Which implementation runs a call: the plain PyTorch one, the one for CPUs, or the Triton kernel."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_fish.ops.channels_last import conv_lstm_channels_last, covers, pays
from convlstm_fish.ops.checks import check_arguments
from convlstm_fish.ops.equations import Norm, Peephole, State
from convlstm_fish.ops.geometry import Padding
from convlstm_fish.ops.reference import conv_lstm_reference, exporting

BACKENDS = ("auto", "reference", "triton")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_log = logging.getLogger(__name__)
_said: set[str] = set()


def triton_unsupported(*args: Any, **kwargs: Any) -> str | None:
    """Why the Triton kernel cannot run this call of :func:`conv_lstm` (without ``backend``), or None if it can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    from convlstm_fish.ops.triton_kernels import unsupported

    return unsupported(*args, **kwargs)


def conv_lstm(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Peephole | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = "same",
    dilation: int | Sequence[int] = 1,
    recurrent_activation: str = "sigmoid",
    recurrent_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    return_sequences: bool = True,
    checkpoint_every: int | None = None,
    backend: str = "auto",
    detach_every: int | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor | None, State]:
    r"""A whole sequence of one ConvLSTM layer (Shi et al. 2015, arXiv:1506.04214, eq. 3).

    With * a convolution, ∘ the product of elements and σ the recurrent activation::

        i_t = σ(W_xi * x_t + W_hi * h_{t-1} + w_ci ∘ c_{t-1} + b_i)
        f_t = σ(W_xf * x_t + W_hf * h_{t-1} + w_cf ∘ c_{t-1} + b_f)
        g_t = tanh(W_xg * x_t + W_hg * h_{t-1} + b_g)
        c_t = f_t ∘ c_{t-1} + i_t ∘ g_t
        o_t = σ(W_xo * x_t + W_ho * h_{t-1} + w_co ∘ c_t + b_o)
        h_t = o_t ∘ tanh(c_t)

    Args:
        input: (N, T, C, *spatial) with 1 to 3 spatial dimensions.
        hx: None for zeros, or (h_0, c_0), each (N, C_h, *out).
        weight_ih: (4 * C_h, C, *kernel), the gates in the order i, f, g, o.
        weight_hh: (4 * C_h, C_h, *kernel_h).
        bias: (4 * C_h,) or None.
        peephole: None or (w_ci, w_cf, w_co), each (C_h, 1, ...) or (C_h, *out).
        stride: of the input convolution; the recurrent one always keeps the size.
        padding: "same" (as TensorFlow pads: ceil(size / stride) rows, the extra one at the end), "valid", or ints.
        dilation: of the input convolution.
        recurrent_activation: "sigmoid", "hard_sigmoid" (Keras 2: clip(0.2x + 0.5, 0, 1)) or "hard_sigmoid_v3"
            (Keras 3: relu6(x + 3) / 6).
        recurrent_mask: (N, C_h, *out), multiplies h_{t-1} before each recurrent convolution.
        lengths: (N,) whole numbers from 1 to T. Each clip stops at its own last step; nothing past it is read.
        reverse: run backwards in time, from each clip's own last step to its first.
        return_sequences: False keeps no sequence and returns None in its place.
        checkpoint_every: keep only the state of every so many steps for the backward pass and compute the rest again.
            Under the transforms of torch.func everything is kept.
        backend: "reference", "triton" (kernels for GPUs: Triton's, and CUDA kernels that take narrow layers on Hopper
            GPUs), or "auto", which may choose, on a CPU too; a named backend that cannot run raises.
        detach_every: truncated back-propagation: no gradient passes from step k * detach_every to the step before it
            (after it in reverse).
        norm: gains and groups of the layer or group norm inside the cell, or None.

    Returns:
        ``output, (h_n, c_n)``: output (N, T, C_h, *out), zero past a clip's length; h_n and c_n (N, C_h, *out) the
        state after the last step. h has the compute dtype (autocast's where it is on), c float32 where that has 16
        bits.

    Raises:
        ValueError: an argument that does not fit, named with its value.
        RuntimeError: ``backend="triton"`` on a call that the kernel cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    args = (input, hx, weight_ih, weight_hh, bias, peephole)
    kwargs: dict[str, Any] = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "recurrent_activation": recurrent_activation,
        "recurrent_mask": recurrent_mask,
        "lengths": lengths,
        "reverse": reverse,
        "return_sequences": return_sequences,
        "checkpoint_every": checkpoint_every,
        "detach_every": detach_every,
        "norm": norm,
    }
    eager = backend == "auto" and not torch.compiler.is_compiling()
    if eager and covers(*args, **kwargs) and pays(input, weight_ih, weight_hh):
        return conv_lstm_channels_last(*args, **kwargs)
    # An exported graph is to run anywhere, without the kernels.
    plain = input.device.type != "cuda" or exporting()
    if backend == "reference" or (backend == "auto" and plain):
        return conv_lstm_reference(*args, **kwargs)
    reason = triton_unsupported(*args, **kwargs)
    if reason is None:
        from convlstm_fish.ops.triton_kernels import conv_lstm_triton

        return conv_lstm_triton(*args, **kwargs)
    if backend == "triton":
        check_arguments(*args, **{k: v for k, v in kwargs.items() if k not in ("reverse", "return_sequences")})
        raise RuntimeError(f"backend='triton' cannot run this call: {reason}")
    if not torch.compiler.is_compiling() and reason not in _said:
        _said.add(reason)
        _log.warning("the ConvLSTM runs on the reference backend, not on the Triton kernel: %s", reason)
    return conv_lstm_reference(*args, **kwargs)


def unroll(
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Peephole | None = None,
    *,
    backend: str = "auto",
    recurrent_activation: str = "sigmoid",
    norm: Norm | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = "same",
    dilation: int | Sequence[int] = 1,
) -> Callable[[Tensor, State | None], State]:
    """:func:`conv_lstm` a step at a time, for an input that depends on the state before.

    On a GPU the steps share what the weights need: they are laid out for the kernels once, and their gradients are
    added up in one launch, after the steps' own backward passes. Elsewhere it is the same as a call a step.

    Args:
        weight_ih, weight_hh, bias, peephole, backend, recurrent_activation, norm, stride, padding, dilation: see
            :func:`conv_lstm`.

    Returns:
        ``step(x, hx)``: (h_1, c_1) from x (N, C, *spatial) and (h_0, c_0), or None for zeros. It is for one pass: on a
        GPU it raises a RuntimeError once an optimizer, or a change in place, has made other weights of these. (What is
        done to their ``data`` it does not see.)

    Example:
        >>> step = unroll(torch.rand(32, 1, 3, 3), torch.rand(32, 8, 3, 3))
        >>> state = step(torch.rand(2, 1, 16, 16), None)
        >>> step(torch.rand(2, 1, 16, 16), state)[0].shape
        torch.Size([2, 8, 16, 16])
    """
    stack = unroll_stack([{
        "weight_ih": weight_ih, "weight_hh": weight_hh, "bias": bias, "peephole": peephole, "backend": backend,
        "recurrent_activation": recurrent_activation, "norm": norm, "stride": stride, "padding": padding,
        "dilation": dilation,
    }])  # fmt: skip
    return lambda x, hx: stack(x, [hx])[1][0]


def unroll_stack(
    layers: Sequence[Mapping[str, Any]],
) -> Callable[[Tensor | None, Sequence[State | None]], tuple[Tensor, list[State]]]:
    """:func:`unroll` for layers of which each reads the h of the one before.

    A step of all layers is one node of the autograd graph, and on a GPU a wide layer writes its h straight to where the
    next one reads it.

    Args:
        layers: the arguments of :func:`unroll` by name, of each layer.

    Returns:
        ``step(x, states)``: the last layer's h, and of each layer (h_1, c_1), from x (N, C, *spatial) and of each layer
        (h_0, c_0), or None for zeros. With None for x the first layer reads the last one's h of the states. This, the
        states handed on, and the last layer's h for the rest of the network are sooner differentiated than one h read
        three times: each has a way of its own through the autograd graph, so that to ``torch.autograd.grad`` the h of
        the states depends on neither of the other two. (It does where it has a hook or retains its gradient, as far as
        None for x goes.)

    Raises:
        ValueError: an unknown backend; from the step, an argument that does not fit, named with its value.
        RuntimeError: from the step, changed weights, and ``backend="triton"`` for what the kernels cannot run.

    Example:
        >>> layers = [{"weight_ih": torch.rand(32, 8, 3, 3), "weight_hh": torch.rand(32, 8, 3, 3)}] * 2
        >>> step = unroll_stack(layers)
        >>> first, states = step(torch.rand(2, 8, 16, 16), [None, None])
        >>> second, states = step(None, states)
    """
    defaults = {"bias": None, "peephole": None, "backend": "auto", "recurrent_activation": "sigmoid", "norm": None}
    geometry = {"stride": 1, "padding": "same", "dilation": 1}
    options = [{**defaults, **geometry, **layer} for layer in layers]
    backends = [each["backend"] for each in options]
    for backend in backends:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")

    def plain(x: Tensor, states: Sequence[State | None]) -> tuple[Tensor, list[State]]:
        after = []
        for each, hx in zip(options, states):
            after.append(conv_lstm(x.unsqueeze(1), hx, return_sequences=False, **each)[1])
            x = after[-1][0]
        return x, after

    fused: Any = None

    def step(input: Tensor | None, states: Sequence[State | None]) -> tuple[Tensor, list[State]]:
        nonlocal fused
        if len(states) != len(options):
            raise ValueError(f"states must be one of each of the {len(options)} layers, got {len(states)}")
        x = input
        if x is None:
            if states[-1] is None:
                raise ValueError("without an input the last layer needs a state, got None")
            x = states[-1][0]
        never = "reference" in backends or torch.compiler.is_compiling() or exporting()
        if never or ("auto" in backends and x.device.type != "cuda") or not _HAS_TRITON:
            return plain(x, states)
        from convlstm_fish.ops.triton_kernels import UnrollTriton

        if fused is None:
            fused = UnrollTriton(options)
        return plain(x, states) if fused.unsupported(x) is not None else fused(input, states)

    return step


def max_pool(frames: Tensor, size: int, *, backend: str = "auto") -> Tensor:
    """torch.nn.functional.max_pool2d(frames, size), for frames between two ConvLSTM layers.

    Args:
        frames: (F, C, H, W).
        size: of the windows, which is also their stride.
        backend: "reference", "triton", or "auto", which takes the kernel for frames on a GPU that lie channels last, as
            the Triton ConvLSTM leaves them.

    Returns:
        (F, C, H // size, W // size).

    Raises:
        ValueError: an unknown backend.
        RuntimeError: ``backend="triton"`` on frames that the kernel cannot pool.
    """
    if _takes_kernel(frames, backend, "pool") and _has_windows(frames, size):
        from convlstm_fish.ops.triton_kernels import max_pool_triton

        return max_pool_triton(frames, size)
    return F.max_pool2d(frames, size)


def batch_norm(
    frames: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool_size: int = 1,
    backend: str = "auto",
) -> Tensor:
    """torch.nn.functional.batch_norm(frames, ...), for frames between two ConvLSTM layers, which may be pooled first.

    Args:
        frames: (F, C, H, W).
        running_mean, running_var: (C,); in training they move by ``momentum`` towards the frames' own.
        weight, bias: (C,) or None.
        training: normalise with the frames' own mean and variance, not with the running ones.
        eps: added to the variance.
        pool_size: of a :func:`max_pool` before it; for inference the two are one launch on a GPU.
        backend: as in :func:`max_pool`.

    Returns:
        (F, C, H // pool_size, W // pool_size).

    Raises:
        ValueError: an unknown backend; in training, frames with a single value a channel.
        RuntimeError: ``backend="triton"`` on frames that the kernels cannot normalise.
    """
    own = training or running_mean is None or running_var is None
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (frames, weight, bias))
    fixed = not (own or tracked or torch.compiler.is_compiling())
    if fixed and _has_windows(frames, pool_size) and _takes_kernel(frames, backend, "normalise"):
        from convlstm_fish.ops.triton_kernels import scale_triton

        a = (running_var.float() + eps).rsqrt() * (1.0 if weight is None else weight.float())  # type: ignore[union-attr]
        b = -running_mean.float() * a + (0.0 if bias is None else bias.float())  # type: ignore[union-attr]
        return scale_triton(frames, a, b, pool_size)
    if pool_size != 1:
        frames = max_pool(frames, pool_size, backend=backend)
    pixels = frames.numel() // frames.shape[1]
    if not _takes_kernel(frames, backend, "normalise") or not own or pixels < 2:
        return F.batch_norm(frames, running_mean, running_var, weight, bias, training, momentum, eps)
    from convlstm_fish.ops.triton_kernels import batch_norm_triton

    result, mean, variance = batch_norm_triton(frames, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (pixels / (pixels - 1))).to(running_var.dtype), momentum)
    return result


def _has_windows(frames: Tensor, size: int) -> bool:
    """Whether frames can be pooled; torch says what is wrong with others."""
    return frames.dim() == 4 and frames.numel() > 0 and 1 <= size <= min(frames.shape[2:])


def _takes_kernel(frames: Tensor, backend: str, what: str) -> bool:
    """Whether a kernel of frames runs: where they are on a GPU as the Triton ConvLSTM leaves them, or it is named."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    as_left = frames.device.type == "cuda" and frames.is_contiguous(memory_format=torch.channels_last)
    if backend == "reference" or (backend == "auto" and not (_HAS_TRITON and as_left and not exporting())):
        return False
    if not _HAS_TRITON:
        raise RuntimeError(f"backend='triton' cannot {what}: triton is not installed")
    from convlstm_fish.ops.triton_kernels import frames_unsupported

    reason = frames_unsupported(frames)
    if reason is not None and backend == "triton":
        raise RuntimeError(f"backend='triton' cannot {what}: {reason}")
    return reason is None
