"""NonFiniteGuard: training stops before a loss or gradient that is not a number reaches the weights."""

from __future__ import annotations

from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from torch import Tensor

from convlstm_fish.errors import UserError
from convlstm_fish.tasks.callbacks.late import Late


class NonFiniteError(UserError):
    """Training met a loss, gradient or weight that is infinite or not a number."""


class NonFiniteGuard(pl.Callback):
    """Checks loss and gradients before each optimizer step, and weights before each checkpoint.

    Left alone, one NaN makes every weight NaN, and the run goes on to its end and saves them.

    Under float16 with a gradient scaler, gradients overflow now and then; the scaler leaves out the step and scales
    down. Only ``max_skipped_steps`` such steps in a row are accepted.

    With a fused optimizer of torch (``Adam(fused=True)``) the GPU itself leaves out a step that is not finite, and
    the host, instead of waiting for the GPU in each step, is told before the next one.

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
        self._last: tuple[Late, list[tuple[Tensor, Any]], int] | None = None  # what was not looked at yet
        self._optimizer: Any = None

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
        """Raise before the step if the loss or a gradient is not finite, or was in the step before.

        Raises:
            NonFiniteError: naming the step and the clips.
        """
        self._look_back()
        losses = torch.stack([loss.float() for loss, _ in self._seen])
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # max |g| is finite exactly if every gradient is, and cannot overflow as a sum of squares does.
        peaks = torch.stack([g.float() for g in torch._foreach_norm(gradients, float("inf"))]) if gradients else losses
        finite = torch.stack([losses.isfinite().all(), peaks.isfinite().all()])
        seen, self._seen = self._seen, []
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if not scaled and all(group.get("fused") for group in optimizer.param_groups):
            # As a gradient scaler tells a fused optimizer, which then leaves weights and moments as they are.
            self._optimizer = optimizer
            self._optimizer.found_inf = 1.0 - finite.all().float()
            self._last = Late(finite), seen, trainer.global_step
            return
        fine = finite.tolist()  # the one wait per step
        if all(fine):
            self._skipped = 0
            return
        if fine[0] and scaled:
            self._skipped += 1
            if self._skipped <= self.max_skipped_steps:
                return  # the scaler leaves this step out
        self._refuse(fine, seen, trainer.global_step, f" {self._skipped} times in a row" if fine[0] and scaled else "")

    def _look_back(self) -> None:
        """Raise if the step before was not finite."""
        if self._last is None:
            return
        (late, seen, step), self._last = self._last, None
        fine = late.read().tolist()
        if not all(fine):
            self._refuse(fine, seen, step)

    def _refuse(self, fine: list[bool], seen: list[tuple[Tensor, Any]], step: int, again: str = "") -> NoReturn:
        clips = [index for loss, index in seen if index is not None and (fine[0] or not bool(loss.isfinite()))]
        named = ", ".join(str(n) for index in clips for n in torch.as_tensor(index).flatten().tolist())
        what = "gradient" if fine[0] else "loss"
        raise NonFiniteError(
            f"step {step}: the {what} is not a finite number{again}; nothing of it reached the weights"
            + (f"; clips {named}" if named else "")
        )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the last step first."""
        self._look_back()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the last step."""
        self._look_back()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The optimizer is on its own again."""
        if self._optimizer is not None:
            del self._optimizer.found_inf
            self._optimizer = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save weights that are not finite.

        Raises:
            NonFiniteError: naming the first such array, or the step before if that was not finite.
        """
        self._look_back()
        for name, value in checkpoint["state_dict"].items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise NonFiniteError(f"step {trainer.global_step}: {name} is not finite, so no checkpoint is written")
