"""The CUDA kernels for Hopper GPUs against the float64 reference.

Anywhere, compiled by g++ with ``machine_cpu.h`` in place of what a GPU does: every index, no race. On a GPU they are
what ``test_triton.py`` runs for the layers that they cover, and here beside the Triton kernels.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import TOLERANCE, Case, check, check_not_a_number, check_unrolled, make, relative_error, run
from torch import Tensor

from convlstm_fish.ops import conv_lstm

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("has no need of the interpreter", allow_module_level=True)

from convlstm_fish.ops import triton_kernels
from convlstm_fish.ops.hopper_kernels import compiled, parameters, plan, steps
from convlstm_fish.ops.triton_kernels import op, transpose, weights

FOLDER = Path(compiled.__file__).parent
MACHINE = Path(__file__).with_name("machine_cpu.h")

CASES = {
    "serenity-1": Case(2, 2, 4, 11, 12, 16, hx=False, bias=False, options={"padding": "valid"}),
    "serenity-2": Case(1, 2, 16, 11, 12, 32, hx=False, bias=False, sequences=False, options={"padding": "valid"}),
    "reverse": Case(1, 3, 4, 9, 19, 16, options={"reverse": True, "recurrent_activation": "hard_sigmoid_v3"}),
    "state": Case(2, 2, 16, 9, 8, 32, options={"recurrent_activation": "hard_sigmoid"}),
    "wide-input": Case(1, 2, 32, 6, 9, 16, bias=False),
    "wide-state": Case(1, 2, 4, 10, 7, 32),
    "narrow": Case(3, 2, 16, 3, 40, 16, hx=False),
}


class Emulated:
    """A kernel on the CPU, with what :class:`compiled.Kernel` is used for."""

    def __init__(self, folder: Path, name: str, signature: str, constants: compiled.Constants, threads: int) -> None:
        defines = "".join(f"#define {key} {value}\n" for key, value in constants)
        parts = [MACHINE, FOLDER / "common.cuh", FOLDER / f"{name}.cu"]
        start = f"void start(int x, int y, int threads, void** args) {{ run({name}, x, y, threads, args); }}"
        text = defines + "\n".join(p.read_text() for p in parts) + f'\nextern "C" {start}\n'
        source = folder / f"{name}{len(list(folder.iterdir()))}.cpp"
        source.write_text(text)
        library = source.with_suffix(".so")
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        self.start = ctypes.CDLL(str(library)).start
        self.arguments, self.threads = compiled.Arguments(signature), threads

    def launch(self, grid: tuple[int, int], *args: Tensor | int | None) -> None:
        with self.arguments.packed(args) as pointers:
            self.start(*grid, self.threads, ctypes.c_void_p(pointers))


@pytest.fixture(scope="module")
def emulated_kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emulated]:
    """:func:`compiled.kernel` for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("kernels")

    @functools.cache
    def kernel(device: torch.device, name: str, signature: str, constants: Any, threads: int, shared: int) -> Emulated:
        return Emulated(folder, name, signature, constants, threads)

    return kernel


@pytest.fixture
def emulated(emulated_kernel: Callable[..., Emulated], monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Has the kernels run on the CPU, in memory in which what nobody writes is not a number."""
    monkeypatch.setattr(steps, "kernel", emulated_kernel)
    monkeypatch.setattr(steps, "prepare", lambda *args: None)
    monkeypatch.setattr(plan, "available", lambda device: True)
    monkeypatch.setattr(transpose, "suits", lambda frames: False)
    for module in (op, triton_kernels):
        monkeypatch.setattr(module, "unsupported", lambda *args, **options: None)


@pytest.mark.parametrize(("name", "dtype"), list(zip(CASES, itertools.cycle(["bfloat16", "float16"]))))
def test_reference_and_gradients(name: str, dtype: str, emulated: None) -> None:
    check(CASES[name], op.conv_lstm_triton, getattr(torch, dtype), "cpu", TOLERANCE[dtype])


def test_without_the_gradient_of_the_input(emulated: None) -> None:
    """Then the backward step makes the gradient of h by itself."""
    case, dtype = CASES["reverse"], torch.bfloat16
    tensors = make(case)
    tensors["arguments"] = {name: value.to(dtype).double() for name, value in tensors["arguments"].items()}

    def fixed(x: Tensor, *args: Any, **options: Any) -> Any:
        return op.conv_lstm_triton(x.detach() + 0 * x.sum().detach(), *args, **options)

    whole = run(case, op.conv_lstm_triton, dtype, "cpu", tensors)
    found = run(case, fixed, dtype, "cpu", tensors)
    assert found.pop("d x") is None
    for name, value in found.items():
        assert relative_error(value, whole[name].double()) < 5e-3, name


@pytest.mark.parametrize("case", [CASES["state"], Case(1, 3, 4, 5, 9, 16)], ids=["wide", "fused"])
def test_unrolled(case: Case, emulated: None) -> None:
    check_unrolled("cpu", torch.float16, case, TOLERANCE["float16"])


def test_what_is_not_a_number_stays_so(emulated: None) -> None:
    case = Case(1, 2, 4, 9, 9, 16, options={"recurrent_activation": "hard_sigmoid"})
    check_not_a_number(op.conv_lstm_triton, torch.bfloat16, "cpu", case)


def test_tensors_that_do_not_begin_at_16_bytes(emulated: None) -> None:
    case, dtype = Case(2, 2, 16, 6, 5, 16), torch.bfloat16
    tensors = make(case)

    def moved(image: Tensor) -> Tensor:
        """The same numbers, channels last, two bytes off."""
        memory = torch.empty(image.numel() + 1, dtype=image.dtype)
        rows = memory[1:].view(image.movedim(-3, -1).shape).copy_(image.movedim(-3, -1))
        assert rows.data_ptr() % 16 == 2
        return rows.movedim(-1, -3)

    def function(x: Tensor, hx: tuple[Tensor, Tensor], *args: Any, **options: Any) -> Any:
        off = [Move.apply(x, moved) for x in (x, hx[0])]
        return op.conv_lstm_triton(off[0], (off[1], hx[1]), *args, **options)

    straight = run(case, op.conv_lstm_triton, dtype, "cpu", tensors)
    for name, value in run(case, function, dtype, "cpu", tensors).items():
        assert torch.equal(value, straight[name]), name


class Move(torch.autograd.Function):
    """Another place in memory for a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        return move(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


def test_a_bias_that_does_not_begin_at_16_bytes() -> None:
    bias = torch.rand(65)[1:]
    shape = plan.Shape(4, 16, (6, 5), (6, 5), (1, 1), 0, False, True, True)
    weights = torch.rand(64, 4, 3, 3), torch.rand(64, 16, 3, 3)
    made = parameters.Parameters(shape, torch.bfloat16, *weights, bias).bias
    assert made is not None
    assert made.data_ptr() % 16 == 0
    assert torch.equal(made, bias)


def test_what_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available", lambda device: True)

    def covered(case: Case, dtype: torch.dtype = torch.bfloat16) -> bool:
        found: list[bool] = []

        class Seen(Exception):
            pass

        def look(layer: Any, made: Any, *args: Any) -> None:
            found.append(getattr(made, "steps", None) is not None)
            raise Seen

        monkeypatch.setattr(op, "unsupported", lambda *args, **options: None)
        monkeypatch.setattr(transpose, "suits", lambda frames: False)
        for runs in ("operators", "convolved"):
            monkeypatch.setattr(f"convlstm_fish.ops.triton_kernels.{runs}.run_forward", look)
        with pytest.raises(Seen):
            run(case, op.conv_lstm_triton, dtype, "cpu", make(case))
        return found[0]

    assert covered(CASES["serenity-1"])
    assert covered(CASES["serenity-2"], torch.float16)
    plain = CASES["wide-state"]
    assert not covered(plain, torch.float32)
    for change in (
        {"hidden": 8}, {"hidden": 64}, {"channels": 3}, {"channels": 32}, {"kernel": (5, 5)}, {"kernel_h": (1, 1)},
        {"peephole": "channel"}, {"mask": True}, {"lengths": (2,)}, {"options": {"stride": 2}},
        {"options": {"dilation": 2}}, {"options": {"padding": 2}},
    ):  # fmt: skip
        assert not covered(plain._replace(**change)), change


def test_frames_are_covered_as_far_as_32_bits_count() -> None:
    def fits(side: int) -> bool:
        return plan._fits(plan.Shape(16, 32, (side, side), (side, side), (1, 1), 0, False, True, False))

    assert fits(4095)  # of 128 gates
    assert not fits(4096)


@pytest.mark.skipif(compiled.nvrtc is None, reason="needs NVIDIA's bindings, which come with torch for CUDA")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("channels", "hidden"), [(4, 16), (16, 32), (32, 16), (4, 32)])
def test_compiles_for_hopper(channels: int, hidden: int, half: bool) -> None:
    size = ((30, 40), (28, 38))
    shape = plan.Shape(channels, hidden, *size, (0, 0), 0, half, not half, True)
    plans = {
        "forward_step": [plan.plan_forward(shape)],
        "backward_step": [plan.plan_backward(shape, fused) for fused in {False, shape.fused}],
        "adjoint_step": [plan.plan_adjoint(shape, with_x) for with_x in (False, True)],
        "weight_gradients": [plan.plan_sums(shape)],
    }
    for name, of_kernel in plans.items():
        for made in of_kernel:
            assert made is not None
            code = compiled.compile_source(compiled.source(name, made.constants))
            assert code.startswith(b"\x7fELF")
            assert name.encode() in code


@pytest.mark.skipif(compiled.nvrtc is None, reason="needs NVIDIA's bindings, which come with torch for CUDA")
def test_a_refused_program_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"NVRTC cannot compile a kernel: .*undefined"):
        compiled.compile_source("int f() { return nothing; }")


def test_arguments_are_counted_and_laid_out() -> None:
    arguments = compiled.Arguments("pil")
    tensor = torch.zeros(3)
    with arguments.packed((tensor, -5, 1 << 40)) as address:
        values = (ctypes.c_void_p * 3).from_address(address)
        assert ctypes.c_void_p.from_address(values[0] or 0).value == tensor.data_ptr()
        assert ctypes.c_int.from_address(values[1] or 0).value == -5
        assert ctypes.c_longlong.from_address(values[2] or 0).value == 1 << 40
    with pytest.raises(struct.error), arguments.packed((tensor, 1)):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [16, 32])
def test_beside_the_triton_kernels(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    case = Case(5, 6, 4 if hidden == 16 else 16, 61, 83, hidden, hx=False, bias=False, options={"padding": "valid"})
    tensors = make(case)

    def function(*args: Any, **options: Any) -> Any:
        return conv_lstm(*args, **options, backend="triton")

    launches = []
    launch = compiled.Kernel.launch
    monkeypatch.setattr(compiled.Kernel, "launch", lambda *args: (launches.append(args), launch(*args)))
    found, again = (run(case, function, torch.bfloat16, "cuda", tensors) for _ in range(2))
    assert launches
    launches.clear()
    monkeypatch.setattr(weights, "covers", lambda *args: False)
    other = run(case, function, torch.bfloat16, "cuda", tensors)
    for name, value in found.items():
        assert torch.equal(value, again[name]), f"{name} differs from run to run"
        assert relative_error(value, other[name].double()) < TOLERANCE["bfloat16"], name
    assert not launches, "the same kernels ran twice"
