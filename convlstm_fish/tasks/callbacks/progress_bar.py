"""Lightning's progress bar, for which a GPU is not made to wait in each step."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from torch import Tensor

from convlstm_fish.tasks.callbacks.late import Late


class LateProgressBar(RichProgressBar):
    """Shows, beside what Lightning shows, the training loss of the step before the last one.

    What ``self.log`` puts on Lightning's bars is read from the GPU in each step, which then stands still until the
    next one has been handed over; the tasks here leave their training loss to this bar.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._coming: Late | None = None
        self._loss: float | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the loss up, and show the one before."""
        if self.is_enabled:  # in one of several processes
            if self._coming is not None:
                self._loss = float(self._coming.read())
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            self._coming = Late(loss.detach()) if isinstance(loss, Tensor) else None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Lightning's, and the training loss."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        return metrics if self._loss is None else {"train/loss": self._loss, **metrics}
