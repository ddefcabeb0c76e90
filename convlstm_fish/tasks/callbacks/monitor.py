"""What a run tells while it goes: rate, norms and memory for the logger, one line an epoch for the terminal."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch


class TrainingMonitor(pl.Callback):
    """Logs learning rate, gradient norm, clips per second and GPU memory, as often as the Trainer logs.

    ``train/gradient_norm`` is the Euclidean norm of all gradients before clipping; ``train/clips_per_second`` counts
    all processes; ``train/gpu_memory_gib`` is the highest amount allocated so far.
    """

    def __init__(self) -> None:
        self._clips = 0
        self._since = 0.0

    def _now(self, trainer: pl.Trainer) -> bool:
        return (trainer.global_step + 1) % _every(trainer) == 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting; a run that goes on in the middle of an epoch starts none."""
        self._clips, self._since = 0, time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting anew: validation between epochs is not training time."""
        self._clips, self._since = 0, time.monotonic()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log gradient norm and learning rate of the coming step."""
        if self._now(trainer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            pl_module.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))
            pl_module.log("train/lr", float(optimizer.param_groups[0]["lr"]))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count clips, and log rate and memory."""
        self._clips += len(batch["video"])
        if trainer.global_step % _every(trainer) or not self._clips:
            return
        now = time.monotonic()
        rate = self._clips * trainer.world_size / max(now - self._since, 1e-9)
        pl_module.log("train/clips_per_second", rate, batch_size=1)
        self._clips, self._since = 0, now
        if pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
            pl_module.log("train/gpu_memory_gib", peak, batch_size=1)


def _every(trainer: pl.Trainer) -> int:
    return max(1, int(trainer.log_every_n_steps))  # type: ignore[attr-defined]


class EpochLine(pl.Callback):
    """Prints one line an epoch with losses, scores and seconds: what remains of a run in a terminal or a log file."""

    def __init__(self) -> None:
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember when this part of the epoch started."""
        self._since = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember when the epoch started."""
        self._since = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the line."""
        if not trainer.is_global_zero:
            return
        wanted = {"train/loss", *trainer.progress_bar_metrics}
        figures = {n: float(v) for n, v in trainer.callback_metrics.items() if n in wanted}
        told = "  ".join(f"{name} {value:.4f}" for name, value in sorted(figures.items()))
        of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        print(f"epoch {trainer.current_epoch + 1}{of}  {told}  {time.monotonic() - self._since:.1f} s", flush=True)
