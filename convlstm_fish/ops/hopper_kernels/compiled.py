"""Kernels compiled by NVRTC for the sizes of a layer, and launched."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import struct
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.cache import get_cache_manager

try:
    from cuda.bindings import driver, nvrtc
except ImportError:  # a torch for the CPU comes without
    driver = nvrtc = None

_FOLDER = Path(__file__).parent
# Of a multiprocessor, for all of its programs; each takes a little more than it asks for.
SHARED_BYTES = 227 << 10
SHARED_EACH = 1 << 10

Constants = tuple[tuple[str, int], ...]

_OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17", "--use_fast_math", "-default-device")


def aligned(values: Tensor) -> Tensor:
    """The tensor, moved if it does not begin where 16 bytes can be read at once."""
    return values if values.data_ptr() % 16 == 0 else values.clone(memory_format=torch.contiguous_format)


@functools.cache
def _compiler() -> bool:
    """Whether NVIDIA's bindings, which torch for CUDA depends on, find the compiler."""
    try:
        return nvrtc is not None and int(nvrtc.nvrtcVersion()[0]) == 0
    except RuntimeError as error:
        warnings.warn(f"layers of 16 and 32 channels run on slower kernels: {error}", stacklevel=2)
        return False


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run there: on a Hopper GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0) and _compiler()


def _product(columns: int, half: bool) -> str:
    """The product of 64 rows, 16 deep, with so many columns, as C++."""
    count = columns // 2
    numbers = ", ".join(f"%{i}" for i in range(count))
    results = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    kind = "f16" if half else "bf16"
    name = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"
    fragment = ", ".join(f"%{count + i}" for i in range(4))
    return f"""
template <> struct Product<{columns}> {{
    DEVICE static void add(float (&d)[{count}], u64 a, u64 b, int keep) {{
        asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 2}, 0; {name} {{{numbers}}}, %{count}, %{count + 1}, "
                     "p, 1, 1, 0, 0;}}" : {results} : "l"(a), "l"(b), "r"(keep));
    }}
    DEVICE static void add_transposed(float (&d)[{count}], const u32 (&a)[4], u64 b) {{
        asm volatile("{{.reg .pred p; setp.ne.b32 p, 1, 0; {name} {{{numbers}}}, {{{fragment}}}, %{count + 4}, "
                     "p, 1, 1, 1;}}" : {results} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }}
}};
"""


def source(name: str, constants: Constants) -> str:
    """The program text of kernel ``name``."""
    known = dict(constants)
    products = {16, 64, 4 * known["HIDDEN"], known["HIDDEN"] + known["C_X"]}
    defines = "".join(f"#define {key} {value}\n" for key, value in constants)
    machine = (_FOLDER / "machine.cuh").read_text()
    made = "template <int N> struct Product;" + "".join(_product(n, bool(known["HALF"])) for n in sorted(products))
    return "\n".join(
        [defines, machine, made, (_FOLDER / "common.cuh").read_text(), (_FOLDER / f"{name}.cu").read_text()]
    )


def compile_source(text: str) -> bytes:
    """Machine code.

    Raises:
        RuntimeError: the compiler refused the text.
    """
    _, program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []))
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(_OPTIONS), [option.encode() for option in _OPTIONS])
    if int(failed) != 0:
        _, size = _checked(nvrtc.nvrtcGetProgramLogSize(program))
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC cannot compile a kernel: {log.decode().strip()}")
    _, size = _checked(nvrtc.nvrtcGetCUBINSize(program))
    code = b" " * size
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _machine_code(name: str, text: str) -> bytes:
    """Compiled once a machine: it is kept where Triton keeps its own."""
    major, minor = _checked(nvrtc.nvrtcVersion())[1:]
    cache = get_cache_manager(hashlib.sha256(f"{major}.{minor} {_OPTIONS} {text}".encode()).hexdigest())
    kept = cache.get_file(f"{name}.cubin")
    if kept is None:
        kept = cache.put(compile_source(text), f"{name}.cubin", binary=True)
    return Path(kept).read_bytes()


@functools.cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, "nvrtc")


@functools.lru_cache(maxsize=1024)
def prepare(name: str, constants: Constants) -> Future[bytes]:
    """Starts to compile a kernel in the background: several take as long as the slowest of them.

    On a machine where they have not run before, which is to be looked at with a fresh CUDA_CACHE_PATH as well.
    """
    return _background().submit(_machine_code, name, source(name, constants))


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise RuntimeError(f"CUDA reports {result[0].name}")
    return result


class Kernel:
    """A compiled kernel on one GPU.

    Args:
        name: of the kernel and of its file.
        signature: see :class:`Arguments`.
        constants: what it knows when it is compiled.
        threads: of a program.
        shared: bytes of shared memory of a program.
    """

    def __init__(self, name: str, signature: str, constants: Constants, threads: int, shared: int) -> None:
        try:
            code = prepare(name, constants).result()
        except Exception:
            prepare.cache_clear()  # a disk that was full may have room the next time
            raise
        torch.cuda.current_stream()  # makes the context that the module is loaded into
        _, self.module = _checked(driver.cuModuleLoadData(code))
        _, self.function = _checked(driver.cuModuleGetFunction(self.module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self.function, limit, shared))
        self.arguments = Arguments(signature)
        self.device, self.threads, self.shared = torch.cuda.current_device(), threads, shared

    def launch(self, grid: tuple[int, int], *args: Tensor | int | None) -> None:
        """Runs it on the current stream of its GPU."""
        if torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                self.launch(grid, *args)
            return
        stream = torch.cuda.current_stream(self.device).cuda_stream
        with self.arguments.packed(args) as pointers:
            result = driver.cuLaunchKernel(
                self.function, *grid, 1, self.threads, 1, 1, self.shared, stream, pointers, 0
            )
        _checked(result)


class Arguments:
    """The memory that a kernel's arguments are handed over in: an array of pointers to values of 8 bytes each.

    Args:
        signature: a letter an argument: p a pointer (a tensor or None), i and l integers of 32 and 64 bits.
    """

    def __init__(self, signature: str) -> None:
        self._layout = struct.Struct("=" + "".join("Q" if letter == "p" else "q" for letter in signature))
        self._values = ctypes.create_string_buffer(self._layout.size)
        start = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * len(signature))(*range(start, start + self._layout.size, 8))
        self._lock = threading.Lock()  # a backward pass has a thread of its own

    @contextlib.contextmanager
    def packed(self, args: tuple[Tensor | int | None, ...]) -> Iterator[int]:
        """The address of the pointers, while nobody else writes the values.

        Raises:
            struct.error: too many or too few of them.
        """
        values = [a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in args]
        with self._lock:
            self._layout.pack_into(self._values, 0, *values)
            yield ctypes.addressof(self._pointers)


@functools.lru_cache(maxsize=1024)
def kernel(device: torch.device, name: str, signature: str, constants: Constants, threads: int, shared: int) -> Kernel:
    """The kernel on a GPU, compiled and loaded once."""
    with torch.cuda.device(device):
        return Kernel(name, signature, constants, threads, shared)
