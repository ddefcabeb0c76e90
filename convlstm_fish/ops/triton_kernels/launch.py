"""Launching a kernel again without asking Triton which of its compiled forms fits: most of what a launch costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

_INT32 = 1 << 31
# How many blocks a kernel copies ahead into shared memory.
_STAGES = ("STAGES", "STAGES_BACK")
# Forms that are remembered; each shape of the tensors makes a few. Past it all are asked for again.
_MOST = 4096
_forms: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}


def _form(value: Any, specialised: bool) -> Any:
    """What of an argument decides which compiled form it needs: at least as fine as Triton's own rule."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16
    if specialised or value is None:
        return value
    return -_INT32 <= value < _INT32


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: Mapping[str, Any], num_warps: int,
    registers: int = 0,
) -> None:  # fmt: skip
    """``kernel[grid](*args, **constants, num_warps=num_warps)``, sooner from the second time on.

    Args:
        kernel: a ``triton.jit`` function whose compile-time constants come last.
        grid: programs in up to three dimensions.
        args: the other arguments, all of them, in order.
        constants: the compile-time constants by name.
        num_warps: warps of a program.
        registers: at most so many of a thread; 0 leaves it to the compiler.

    It runs on the first argument's GPU, which need not be the current one. Where that has too little shared memory,
    fewer stages are tried.
    """
    at = args[0].get_device()  # -1 for memory of the CPU
    if at >= 0 and at != torch.cuda.current_device():
        with torch.cuda.device(at):
            launch(kernel, grid, args, constants, num_warps, registers)
        return
    values = tuple(constants[name] for name in kernel.arg_names[len(args) :])
    # An interpreted kernel has no such list, and no compiled form either.
    loose = getattr(kernel, "do_not_specialize", ())
    form = tuple(_form(value, name not in loose) for name, value in zip(kernel.arg_names, args))
    device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    key = (kernel.fn, device, num_warps, registers, values, form)
    known = _forms.get(key)
    if known is not None:
        known[0][(*grid, 1, 1)[:3]](*args, *known[1])
        return
    while True:
        try:
            compiled = kernel[grid](*args, **constants, num_warps=num_warps, maxnreg=registers or None)
            break
        except OutOfResources:  # the stages were found on GPUs with more shared memory
            fewer = {name: constants[name] - 1 for name in _STAGES if constants.get(name, 0) > 2}
            if not fewer:
                raise
            constants = {**constants, **fewer}
    if isinstance(compiled, CompiledKernel):
        if len(_forms) >= _MOST:
            _forms.clear()
        _forms[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
