"""NonFiniteGuard: training stops before a loss or gradient that is not a number reaches the weights."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from convlstm_fish.errors import UserError


class NonFiniteError(UserError):
    """Training met a loss, gradient or weight that is infinite or not a number."""


class NonFiniteGuard(pl.Callback):
    """Checks loss and gradients before each optimizer step, and weights before each checkpoint.

    Left alone, one NaN makes every weight NaN, and the run goes on to its end and saves them.

    Under float16 with a gradient scaler, gradients overflow now and then; the scaler leaves out the step and scales
    down. Only ``max_skipped_steps`` such steps in a row are accepted.

    Args:
        max_skipped_steps: see above.
    """

    def __init__(self, max_skipped_steps: int = 20) -> None:
        if max_skipped_steps < 1:
            raise UserError(f"max_skipped_steps must be at least 1, got {max_skipped_steps}")
        self.max_skipped_steps = max_skipped_steps
        self._skipped = 0
        self._batch: Any = None
        self._seen: list[tuple[Tensor, Any]] = []  # loss and clips of the batches since the last optimizer step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember which clips the coming loss belongs to."""
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Remember the loss; looking at it here would make the GPU wait."""
        self._seen.append((loss.detach(), self._batch.get("index") if isinstance(self._batch, dict) else None))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Raise before the step if the loss or a gradient is not finite.

        Raises:
            NonFiniteError: naming the step and the clips.
        """
        losses = torch.stack([loss.float() for loss, _ in self._seen])
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # max |g| is finite exactly if every gradient is, and cannot overflow as a sum of squares does.
        peaks = torch.stack([g.float() for g in torch._foreach_norm(gradients, float("inf"))]) if gradients else losses
        fine = torch.stack([losses.isfinite().all(), peaks.isfinite().all()]).tolist()  # the one wait per step
        seen, self._seen = self._seen, []
        if all(fine):
            self._skipped = 0
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if fine[0] and scaled:
            self._skipped += 1
            if self._skipped <= self.max_skipped_steps:
                return  # the scaler leaves this step out
        clips = [index for loss, index in seen if index is not None and (fine[0] or not bool(loss.isfinite()))]
        named = ", ".join(str(n) for index in clips for n in torch.as_tensor(index).flatten().tolist())
        what = "gradient" if fine[0] else "loss"
        again = f" {self._skipped} times in a row" if fine[0] and scaled else ""
        raise NonFiniteError(
            f"step {trainer.global_step}: the {what} is not a finite number{again}; nothing of it reached the weights"
            + (f"; clips {named}" if named else "")
        )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save weights that are not finite.

        Raises:
            NonFiniteError: naming the first such array.
        """
        for name, value in checkpoint["state_dict"].items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise NonFiniteError(f"step {trainer.global_step}: {name} is not finite, so no checkpoint is written")
