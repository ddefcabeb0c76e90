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
# Launchers that are remembered; each shape of the tensors makes a few. Past it all are made again.
_MOST = 4096
_launchers: dict[tuple[Any, ...], Launcher] = {}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up: without what Triton's asks of its arguments."""
    return -(-a // b)


class Launcher:
    """A kernel with its compile-time constants, to be launched many times; made by :func:`prepare`."""

    def __init__(self, kernel: Any, constants: Mapping[str, Any], num_warps: int, registers: int) -> None:
        self.kernel, self.constants, self.num_warps, self.registers = kernel, dict(constants), num_warps, registers
        # An interpreted kernel has no such list, and no compiled form either.
        self.loose = [kernel.arg_names.index(name) for name in getattr(kernel, "do_not_specialize", ())]
        self.forms: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}

    def form(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
        """What of the arguments decides which compiled form they need: at least as fine as Triton's own rule.

        Returns:
            that, and the arguments with addresses for tensors, which Triton does not ask the driver about. What it
            would be told is in the form: a tensor of another device has one of its own, that is not known.
        """
        form, values = list[Any](), list[Any]()
        for value in args:
            if isinstance(value, Tensor):
                address = value.data_ptr()
                form.append((value.dtype, value.get_device(), address & 15))
                values.append(address)
            else:
                form.append(value)
                values.append(value)
        for position in self.loose:
            if position < len(form) and form[position] is not None:
                form[position] = -_INT32 <= form[position] < _INT32
        return tuple(form), values

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """``kernel[grid](*args, **constants, num_warps=num_warps)``, on the first argument's GPU.

        That need not be the current one. Where it has too little shared memory, fewer stages are tried.
        """
        at = args[0].get_device()  # -1 for memory of the CPU
        if at >= 0 and at != torch._C._cuda_getDevice():
            with torch.cuda.device(at):
                self(grid, *args)
            return
        form, values = self.form(args)
        known = self.forms.get(form)
        if known is not None:
            known[0][(*grid, 1, 1)[:3]](*values, *known[1])
            return
        constants = self.constants
        options = {"num_warps": self.num_warps, "maxnreg": self.registers or None}
        while True:
            try:
                compiled = self.kernel[grid](*args, **constants, **options)
                break
            except OutOfResources:  # the stages were found on GPUs with more shared memory
                fewer = {name: constants[name] - 1 for name in _STAGES if constants.get(name, 0) > 2}
                if not fewer:
                    raise
                constants = {**constants, **fewer}
        if isinstance(compiled, CompiledKernel):
            self.forms[form] = compiled, tuple(constants[name] for name in self.kernel.arg_names[len(args) :])


def prepare(kernel: Any, constants: Mapping[str, Any], num_warps: int, registers: int = 0) -> Launcher:
    """A launcher, the same one for the same arguments.

    Args:
        kernel: a ``triton.jit`` function whose compile-time constants come last.
        constants: the compile-time constants by name.
        num_warps: warps of a program.
        registers: at most so many of a thread; 0 leaves it to the compiler.
    """
    key = (kernel.fn, num_warps, registers, *constants.items())
    found = _launchers.get(key)
    if found is None:
        if len(_launchers) >= _MOST:
            _launchers.clear()
        found = _launchers[key] = Launcher(kernel, constants, num_warps, registers)
    return found


class Variants:
    """Launchers of a kernel for steps that differ in a few of its constants; for the arguments see :func:`prepare`."""

    def __init__(self, kernel: Any, constants: Mapping[str, Any], num_warps: int, registers: int = 0) -> None:
        self.kernel, self.constants, self.num_warps, self.registers = kernel, constants, num_warps, registers
        self.made: dict[tuple[Any, ...], Launcher] = {}

    def __call__(self, **differing: Any) -> Launcher:
        """The one with these constants besides those that all share; by the same names, in one order."""
        key = tuple(differing.values())
        found = self.made.get(key)
        if found is None:
            constants = {**self.constants, **differing}
            found = self.made[key] = prepare(self.kernel, constants, self.num_warps, self.registers)
        return found


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: Mapping[str, Any], num_warps: int,
    registers: int = 0,
) -> None:  # fmt: skip
    """Launches a kernel once; for the arguments see :class:`Launcher` and :func:`prepare`."""
    prepare(kernel, constants, num_warps, registers)(grid, *args)
