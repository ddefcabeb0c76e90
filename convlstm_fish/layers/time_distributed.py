"""Any module of single frames, applied to every frame of a clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convlstm_fish.layers.lengths import as_lengths
from convlstm_fish.ops.checks import check_lengths
from convlstm_fish.ops.packing import blank_padding, pack, schedule, unpack, valid_steps
from convlstm_fish.ops.reference import exporting


class TimeDistributed(nn.Module):
    """Applies ``module`` to every time step of (N, T, ...), as Keras's layer of that name does.

    Args:
        module: takes (frames, ...) and returns (frames, ...).
        batch_first: clips are (N, T, ...), or (T, N, ...) if False.

    Inputs: x (N, T, ...); ``lengths`` (N,) or None. With lengths the module sees only the frames that exist (a batch
        norm's statistics do not count padding) and the output is zero past them. A graph cannot depend on the values
        of lengths, so that an exported or compiled one runs the module on all frames, those past the end made zero:
        export in evaluation mode. A batch norm in training breaks a compiled graph instead, so that it sees what
        exists.

    Outputs: (N, T, ...).

    Example:
        >>> TimeDistributed(nn.MaxPool2d(2))(torch.rand(2, 5, 3, 8, 8)).shape
        torch.Size([2, 5, 3, 4, 4])
    """

    def __init__(self, module: nn.Module, *, batch_first: bool = True) -> None:
        super().__init__()
        self.module = module
        self.batch_first = batch_first

    def forward(self, x: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """See the class."""
        if not self.batch_first:
            return self.apply_to(self.module, x.transpose(0, 1), lengths).transpose(0, 1)
        return self.apply_to(self.module, x, lengths)

    @staticmethod
    def apply_to(module: nn.Module, x: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """The same without a wrapper: ``module`` on every frame of x (N, T, ...)."""
        if x.dim() < 3:
            raise ValueError(f"x must be (N, T, ...) with at least three dimensions, got {tuple(x.shape)}")
        clips, steps = x.shape[:2]
        lengths = as_lengths(lengths)
        if lengths is None:
            return module(x.flatten(0, 1)).unflatten(0, (clips, steps))
        check_lengths(lengths, clips, steps)
        if exporting() or (torch.compiler.is_dynamo_compiling() and not _mixes_frames(module)):
            valid = valid_steps(lengths, steps, x.device)
            frames = blank_padding(x, valid).flatten(0, 1)
            return blank_padding(module(frames).unflatten(0, (clips, steps)), valid)
        plan = schedule(lengths, clips, steps, x.device)
        return unpack(module(pack(x, plan)), plan, clips, steps)


def _mixes_frames(module: nn.Module) -> bool:
    """Whether what the module makes of a frame depends on the others: batch statistics."""
    return any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in module.modules())
