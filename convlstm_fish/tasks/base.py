"""What the tasks share: the optimizer with its schedule, and the way of validation and test."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from convlstm_fish.errors import UserError, require
from convlstm_fish.tasks.callbacks.progress_bar import LateProgressBar

Batch = dict[str, Any]

LR_SCHEDULES = ("constant", "cosine", "one_cycle")


def schedule_factor(kind: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Learning rate at an optimizer step, as a factor of the highest one.

    "constant" stays at 1; "cosine" falls to 0 at ``total_steps`` along half a cosine; "one_cycle" is the cosine after a
    linear rise over the first tenth of the steps. ``warmup_steps`` is a linear rise for any of them.
    """
    if kind == "one_cycle" and not warmup_steps:
        warmup_steps = max(1, total_steps // 10)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if kind == "constant":
            return 1.0
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


class Task(pl.LightningModule, ABC):
    """Base of the tasks: Adam, the schedule of its learning rate, and validation and test.

    A subclass makes its scores in ``configure_metrics``; :meth:`_score` adds a batch to them, :meth:`_report` says what
    they came to.

    Args:
        lr: learning rate of Adam, the highest one where it follows a schedule.
        betas: decay of Adam's first and second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled weight decay (AdamW); 0 is plain Adam.
        lr_schedule: "constant", "cosine" or "one_cycle", over all steps of the run.
        warmup_steps: optimizer steps in which the learning rate rises linearly from 0.

    Raises:
        UserError: for a value that makes no sense.
    """

    val_scores: Any
    test_scores: Any
    val_loss: MeanMetric
    test_loss: MeanMetric

    def __init__(
        self, lr: float, betas: list[float], eps: float, weight_decay: float, lr_schedule: str, warmup_steps: int
    ) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("eps", eps)):
            require(name, value, math.isfinite(value) and value > 0, "a number above 0")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"betas: {betas!r} are not two numbers from 0 to below 1")
        for name, value in (("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
            require(name, value, value >= 0, "0 or more")
        require("lr_schedule", lr_schedule, lr_schedule in LR_SCHEDULES, f"one of {', '.join(LR_SCHEDULES)}")

    def adam(self, kind: type[torch.optim.Adam]) -> torch.optim.Adam:
        """Adam or AdamW with the task's hyper-parameters; on a GPU one that NonFiniteGuard need not wait for."""
        h = self.hparams
        # None where the weights are on a CPU: torch's choice.
        fused = next(self.parameters()).is_cuda or None
        optimizer = kind(
            self.parameters(),
            lr=h["lr"],
            betas=tuple(h["betas"]),
            eps=h["eps"],
            weight_decay=h["weight_decay"],
            fused=fused,
        )
        # Else Lightning would refuse to clip gradients; with this a gradient scaler unscales them before the step.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def configure_optimizers(self) -> Any:
        """Adam with the task's hyper-parameters; a schedule only where one was asked for."""
        h = self.hparams
        optimizer = self.adam(torch.optim.AdamW if h["weight_decay"] else torch.optim.Adam)
        if h["lr_schedule"] == "constant" and not h["warmup_steps"]:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches) if h["lr_schedule"] != "constant" else 0
        factor = schedule_factor(h["lr_schedule"], h["warmup_steps"], total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- training --------------------------------------------------------------------------------------------------

    def _log_loss(self, total: Tensor) -> None:
        """Log the training loss; on a bar of Lightning's own as well, which waits for the GPU in each step."""
        bar = None if self._trainer is None else self._trainer.progress_bar_callback
        self.log("train/loss", total.detach(), prog_bar=bar is not None and not isinstance(bar, LateProgressBar))

    # -- validation and test ---------------------------------------------------------------------------------------

    @abstractmethod
    def _score(self, batch: Batch, scores: Any, mean_loss: MeanMetric) -> None:
        """Add what is no padding in a batch to the scores and the mean loss."""

    @abstractmethod
    def _report(self, stage: str, scores: Any, mean_loss: MeanMetric) -> None:
        """Log loss and scores of "val" or "test" over all processes, keep what follows from them, start anew."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the batch."""
        self._score(batch, self.val_scores, self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the batch."""
        self._score(batch, self.test_scores, self.test_loss)

    def on_validation_epoch_end(self) -> None:
        """Report the validation."""
        self._report("val", self.val_scores, self.val_loss)

    def on_test_epoch_end(self) -> None:
        """Report the test."""
        self._report("test", self.test_scores, self.test_loss)


def valid_and_index(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which samples are no padding (N,), and the index of those; -1 where the batch does not tell."""
    samples, device = len(batch["video"]), batch["video"].device
    valid = batch.get("valid", torch.ones(samples, dtype=torch.bool, device=device))
    index = batch.get("index", torch.full((samples,), -1, device=device))
    return valid, index[valid]
