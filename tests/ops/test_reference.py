"""The plain PyTorch ConvLSTM against a NumPy loop over the equations, and against itself where the answer is known."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from convlstm_fish.ops import conv_lstm_reference, geometry
from convlstm_fish.ops.equations import Norm

# Relative to the largest value. One table for all tests of this file; a test that needs more has found a fault.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def difference(found: Tensor, expected: Tensor | np.ndarray) -> float:
    """Largest difference, relative to the largest expected value; infinite where one is not a number."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    if found.shape != wanted.shape or not torch.isfinite(found).all():
        return float("inf")
    if wanted.numel() == 0:
        return 0.0
    return float((found.detach().double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3))


# --- The judge: NumPy, one step after the other, the equations as they are printed. ---

ACTIVATIONS = {
    "sigmoid": lambda z: 1.0 / (1.0 + np.exp(-z)),
    "hard_sigmoid": lambda z: np.clip(0.2 * z + 0.5, 0.0, 1.0),
    "hard_sigmoid_v3": lambda z: np.clip(z + 3.0, 0.0, 6.0) / 6.0,
}


def numpy_convolution(x: np.ndarray, w: np.ndarray, stride: Any, pads: Any, dilation: Any) -> np.ndarray:
    """Cross-correlation of (N, C, *spatial) with (O, C, *kernel), one kernel element after the other."""
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], w.shape[2:], stride, dilation)]
    out = np.zeros((len(x), len(w), *sizes))
    for offset in np.ndindex(*w.shape[2:]):
        window = tuple(slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, n, s in zip(offset, dilation, sizes, stride))
        out += np.einsum("nc...,oc->no...", x[(slice(None), slice(None), *window)], w[(..., *offset)])
    return out


def numpy_conv_lstm(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, h_n and c_n of one call, clip by clip and step by step."""
    a = {k: v.detach().numpy() if isinstance(v, Tensor) else v for k, v in case.items()}
    x, w_x, w_h = a["input"], a["weight_ih"], a["weight_hh"]
    dims, hidden = x.ndim - 3, w_h.shape[1]
    sigma = ACTIVATIONS[a["activation"]]
    where = geometry(x.shape[3:], w_x.shape[2:], a["stride"], a["padding"], a["dilation"])
    inner = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in w_h.shape[2:]]
    ones = (1,) * dims
    bias = a["bias"].reshape(-1, *ones) if a["bias"] is not None else 0.0
    w_ci, w_cf, w_co = (p.detach().numpy() for p in a["peephole"]) if a["peephole"] is not None else (0.0, 0.0, 0.0)
    output = np.zeros((*x.shape[:2], hidden, *where.out))
    h_n, c_n = np.zeros((len(x), hidden, *where.out)), np.zeros((len(x), hidden, *where.out))
    for n in range(len(x)):
        h, c = (s.detach().numpy()[n : n + 1] for s in a["hx"])
        steps = range(x.shape[1] if a["lengths"] is None else a["lengths"][n])
        for t in reversed(steps) if a["reverse"] else steps:
            masked = h if a["mask"] is None else h * a["mask"][n : n + 1]
            z = numpy_convolution(x[n : n + 1, t], w_x, where.stride, where.pads, where.dilation)
            z = z + numpy_convolution(masked, w_h, ones, inner, ones) + bias
            z_i, z_f, z_g, z_o = np.split(z, 4, axis=1)
            i, f = sigma(z_i + w_ci * c), sigma(z_f + w_cf * c)
            c = f * c + i * np.tanh(z_g)
            h = sigma(z_o + w_co * c) * np.tanh(c)
            output[n, t] = h[0]
        h_n[n], c_n[n] = h[0], c[0]
    return output, h_n, c_n


def make(
    seed: int = 0,
    clips: int = 3,
    steps: int = 4,
    channels: int = 5,
    hidden: int = 3,
    size: tuple[int, ...] = (6, 7),
    kernel: tuple[int, ...] = (3, 3),
    *,
    kernel_h: tuple[int, ...] | None = None,
    stride: Any = 1,
    padding: Any = "same",
    dilation: Any = 1,
    bias: bool = True,
    peephole: str | None = None,
    activation: str = "sigmoid",
    mask: bool = False,
    lengths: list[int] | None = None,
    reverse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """A call with random tensors, all of which want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    out = geometry(size, kernel, stride, padding, dilation).out
    shape = {"channel": (hidden, *[1] * len(size)), "pixel": (hidden, *out), None: None}[peephole]
    return {
        "input": random(clips, steps, channels, *size),
        "hx": (random(clips, hidden, *out), random(clips, hidden, *out)),
        "weight_ih": random(4 * hidden, channels, *kernel),
        "weight_hh": random(4 * hidden, hidden, *(kernel_h or kernel)),
        "bias": random(4 * hidden) if bias else None,
        "peephole": None if shape is None else tuple(random(*shape) for _ in range(3)),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "activation": activation,
        "mask": random(clips, hidden, *out) if mask else None,
        "lengths": None if lengths is None else torch.tensor(lengths),
        "reverse": reverse,
    }


def run(case: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """output, h_n, c_n of the reference."""
    names = {"activation": "recurrent_activation", "mask": "recurrent_mask"}
    output, (h_n, c_n) = conv_lstm_reference(**{names.get(k, k): v for k, v in case.items()}, **options)
    return output, h_n, c_n


def gradients(case: dict[str, Any], outputs: tuple[Tensor, ...], seed: int = 5) -> list[Tensor]:
    """All gradients for random cotangents of all outputs."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum() for y in outputs)
    leaves = [x for v in case.values() for x in (v if isinstance(v, tuple) else (v,)) if isinstance(x, Tensor)]
    return list(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad]))


@pytest.mark.parametrize("peephole", [None, "channel", "pixel"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_equals_the_printed_equations(activation: str, peephole: str | None) -> None:
    case = make(activation=activation, peephole=peephole, mask=True)
    for found, expected in zip(run(case), numpy_conv_lstm(case)):
        assert difference(found, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "valid"},
        {"padding": (0, 2)},
        {"padding": 1, "kernel": (4, 4), "kernel_h": (3, 2)},
        {"kernel": (2, 4)},
        {"kernel": (1, 5), "kernel_h": (5, 1)},
        {"stride": 2},
        {"stride": (3, 2), "kernel": (2, 5)},
        {"stride": 2, "padding": "valid"},
        {"dilation": (2, 3)},
        {"dilation": 2, "padding": "valid"},
        {"dilation": 2, "stride": 2, "kernel": (3, 2)},
        {"bias": False},
        {"steps": 1},
        {"clips": 1, "steps": 63, "hidden": 2, "size": (3, 4)},
        {"hidden": 1, "channels": 1, "size": (1, 1)},
        {"size": (2, 9), "kernel": (5, 5)},
        {"reverse": True, "peephole": "channel"},
        {"lengths": [2, 4, 1], "peephole": "pixel", "mask": True},
        {"lengths": [3, 3, 2], "reverse": True, "mask": True},
        {"size": (9,), "kernel": (3,)},
        {"size": (9,), "kernel": (4,), "stride": 2, "peephole": "pixel", "lengths": [4, 1, 2]},
        {"size": (3, 4, 5), "kernel": (3, 2, 1), "peephole": "channel"},
        {"size": (5, 4, 5), "kernel": (3, 2, 3), "padding": "valid", "stride": (2, 1, 1), "reverse": True},
    ],
    ids=str,
)
def test_equals_the_printed_equations_in_every_geometry(options: dict[str, Any]) -> None:
    case = make(**options)
    for found, expected in zip(run(case), numpy_conv_lstm(case)):
        assert difference(found, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_near_float64(dtype: torch.dtype) -> None:
    case = make(dtype=dtype, peephole="channel", steps=6, mask=True)
    case["weight_ih"], case["weight_hh"] = (
        (w * 0.2).detach().requires_grad_() for w in (case["weight_ih"], case["weight_hh"])
    )
    exact = {
        k: tuple(x.detach().double().requires_grad_() for x in v)
        if isinstance(v, tuple) and isinstance(v[0], Tensor)
        else v.detach().double().requires_grad_()
        if isinstance(v, Tensor)
        else v
        for k, v in case.items()
    }
    found, expected = run(case), run(exact)
    assert found[0].dtype == found[1].dtype == dtype
    assert found[2].dtype == (torch.float32 if dtype.itemsize == 2 else dtype), "c is wide"
    for one, other in zip(found, expected):
        assert difference(one, other.detach()) < TOLERANCE[dtype]
    for one, other in zip(gradients(case, found), gradients(exact, expected)):
        assert one.dtype == dtype
        assert difference(one, other) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_c_in_float32(dtype: torch.dtype) -> None:
    case = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        output, h_n, c_n = run(case)
    assert (output.dtype, h_n.dtype, c_n.dtype) == (dtype, dtype, torch.float32)
    for grad in gradients(case, (output, h_n, c_n)):
        assert grad.dtype == torch.float32
        assert torch.isfinite(grad).all()
    assert not torch.equal(c_n, c_n.to(dtype).float()), "c was rounded to 16 bits"
    for found, expected in zip((output, h_n, c_n), run(case)):
        assert difference(found, expected.detach()) < 2 * TOLERANCE[dtype]


def test_autocast_leaves_float64_alone() -> None:
    case = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(case)
    for one, other in zip(found, run(case)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_equal_each_clip_alone(reverse: bool) -> None:
    lengths = [2, 5, 1, 5]
    case = make(clips=4, steps=6, lengths=lengths, reverse=reverse, peephole="channel", mask=True)
    outputs = run(case)
    found = gradients(case, outputs)
    alone_outputs: list[list[Tensor]] = [[], [], []]
    for n, length in enumerate(lengths):
        alone = {
            **case,
            "input": case["input"][n : n + 1, :length],
            "hx": tuple(s[n : n + 1] for s in case["hx"]),
            "mask": case["mask"][n : n + 1],
            "lengths": None,
        }
        output, h_n, c_n = run(alone)
        padded = torch.cat([output, output.new_zeros(1, 6 - length, *output.shape[2:])], dim=1)
        for parts, part in zip(alone_outputs, (padded, h_n, c_n)):
            parts.append(part)
    expected = tuple(torch.cat(parts) for parts in alone_outputs)
    for one, other in zip(outputs, expected):
        assert difference(one, other.detach()) < TOLERANCE[torch.float64]
    for one, other in zip(found, gradients(case, expected)):
        assert difference(one, other) < TOLERANCE[torch.float64]


def test_padding_is_never_read() -> None:
    case = make(lengths=[2, 4, 3])
    clean = run(case)
    with torch.no_grad():
        for n, length in enumerate(case["lengths"].tolist()):
            case["input"][n, length:] = float("nan")
    for one, other in zip(run(case), clean):
        assert torch.equal(one, other)
    for grad in gradients(case, run(case)):
        assert torch.isfinite(grad).all()
    d_input = gradients(case, run(case))[0]
    assert all(d_input[n, length:].eq(0).all() for n, length in enumerate(case["lengths"].tolist()))


def test_no_work_is_spent_on_padding() -> None:
    def flops(**options: Any) -> int:
        case = make(clips=4, steps=20, **options)
        with FlopCounterMode(display=False) as counter:
            gradients(case, run(case)[:1])
        return counter.get_total_flops()

    assert flops(lengths=[20, 1, 1, 1]) < 0.3 * flops()
    assert flops(lengths=[20, 1, 1, 1], reverse=True) < 0.3 * flops()


def test_uninitialised_memory_is_not_read() -> None:
    case = make(lengths=[2, 4, 3], peephole="pixel")
    clean = run(case)
    expected = gradients(case, clean)
    torch.use_deterministic_algorithms(True)  # fills every new tensor with NaN
    try:
        assert torch.empty(3).isnan().all()
        found = run(case)
        grads = gradients(case, found)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip([*found, *grads], [*clean, *expected]):
        assert difference(one, other.detach()) < TOLERANCE[torch.float64]


def test_strided_views_give_the_same() -> None:
    case = make(size=(6, 8))
    plain = run(case)
    wide = torch.zeros(6, 4, 10, 8, 6, dtype=torch.float64)
    view = wide.transpose(3, 4)[::2, :, ::2]
    with torch.no_grad():
        view.copy_(case["input"])
    assert not view.is_contiguous()
    for one, other in zip(run({**case, "input": view}), plain):
        assert difference(one, other.detach()) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("every", [1, 2, 3, 50])
@pytest.mark.parametrize("options", [{}, {"lengths": [2, 7, 4]}, {"lengths": [7, 7, 3], "reverse": True}], ids=str)
def test_checkpointing_changes_nothing(options: dict[str, Any], every: int) -> None:
    case = make(steps=7, peephole="channel", mask=True, **options)
    plain, kept = run(case), run(case, checkpoint_every=every)
    for one, other in zip(kept, plain):
        assert torch.equal(one, other)
    for one, other in zip(gradients(case, kept), gradients(case, plain)):
        assert difference(one, other) < TOLERANCE[torch.float64]


def test_checkpointing_keeps_less() -> None:
    def kept(**options: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        case = make(steps=32, hidden=8, size=(16, 16))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = run(case, return_sequences=False, **options)
        assert out[1].requires_grad
        return sum(sizes.values())

    assert kept(checkpoint_every=8) < 0.25 * kept()


@pytest.mark.parametrize("reverse", [False, True])
def test_whole_clip_equals_its_pieces(reverse: bool) -> None:
    case = make(steps=7, peephole="pixel", reverse=reverse, padding="valid")
    whole = run(case)
    state, outputs = case["hx"], []
    edges = [0, 1, 4, 7]
    for first, last in sorted(pairwise(edges), reverse=reverse):
        output, *state = run({**case, "input": case["input"][:, first:last], "hx": tuple(state)})
        outputs.append(output)
    pieces = (torch.cat(outputs[::-1] if reverse else outputs, dim=1), *state)
    for one, other in zip(pieces, whole):
        assert difference(one, other.detach()) < TOLERANCE[torch.float64]
    for one, other in zip(gradients(case, pieces), gradients(case, whole)):
        assert difference(one, other) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    "options", [{}, {"lengths": [2, 4, 7]}, {"reverse": True}, {"lengths": [2, 7, 4], "reverse": True}], ids=str
)
def test_truncated_back_propagation_cuts_where_it_says(options: dict[str, Any]) -> None:
    case = make(steps=7, **options)
    case["lengths"] = torch.tensor([7, 7, 7]) if case["lengths"] is None else case["lengths"]
    outputs = run(case, detach_every=3)
    for one, other in zip(outputs, run(case)):
        assert torch.equal(one, other)
    outputs[1].sum().backward()  # h_n sees the last window of three steps only
    reach = case["input"].grad.abs().flatten(2).amax(2) > 0
    for n, length in enumerate(case["lengths"].tolist()):
        last = 0 if case["reverse"] else length - 1
        expected = [t < length and t // 3 == last // 3 for t in range(7)]
        assert reach[n].tolist() == expected


def test_without_sequences_the_state_is_the_same() -> None:
    case = make(lengths=[2, 4, 3], reverse=True)
    output, h_n, c_n = run(case, return_sequences=False)
    assert output is None
    assert torch.equal(h_n, run(case)[1])
    assert torch.equal(c_n, run(case)[2])


def test_inference_of_a_longer_clip_makes_no_larger_tensor() -> None:
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for x in made if isinstance(made, tuple | list) else (made,):
                if isinstance(x, Tensor):
                    self.bytes = max(self.bytes, x.nbytes)
            return made

    def largest(steps: int) -> int:
        case = make(steps=steps, clips=1, channels=1, hidden=16, size=(64, 64))
        with torch.no_grad(), Largest() as seen:
            run(case, return_sequences=False)
        return seen.bytes

    assert largest(60) == largest(30)


def test_norm_is_layer_norm() -> None:
    """One group, one pixel: torch.nn.functional.layer_norm over the channels, as Ba et al. write it."""
    case = make(size=(1, 1), kernel=(1, 1), steps=3)
    hidden = 3
    generator = torch.Generator().manual_seed(3)
    gains = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (12, 12, hidden, hidden)]
    found = run(case, norm=Norm(1, 1, *gains))
    flat = torch.nn.functional.layer_norm
    h, c = (s[:, :, 0, 0] for s in case["hx"])
    w_x, w_h = case["weight_ih"][:, :, 0, 0], case["weight_hh"][:, :, 0, 0]
    for t in range(3):
        z = (
            flat(case["input"][:, t, :, 0, 0] @ w_x.T, (12,), gains[0])
            + flat(h @ w_h.T, (12,), gains[1])
            + case["bias"]
        )
        i, f, g, o = z.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * flat(c, (hidden,), gains[2], gains[3]).tanh()
        assert difference(found[0][:, t, :, 0, 0], h.detach()) < TOLERANCE[torch.float64]


def test_group_norm_takes_statistics_of_each_gate() -> None:
    """Scaling one gate's kernels changes nothing where that gate is a group by itself."""
    case = make()
    gains = [torch.ones(n, dtype=torch.float64) for n in (12, 12, 3)] + [torch.zeros(3, dtype=torch.float64)]
    scale = torch.tensor([1.0, 7.0, 1.0, 1.0], dtype=torch.float64).repeat_interleave(3).view(-1, 1, 1, 1)
    scaled = {**case, "weight_ih": case["weight_ih"] * scale, "weight_hh": case["weight_hh"] * scale}
    by_gate, by_all = (Norm(groups, 1, *gains, eps=0.0) for groups in (4, 1))
    assert difference(run(scaled, norm=by_gate)[0], run(case, norm=by_gate)[0].detach()) < TOLERANCE[torch.float64]
    assert difference(run(scaled, norm=by_all)[0], run(case, norm=by_all)[0].detach()) > 1e-2
